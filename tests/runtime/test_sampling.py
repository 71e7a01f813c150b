"""Laws against a naive reference and transformers' warpers; dice against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drafter.errors import CheckFailed, UsageError
from runtime.sampling import (
    Law,
    Logits,
    SamplingConfig,
    SeededDice,
    argmax,
    choose,
    invert,
    target_law,
)


def naive_law(logits: Logits, config: SamplingConfig) -> Law:
    """The definition: sort everything (ties: lower id first), filter step by step."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if config.temperature == 0:
        order = order[:1]
    if config.top_k:
        order = order[: config.top_k]
    top = float(logits[order[0]])
    weights = [math.exp((float(logits[i]) - top) / (config.temperature or 1)) for i in order]
    probs = [weight / sum(weights) for weight in weights]
    kept, mass = [], 0.0
    for i, prob in zip(order, probs, strict=True):
        if config.top_p < 1 and mass >= config.top_p:  # 1 is off, whatever sums round to
            break
        kept.append((i, prob))
        mass += prob
    kept = [(i, prob) for i, prob in kept if prob >= config.min_p * kept[0][1]]
    law = np.zeros(len(logits))
    for i, prob in kept:
        law[i] = prob / sum(prob for _, prob in kept)
    return law


tied_logits = st.lists(
    st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=40
).filter(lambda values: max(values) > -math.inf)
# Steps of 1/64: far enough apart that rounding in exp neither makes nor breaks a tie.
free_logits = st.lists(st.integers(-1280, 1280).map(lambda n: n / 64), min_size=1, max_size=80)
configs = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 1000]),
    # Not sums of likely probabilities, so that rounding cannot decide what is in the nucleus.
    top_p=st.sampled_from([1.0, 0.90137, 0.51713, 0.1237, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0501, 0.3003, 1.0]),
)


class TestTargetLaw:
    @settings(max_examples=200, deadline=None)
    @example([0.0, 706 / 64], SamplingConfig(temperature=0.3))  # 1e-16 is a probability too
    @given(values=tied_logits | free_logits, config=configs)
    def test_equals_the_naive_definition(self, values: list[float], config: SamplingConfig) -> None:
        logits = np.array(values, dtype=np.float32)
        law = target_law(logits, config)
        expected = naive_law(logits, config)
        assert law.dtype == np.float64
        np.testing.assert_array_equal(law > 1e-300, expected > 1e-300)
        np.testing.assert_allclose(law, expected, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("vocab", [49_152, 151_936])
    @pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
    def test_top_p_of_a_large_vocabulary_takes_the_smallest_leading_set(
        self, vocab: int, top_p: float
    ) -> None:
        logits = np.random.default_rng(vocab).normal(0, 2, vocab).astype(np.float32)
        law = target_law(logits, SamplingConfig(temperature=1.0, top_p=top_p))
        probs = target_law(logits, SamplingConfig(temperature=1.0))
        kept = law > 0
        assert probs[kept].sum() >= top_p > probs[kept].sum() - probs[kept].min()
        assert probs[kept].min() > probs[~kept].max()

    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 1000),
        temperature=st.sampled_from([0.5, 1.0, 1.6]),
        top_k=st.sampled_from([0, 1, 3, 20]),
        top_p=st.sampled_from([1.0, 0.9, 0.4]),
        min_p=st.sampled_from([0.0, 0.02, 0.2]),
    )
    def test_equals_transformers(
        self, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        torch = pytest.importorskip("torch")
        warpers = pytest.importorskip("transformers.generation.logits_process")
        logits = np.random.default_rng(seed).normal(0, 3, 60).astype(np.float32)
        scores = torch.tensor(logits)[None].double()
        scores = warpers.TemperatureLogitsWarper(temperature)(None, scores)
        if top_k:
            scores = warpers.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = warpers.TopPLogitsWarper(top_p)(None, scores)
        if min_p:
            scores = warpers.MinPLogitsWarper(min_p)(None, scores)
        law = target_law(logits, SamplingConfig(temperature, top_k, top_p, min_p))
        np.testing.assert_allclose(law, scores.softmax(-1)[0].numpy(), rtol=1e-9, atol=1e-15)

    def test_ties_at_the_edge_go_to_the_lower_id(self) -> None:
        logits = np.array([0, 1, 1, 1, 0], dtype=np.float32)
        top_k = target_law(logits, SamplingConfig(temperature=1.0, top_k=2))
        assert np.flatnonzero(top_k).tolist() == [1, 2]
        top_p = target_law(logits, SamplingConfig(temperature=1.0, top_p=0.5))
        assert np.flatnonzero(top_p).tolist() == [1, 2]
        assert argmax(logits) == 1

    def test_top_k_one_is_greedy(self) -> None:
        logits = np.array([2, 5, 5, 1], dtype=np.float32)
        greedy = target_law(logits, SamplingConfig(temperature=0.0))
        top_one = target_law(logits, SamplingConfig(temperature=1.3, top_k=1))
        np.testing.assert_array_equal(greedy, top_one)

    @pytest.mark.parametrize("temperature", [1e-12, 1e-300])
    def test_a_tiny_temperature_is_greedy_not_nan(self, temperature: float) -> None:
        logits = np.array([2, 5, 4, 1], dtype=np.float32)
        law = target_law(logits, SamplingConfig(temperature=temperature))
        assert law.tolist() == [0, 1, 0, 0]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("broken", [[1.0, math.nan], [math.inf, 1.0], [-math.inf] * 2])
    def test_refuses_broken_logits(self, broken: list[float], temperature: float) -> None:
        with pytest.raises(CheckFailed, match="must be finite"):
            target_law(np.array(broken, dtype=np.float32), SamplingConfig(temperature))


class TestSamplingConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", -0.1),
            ("temperature", math.nan),
            ("temperature", math.inf),
            ("temperature", "1"),
            ("top_k", -1),
            ("top_k", 2.0),
            ("top_p", 0.0),
            ("top_p", 1.01),
            ("min_p", -0.1),
            ("min_p", 1.1),
            ("seed", -1),
            ("seed", 0.5),
        ],
    )
    def test_names_the_field_and_the_value(self, field: str, value: object) -> None:
        with pytest.raises(UsageError, match=f"{field} is {value!r}"):
            SamplingConfig(**{field: value})  # type: ignore[arg-type]


class TestDice:
    def test_the_same_seed_gives_the_same_draws(self) -> None:
        law = target_law(np.zeros(50, dtype=np.float32), SamplingConfig(temperature=1.0))
        draws = [[SeededDice(seed).pick(law.copy()) for _ in range(3)] for seed in (1, 1, 2, 3, 4)]
        assert draws[0] == draws[1]
        assert len({tuple(draw) for draw in draws}) > 1

    def test_no_seed_means_fresh_draws(self) -> None:
        law = np.full(10_000, 1e-4)
        assert len({SeededDice().pick(law) for _ in range(5)}) > 1

    @pytest.mark.parametrize("chance", [0.05, 0.5, 0.9])
    def test_a_coin_is_fair(self, chance: float) -> None:
        dice, count = SeededDice(0), 20_000
        heads = sum(dice.flip(chance) for _ in range(count))
        assert abs(heads / count - chance) < 4 * math.sqrt(chance * (1 - chance) / count)

    def test_chance_zero_is_never_and_chance_one_always_taken(self) -> None:
        dice = SeededDice(0)
        assert not any(dice.flip(0.0) for _ in range(1000))
        assert all(dice.flip(1.0) for _ in range(1000))

    @given(
        weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 0.7, 3.0]), min_size=1).filter(
            lambda values: sum(values) > 0
        ),
        point=st.sampled_from([0.0, 1e-12, 0.3, 0.99, 1 - 2**-53]),
    )
    def test_never_picks_weight_zero(self, weights: list[float], point: float) -> None:
        assert weights[invert(np.array(weights), point)] > 0

    def test_picks_in_proportion(self) -> None:
        weights = np.array([0.0, 1.0, 0.0, 3.0])
        points = (np.arange(1000) + 0.5) / 1000
        picks = [invert(weights, float(point)) for point in points]
        assert picks == [1] * 250 + [3] * 750

    @given(st.integers(1, 1500), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
    @settings(max_examples=200, deadline=None)
    def test_blocks_find_what_one_running_sum_finds(
        self, size: int, point: float, seed: int
    ) -> None:
        """Weights are whole numbers, so that both ways of summing are exact."""
        weights = np.random.default_rng(seed).integers(0, 3, size).astype(np.float64)
        weights[seed % size] = 2.0
        total = np.cumsum(weights)
        wanted = int(np.searchsorted(total, point * total[-1], side="right"))
        assert invert(weights, point) == wanted

    def test_greedy_choice_needs_no_dice(self) -> None:
        class NoDice:
            def flip(self, chance: float) -> bool:
                raise AssertionError

            def pick(self, weights: Law) -> int:
                raise AssertionError

        assert choose(np.array([1, 3, 3], dtype=np.float32), SamplingConfig(), NoDice()) == 1
