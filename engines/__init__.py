"""Something that runs: backends that turn exported graphs into engines, with their self-checks and manifests.

Imports only from `export` and `drafter`.
"""

from engines.backends import BACKENDS, build_engines, open_engines
from engines.base import Engine, EngineManifest, EngineSet

__all__ = ["BACKENDS", "Engine", "EngineManifest", "EngineSet", "build_engines", "open_engines"]
