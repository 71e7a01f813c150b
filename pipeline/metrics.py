"""The course of a training run for people: the line that is shown, and TensorBoard's events.

TensorBoard is optional (`slimspec[train]`): nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from drafter.errors import MissingError

if TYPE_CHECKING:
    from drafter.train_log import StepReport

Show = Callable[["StepReport"], None]


def require_tensorboard() -> None:
    """Raises MissingError where it is not installed."""
    if find_spec("tensorboard") is None:
        raise MissingError(
            "--tensorboard needs the package tensorboard, which is not installed; "
            "`pip install 'slimspec[train]'` adds it."
        )


@contextmanager
def tensorboard(folder: Path | None) -> Iterator[Show]:
    """Yield what writes a step to the events in `folder`; None: nothing is written.

    Where a killed run had written steps that are made again, the old ones are hidden.
    """
    if folder is None:
        yield lambda _: None
        return
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def show(report: StepReport) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=report.step)
        for name, value in scalars(report).items():
            writer.add_scalar(name, value, report.step)

    try:
        yield show
    finally:
        if writer is not None:
            writer.close()


def scalars(report: StepReport) -> dict[str, float]:
    """What is written of a step, by name."""
    plain = ("loss", "expected_tau", "gradient_norm", "learning_rate", "tokens_per_second")
    found = {name: float(getattr(report, name)) for name in plain}
    found |= {f"alpha/step_{k}": alpha for k, alpha in enumerate(report.alpha, 1)}
    return found | {f"time/{name}": share for name, share in report.time_shares.items()}


def line(report: StepReport) -> str:
    """A step in a line for people."""
    alphas = " ".join(f"{alpha:.2f}" for alpha in report.alpha)
    minutes, seconds = divmod(round(report.eta), 60)
    return (
        f"step {report.step}/{report.steps}, loss {report.loss:.3f}, alpha {alphas}, "
        f"tau {report.expected_tau:.2f}, {report.tokens_per_second:.0f} tokens/s, "
        f"{minutes}:{seconds:02d} left"
    )
