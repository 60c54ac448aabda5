"""One sweep against rerunning the model for every layer, at one, two and four times the depth.

    pip install -e ".[test]"
    python benchmarks/depth.py

Both compute the same integers (`tests/sweep`). The sweep executes each node once per lane and call,
so its time grows with the depth; that of the reruns grows with its square.
"""

import argparse
import time

import torch
from diffusers import UNet2DModel

from mpqdm_fx import MPQConfig, convert, prepare
from mpqdm_fx.graph.layers import weight_layers
from mpqdm_fx.sweep.start import start_sweep
from mpqdm_fx.testing.rerun import rerun_for_every_layer


def model(layers_per_block: int) -> UNet2DModel:
    """Seeded random weights, 16x16."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=layers_per_block,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()


def main() -> None:
    """Print one line for each depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--calls", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    calls = [
        {
            "sample": torch.randn(8, 1, 16, 16, generator=generator),
            "timestep": torch.randint(1000, (8,), generator=generator),
        }
        for _ in range(arguments.calls)
    ]
    # Nearest rounding and a fixed strength: little to solve, so that what is told apart is how the
    # layers' inputs are come by.
    settings = MPQConfig(
        weight_bits=4,
        allocation="uniform",
        levels="uniform",
        rounding="nearest",
        propagation=0.5,
        row_weights="plain",
        judge=False,
        activation_mode="float",
        max_rows=512,
    )
    print("depth  layers  node executions  sweep s  reruns s  ratio")
    for depth in arguments.depths:
        prepared = prepare(model(depth), settings, calls[0])
        for call in calls:
            prepared.record(**call)
        graph_module, records = prepared.graph_module, prepared.records
        sweep = start_sweep(graph_module, records, settings)
        start = time.perf_counter()
        convert(prepared, sweep=sweep)
        middle = time.perf_counter()
        weights, inputs = sweep.prepared.row_weights, list(records)
        held_out = weights.groups.held_out(inputs)
        rerun_for_every_layer(graph_module, inputs, settings, held_out, weights)
        swept, rerun = middle - start, time.perf_counter() - middle
        print(
            f"{depth:>5} {len(weight_layers(graph_module)):>7} {sweep.walk.executions:>16} "
            f"{swept:>8.1f} {rerun:>9.1f} {rerun / swept:>6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
