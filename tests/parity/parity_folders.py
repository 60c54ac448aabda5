"""Folders to verify, and ways to damage them."""

from pathlib import Path

from records import edit_json
from small import TinyNet, net_calls

from mpqdm_fx.api import quantize
from mpqdm_fx.backends.lower import lower
from mpqdm_fx.graph.editing import copy_graph_module, replace_module
from mpqdm_fx.io.folders import seal_folder
from mpqdm_fx.io.sealed import Entry
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.model.quantized import QuantizedModel
from mpqdm_fx.model.storage import load, save, write_model
from mpqdm_fx.parity.thresholds import THRESHOLDS
from mpqdm_fx.passes.quantize.round_weights import install_codes
from mpqdm_fx.records.config import MPQConfig


def quantized_net() -> QuantizedModel:
    """`TinyNet` at 4 bits with static activations."""
    config = MPQConfig(weight_bits=4, allocation="uniform", refinements=0)
    return quantize(TinyNet(), config, net_calls())


def folder_of_net(path: Path, *, program: bool) -> Path:
    """That net in a folder, with a `.pte` if asked for."""
    quantized = quantized_net()
    save(quantized, path)
    if program:
        lower(quantized, "xnnpack", output=path / "unet.pte")
        seal_folder(path)
    return path


def double_a_scale(folder: Path, layer: str, channel: int = 0) -> None:
    """Double the scale of one output channel, in a folder that is sealed again and loads."""
    quantized = load(folder, TinyNet())
    rounded = copy_graph_module(quantized.rounded)
    module = rounded.get_submodule(layer)
    scale = module.weight_scale.clone()
    scale[channel] *= 2
    replace_module(rounded, layer, install_codes(module, module.weight_codes, scale))
    program = open_folder(folder).manifest.program
    changed = quantized.with_graph(rounded)
    write_model(changed, folder, program=None if program is None else program.model_dump())


def flip_a_weight(folder: Path, layer: str) -> None:
    """Change the sign of one weight in the bytes of a program, whose folder and thresholds fit."""
    codes = load(folder, TinyNet()).rounded.get_submodule(layer).weight_codes
    stored = (codes.permute(0, 2, 3, 1) if codes.dim() == 4 else codes).contiguous()
    changed = stored.clone()
    changed.view(-1)[stored.flatten().int().abs().argmax()].neg_()
    path = folder / "unet.pte"
    data, old, new = path.read_bytes(), stored.numpy().tobytes(), changed.numpy().tobytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    entry = Entry.of(path).to_dict()
    edit_thresholds(folder, lambda content: content["files"].update({"unet.pte": entry}))


def edit_thresholds(folder: Path, change) -> None:
    """Change the thresholds as one who knows the format would: the digests fit again."""
    edit_json(folder / THRESHOLDS, change, sealed=True)
    seal_folder(folder)
