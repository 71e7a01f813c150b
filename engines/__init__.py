"""Something that runs: backends that turn exported graphs into engines, with their self-checks
and manifests.

Imports only from `export` and `drafter`.
"""

from engines.backends import BACKENDS, build_engines, open_drafter, open_engines, read_engine
from engines.base import Engine, EngineManifest, EngineSet
from engines.machine import BackendStatus, backends_available

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "Engine",
    "EngineManifest",
    "EngineSet",
    "backends_available",
    "build_engines",
    "open_drafter",
    "open_engines",
    "read_engine",
]
