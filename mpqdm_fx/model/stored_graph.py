"""The file that holds a model's graph, so that it is loaded without its class and without tracing.

`torch.export.save` is no choice: what it writes is a graph of operators, from which layers are
gone, and reading it back unpickles whatever the archive calls pickled (`torch.load` with
`weights_only=False`). This file is JSON, compressed since names repeat, of `graph.describe`.
"""

import json
import lzma
from pathlib import Path

from torch import fx

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.graph.describe import Description, code_in, describe, first_difference
from mpqdm_fx.io.folders import GRAPH
from mpqdm_fx.io.sealed import parse_json

__all__ = ["check_same_graph", "read_graph", "write_graph"]

_LIMIT = 64 * 2**20  # bytes of the JSON; Stable Diffusion's UNet has about 300,000
_MEMORY = 256 * 2**20  # bytes that reading may take for its dictionary


def write_graph(path: Path, graph_module: fx.GraphModule, *, model_required: bool) -> Description:
    """Write a graph's description.

    Args:
        path: The file.
        graph_module: The graph, float or rounded: they are described alike.
        model_required: Accept a graph that runs code of the model's own, which is then only named.

    Returns:
        What was written.

    Raises:
        ArtifactError: The graph runs such code.
    """
    description = describe(graph_module)
    code = code_in(description)
    if code is not None and not model_required:
        raise ArtifactError(
            f"{description['model']} cannot be saved for loading by itself: {code}, which is code "
            f"of its own and no file holds; save(..., model_required=True) and load(folder, "
            f"model=...) with a model that has the same code"
        )
    text = json.dumps(description, separators=(",", ":"))
    path.write_bytes(lzma.compress(text.encode()))
    return description


def read_graph(path: Path) -> Description:
    """Inverse of `write_graph`.

    Raises:
        ArtifactError: The file is damaged or larger than any graph.
    """
    try:
        decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY)
        text = decompressor.decompress(path.read_bytes(), max_length=_LIMIT)
        if not decompressor.eof or decompressor.unused_data:
            raise ArtifactError(f"{GRAPH} is damaged: it does not end where its graph does")
    except (OSError, lzma.LZMAError) as error:
        raise ArtifactError(f"{GRAPH} is damaged: {error!r}") from None
    description = parse_json(text, GRAPH)
    parts = {"model": str, "nodes": list, "modules": dict, "tensors": dict}
    if any(not isinstance(description.get(name), kind) for name, kind in parts.items()):
        raise ArtifactError(f"{GRAPH} is damaged: it holds no graph")
    return description


def check_same_graph(graph_module: fx.GraphModule, description: Description) -> None:
    """Refuse a graph that is not the one that was saved.

    Raises:
        ArtifactError: They differ; names the first place with both values.
    """
    difference = first_difference(describe(graph_module), description)
    if difference is not None:
        raise ArtifactError(f"the model is not the one that was saved: {difference}")
