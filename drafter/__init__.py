"""What is learned: the target decoder, the EAGLE-3 layer, heads, losses, training, artifacts.

Sources of targets and corpora live here too. The lowest floor: nothing here imports from
`export`, `engines`, `runtime` or `pipeline`.
"""

from __future__ import annotations

__version__ = "0.1.0"
