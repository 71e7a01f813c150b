"""A real tiny generator with a known script, behind a valve, and a real server around it.

The target's layers are silenced, so the next token depends on the last one only, by the script:
after a chat prompt comes TEXT and the end token; after a digit come the digits, for ever. Engine,
drafter, trees and verification are the real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import httpx
import torch
from openai import OpenAI

from drafter.tokenizer import ChatTokenizer
from runtime.batch import Batch
from runtime.batch_generator import BatchGenerator
from runtime.generator import Generator, Piece
from runtime.member import Models
from runtime.prefixes import PrefixCache
from runtime.server import ServerSettings, create_app
from runtime.server.listen import DrainingServer, make_server, open_socket
from runtime.tree import TreeConfig
from tests.runtime.tiny_engines import Tiny, tiny
from tests.tiny_llama import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer

TEXT = "Hé🎉lo €wards!"  # no token twice, so that each has one successor
DIGITS = "0123456789"
MODEL = "scripted"
END = 2
CONTEXT = 2048
TREE = TreeConfig(depth=3, width=2, budget=6)


class Valve:
    """Lets pieces through: all of them, or as many as it was told to."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: int | None = None
        self.passed = 0
        self.blocked = False  # somebody waits

    def open(self) -> None:
        """Let everything through."""
        self._set(None)

    def close(self) -> None:
        """Let nothing through."""
        self._set(0)

    def let(self, pieces: int) -> None:
        """Let so many more through."""
        self._set((self._left or 0) + pieces)

    def wait(self) -> None:
        """Called for each piece."""
        with self._changed:
            self.blocked = self._left == 0
            assert self._changed.wait_for(lambda: self._left != 0, timeout=20), "valve stuck"
            self.blocked = False
            self.passed += 1
            if self._left is not None:
                self._left -= 1

    def _set(self, left: int | None) -> None:
        with self._changed:
            self._left = left
            self._changed.notify_all()


class ValvedGenerator(Generator):
    """A Generator whose next pass begins when the valve lets it."""

    valve: Valve
    head: torch.Tensor
    active = 0  # streams begun and not yet ended
    most_active = 0

    def stream(self, *args: Any, **options: Any) -> Iterator[Piece]:
        """See `Generator`."""
        return self._valved(super().stream(*args, **options))

    @contextmanager
    def broken(self) -> Iterator[None]:
        """The target's head holds NaN meanwhile."""
        sound = self.head.clone()
        self.head.fill_(float("nan"))
        try:
            yield
        finally:
            self.head.copy_(sound)

    def _valved(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            while True:
                self.valve.wait()
                piece = next(pieces)
                yield piece
                if piece.completion is not None:
                    return
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a Python generator
            self.active -= 1


class ValvedBatchGenerator(BatchGenerator):
    """A BatchGenerator whose next step begins when the valve lets it."""

    valve: Valve

    def _step(self) -> None:
        self.valve.wait()
        super()._step()


def scripted_generator(noise: float = 2.0) -> ValvedGenerator:
    """A generator of the script; `noise` spoils some of the drafter's guesses."""
    model, tokenizer = _script(noise)
    generator = ValvedGenerator(model.target, model.drafter, tokenizer, eos_ids=[END], tree=TREE)
    generator.valve, generator.head = Valve(), model.decoder.lm_head.weight
    return generator


def scripted_batch(max_batch: int, max_rows: int | None = None) -> ValvedBatchGenerator:
    """The same for several requests at a time, with a prefix cache."""
    model, tokenizer = _script(2.0)
    engines = model.engines["target"], model.engines["extend"], model.engines["step"]
    models = Models(*engines, model.decoder.config, model.drafter_config, CONTEXT)
    batch = Batch(models, max_batch, max_rows=max_rows, prefixes=PrefixCache(2**20))
    generator = ValvedBatchGenerator(batch, tokenizer, eos_ids=[END], tree=TREE)
    generator.valve = Valve()
    return generator


def _script(noise: float) -> tuple[Tiny, ChatTokenizer]:
    raw = tiny_tokenizer()
    named = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2]}
    tokenizer = ChatTokenizer(raw, CHAT_TEMPLATE, [END], named)
    model = tiny(3, vocab=tokenizer.vocab_size, noise=noise, max_context=CONTEXT)
    begin = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])[-1]
    successor = {
        **_chain([begin, *tokenizer.encode(TEXT), END]),
        **_chain(tokenizer.encode(DIGITS)),
    }
    first, last = tokenizer.encode("0")[0], tokenizer.encode("9")[0]
    successor[last] = first
    _obey(model.decoder, successor)
    return model, tokenizer


def _chain(tokens: list[int]) -> dict[int, int]:
    assert len(set(tokens)) == len(tokens), "a token of the script would have two successors"
    return dict(pairwise(tokens))


def _obey(decoder: torch.nn.Module, successor: dict[int, int]) -> None:
    """Make each token's embedding point at its successor's row of the head."""
    weights = dict(decoder.named_parameters())
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    embed, head = weights["embed_tokens.weight"], weights["lm_head.weight"]
    embed.div_(embed.norm(dim=-1, keepdim=True))
    head.zero_()
    for token, follower in successor.items():
        head[follower] = 4 * embed[token]


AnyGenerator = ValvedGenerator | ValvedBatchGenerator


class Running:
    """A server in a thread."""

    def __init__(self, generator: AnyGenerator, settings: ServerSettings) -> None:
        self.generator: Any = generator
        self.app = create_app(generator, settings)
        self.server: DrainingServer = make_server(self.app)
        self.listener = open_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self._clients: dict[str, OpenAI] = {}
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True
        )

    def stop(self) -> None:
        """Stop it as a signal does, and wait for its end."""
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    @property
    def service(self) -> Any:
        """What the routes share."""
        return self.app.state.service

    def client(self, key: str = "unused") -> OpenAI:
        """The official client; no retries, so that a refusal is seen."""
        if key not in self._clients:  # making one takes longer than a request
            self._clients[key] = OpenAI(
                base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20
            )
        return self._clients[key]

    def metrics(self) -> dict[str, float]:
        """Sample name with labels -> value, from /metrics."""
        lines = self.http.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}


@contextmanager
def running(generator: AnyGenerator, **settings: Any) -> Iterator[Running]:
    """Serve the generator on a free port."""
    generator.valve.open()
    found = Running(generator, ServerSettings(model_name=MODEL, **settings))
    found.thread.start()
    wait_until(lambda: found.server.started)
    try:
        yield found
    finally:
        generator.valve.open()
        found.stop()


def wait_until(holds: Any, seconds: float = 10.0) -> None:
    """Wait for something another thread does."""
    tick = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if holds():
            return
        tick.wait(0.005)
    raise AssertionError("it did not happen in time")
