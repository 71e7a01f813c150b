"""Build engines for ONNX Runtime: optimise each graph once, off line, and share their weights.

ONNX Runtime's own optimisation stops at the "extended" level: it fuses nodes but lays nothing out
for one particular processor. Then come the passes of `engines`: heads grouped, products merged,
weights rounded. Where what they do changes, raise the `recipe` of the backend (`engines.backends`).
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from drafter.errors import UsageError
from engines.base import PRECISIONS
from engines.grouped_heads import group_heads
from engines.merging import merge_products
from engines.onnxruntime import open_session, session_options
from engines.weight_only import quantise
from export.contract import GRAPHS
from export.files import WEIGHTS
from export.onnx_files import WeightFile, save_graph

_SCRATCH = "optimised"


def build_graphs(export_folder: Path, out: Path, precision: str) -> None:
    """Write the three optimised graphs and their weight file into `out`, an empty folder.

    Raises UsageError when a graph cannot be loaded, or has no matrix that the precision names.
    """
    chosen = PRECISIONS[precision]
    models = {graph: optimised(export_folder / f"{graph}.onnx", out) for graph in GRAPHS}
    for graph, model in models.items():
        # Blocks of a rounded row must stay whole.
        group_heads(model, whole=chosen.layers.block if graph in chosen.graphs else 1)
        merge_products(model)
    for graph in chosen.graphs:
        if not quantise(models[graph], partial(chosen.form_of, graph), chosen.only):
            named = " and ".join(chosen.only or ("products",))
            raise UsageError(
                f"precision '{precision}' rounds {named}, but graph '{graph}' of {export_folder} "
                "has no such matrix: its drafter has no low-rank head; choose another --precision."
            )
    weights = WeightFile(out / WEIGHTS)
    for graph, model in models.items():
        save_graph(model, out / f"{graph}.onnx", weights)
    shutil.rmtree(out / _SCRATCH)


def optimised(path: Path, out: Path) -> ir.Model:
    """The graph of `path`, optimised; its weights lie in a scratch folder of `out`."""
    folder = out / _SCRATCH
    folder.mkdir(exist_ok=True)
    options = session_options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / path.name)
    data = f"{path.stem}.bin"
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", data
    )
    options.add_session_config_entry("session.disable_prepacking", "1")  # nothing is run here
    open_session(path, options)
    return ir.load(folder / path.name)
