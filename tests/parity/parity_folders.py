"""Folders to verify, and ways to damage them."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from small import TinyNet, net_calls

from mpqdm_fx.api import lower, quantize
from mpqdm_fx.config import MPQConfig
from mpqdm_fx.folders import WEIGHTS, seal_folder
from mpqdm_fx.io.sealed import seal
from mpqdm_fx.parity.thresholds import THRESHOLDS
from mpqdm_fx.quantized import QuantizedModel
from mpqdm_fx.storage import load, save


def quantized_net() -> QuantizedModel:
    """`TinyNet` at 4 bits with static activations."""
    config = MPQConfig(weight_bits=4, allocation="uniform", refinements=0)
    return quantize(TinyNet(), config, net_calls())


def folder_of_net(path: Path, *, program: bool, observe=None) -> Path:
    """That net in a folder, with a `.pte` if asked for; `observe` as of `lower`."""
    quantized = quantized_net()
    save(quantized, path)
    if program:
        lower(quantized, "xnnpack", output=path / "unet.pte", observe=observe)
        seal_folder(path)
    return path


def double_a_scale(folder: Path, layer: str, channel: int = 0) -> None:
    """Double the scale of one output channel in the packed file, and mend its checksum."""
    plan = load(folder, TinyNet()).plan
    names = [planned.name for planned in plan.layers]
    before = plan.layers[: names.index(layer)]
    tensors = load_file(folder / WEIGHTS)
    tensors["scales"][sum(planned.shape[0] for planned in before) + channel] *= 2
    save_file(tensors, folder / WEIGHTS)
    seal_folder(folder)


def edit(path: Path, change) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_thresholds(folder: Path, change) -> None:
    """Change the thresholds as one who knows the format would: the digest fits again."""

    def sealed(data):
        change(data)
        data.update(seal(data))

    edit(folder / THRESHOLDS, sealed)
    seal_folder(folder)
