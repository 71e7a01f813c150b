"""What a machine offers: cores within affinity and quota, and the backends it could use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines import BACKENDS, backends_available, machine
from engines.machine import installed_version, physical_cores


def test_cores_are_between_one_and_those_of_the_process() -> None:
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("content", "least"), [("100000 100000\n", 1), ("50000 100000", 1), ("nonsense", 1)]
)
def test_a_quota_of_one_core_is_one_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, least: int
) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(content)
    monkeypatch.setattr(machine, "_QUOTA", quota)
    assert physical_cores() >= least
    if content != "nonsense":
        assert physical_cores() == 1


def test_hyper_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu in range(4):
        (tmp_path / str(cpu)).write_text("0,2\n" if cpu % 2 == 0 else "1,3\n")
    monkeypatch.setattr(machine, "_SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert physical_cores() == 2


def test_an_arm_processor_is_named_by_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for part in ("0xd0c", "0xd4f"):
        cpuinfo = tmp_path / part
        cpuinfo.write_text(f"processor : 0\nCPU implementer : 0x41\nCPU part\t: {part}\n")
        monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
        names.append(machine.processor()["cpu"])
    assert [name.split()[-2:] for name in names] == [["0x41", "0xd0c"], ["0x41", "0xd4f"]]


def test_every_backend_is_listed_with_what_it_has_or_lacks() -> None:
    found = {status.name: status for status in backends_available()}
    assert found.keys() >= BACKENDS.keys() | {"tensorrt", "tensorrt-rtx", "tensorrt-llm"}
    assert found["onnxruntime"].available
    assert found["onnxruntime"].detail == f"onnxruntime {installed_version('onnxruntime')}"
    for status in found.values():
        assert status.available != status.detail.startswith("missing: ")
        assert not status.available or status.name in BACKENDS


def test_a_module_that_is_not_installed_has_no_version() -> None:
    assert installed_version("no_such_module") is None
