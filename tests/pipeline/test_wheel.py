"""The wheel: built from the sources and installed by pip, it is the whole product."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("drafter", "export", "engines", "runtime", "pipeline")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",  # not the checkout, whose packages would be found first
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the wheel into."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    (wheel,) = folder.glob("slimspec-*.whl")
    site = folder / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    return site


def test_the_installed_command_runs(site: Path) -> None:
    script = site / "bin" / "pipeline"
    assert "version" in run(script, "--help", PYTHONPATH=str(site))
    where = run("-c", "import pipeline; print(pipeline.__file__)", PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)


def test_the_default_drafter_and_the_types_come_with_it(site: Path) -> None:
    for name in ("config.json", "manifest.json", "model.safetensors"):
        packaged = site / "drafter" / "pretrained" / "smollm2-135m" / name
        checkout = ROOT / "drafter" / "pretrained" / "smollm2-135m" / name
        assert packaged.read_bytes() == checkout.read_bytes()
    assert all((site / part / "py.typed").exists() for part in PARTS)


def test_every_module_of_the_checkout_is_in_it(site: Path) -> None:
    for part in PARTS:
        wanted = {path.relative_to(ROOT) for path in (ROOT / part).rglob("*.py")}
        assert wanted == {path.relative_to(site) for path in (site / part).rglob("*.py")}
