"""What this machine offers: the cores this process may use, and which backends could run here."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
_MEMORY_LIMIT, _MEMORY_USED = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory.current"),
)


def physical_cores() -> int:
    """Physical cores that this process may run on.

    Its affinity with hyper-threads counted once, within the quota of its cgroup.
    """
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota(len(cpus))))


def _siblings(cpu: int) -> str:
    try:
        return Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quota(default: int) -> int:
    try:
        limit, period = _QUOTA.read_text(encoding="ascii").split()
        return default if limit == "max" else math.ceil(int(limit) / int(period))
    except (OSError, ValueError):
        return default


# Instruction sets that decide how fast matrix products are.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
_ARM = ("CPU implementer", "CPU part")


def usable_cpus() -> list[int]:
    """The logical processors that this process may run on, by number."""
    return sorted(os.sched_getaffinity(0))


def processor() -> dict[str, Any]:
    """The processor and the cores of it that this process may use."""
    model, flags = _model_and_flags()
    return {
        "cpu": model,
        "cpu_flags": flags,
        "cores": physical_cores(),
        "logical_cpus": len(os.sched_getaffinity(0)),
    }


def _model_and_flags() -> tuple[str, list[str]]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields: dict[str, set[str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), set()).add(value.strip())
    flags = set(" ".join(fields.get("flags", fields.get("Features", set()))).split())
    # ARM names no model: implementer and part say which, several where cores differ.
    parts = [part for name in _ARM for part in sorted(fields.get(name, ()))]
    models = sorted(fields.get("model name", ())) or [platform.machine(), *parts]
    return " ".join(models), [flag for flag in _FLAGS if flag in flags]


def available_bytes() -> int:
    """Memory that this process can still get: free on the machine, and within its cgroup's limit.

    All of the machine's where that is not told.
    """
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        left = min(left, int(found.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # no limit reads "max"
        limit = int(_MEMORY_LIMIT.read_text(encoding="ascii"))
        left = min(left, limit - int(_MEMORY_USED.read_text(encoding="ascii")))
    return max(0, left)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; `detail` says with what, or what is missing."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class _Needs:
    """What a backend needs: a module, the package that brings it, and perhaps an NVIDIA driver."""

    module: str
    install: str
    driver: bool = False


_NEEDS = {
    "onnxruntime": _Needs("onnxruntime", "pip install slimspec"),
    "torch": _Needs("torch", "pip install slimspec"),
    "tensorrt": _Needs("tensorrt", "pip install 'slimspec[tensorrt]'", driver=True),
    "tensorrt-rtx": _Needs("tensorrt_rtx", "pip install tensorrt-rtx", driver=True),
    "tensorrt-llm": _Needs("tensorrt_llm", "pip install 'slimspec[tensorrt-llm]'", driver=True),
}


def backends_available() -> list[BackendStatus]:
    """All backends this project knows of, with what they lack on this machine; imports none."""
    from engines.backends import BACKENDS

    return [_status(name, needs, name in BACKENDS) for name, needs in _NEEDS.items()]


def _status(name: str, needs: _Needs, implemented: bool) -> BackendStatus:
    version = installed_version(needs.module)
    missing = []
    if version is None:
        missing.append(f"package {needs.module} ({needs.install})")
    if needs.driver and not has_nvidia_driver():
        missing.append("NVIDIA driver (libcuda.so.1)")
    if not implemented:
        missing.append("an engine builder in this version of slimspec")
    detail = f"missing: {'; '.join(missing)}" if missing else f"{needs.module} {version}"
    return BackendStatus(name, not missing, detail)


def installed_version(module: str) -> str | None:
    """The version of an installed module, `unknown` where its package names none, or None."""
    if util.find_spec(module) is None:
        return None
    for package in (module, module.replace("_", "-")):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "unknown"


def has_nvidia_driver() -> bool:
    """Whether the driver's library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
