"""Automatic against fixed propagation strength, layer by layer, on held-out calls.

    python benchmarks/strength.py --weights 3 --seeds 0 1 2

At every layer of one sweep of the bundled model, the layer is solved with `propagation="auto"` and
with 0.5 on the same rows; what "auto" chose is installed, so both meet the same quantized prefix.
Printed: on how many layers the automatic strength has the lower (or equal) validation error, of all
that some error reaches, and the geometric mean of the ratio.
"""

import argparse
import dataclasses
import logging
import math
import statistics

import torch

from mpqdm_fx import MPQConfig, prepare
from mpqdm_fx.bits.allocate import layer_limits
from mpqdm_fx.graph.layers import WeightLayer
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.sources.sources import load_source
from mpqdm_fx.sweep.problem import LayerData
from mpqdm_fx.sweep.solve import LayerSolution, solve_layer
from mpqdm_fx.sweep.sweep import Sweep


class Comparison(Sweep):
    """A sweep that also solves every layer with a fixed strength."""

    pairs: list[tuple[str, float, float]]

    def _solve_with(self, layer: WeightLayer, data: LayerData) -> LayerSolution:
        chosen = super()._solve_with(layer, data)
        if data.train.shift is not None:
            fixed = dataclasses.replace(self.settings, propagation=0.5)
            fixed_solution = solve_layer(layer.module, chosen.plan, data, fixed)
            self.pairs.append((layer.name, chosen.error, fixed_solution.error))
        return chosen


def compare(weights: int, seed: int) -> list[tuple[str, float, float]]:
    """Validation errors of every layer: automatic, fixed."""
    source = load_source("digits")
    calibration = calibration_of(source, trajectories=16, steps=20, seed=seed)
    settings = MPQConfig(
        weight_bits=weights,
        activation_mode="float",
        allocation="uniform",
        levels="uniform",
        refinements=0,
        row_weights="plain",
        judge=False,
        seed=seed,
    )
    prepared = prepare(source.model, settings, next(iter(calibration)))
    for call in calibration:
        prepared.record(**call)
    graph_module = prepared.graph_module
    sweep = Comparison(
        graph_module,
        list(prepared.records),
        settings,
        limits=layer_limits(graph_module, settings),
        validation=list(calibration.held_out_calls),
    )
    sweep.pairs = []
    sweep.run()
    return sweep.pairs


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        pairs = compare(arguments.weights, seed)
        better = sum(chosen <= fixed for _, chosen, fixed in pairs)
        ratio = statistics.mean(math.log(chosen / fixed) for _, chosen, fixed in pairs)
        worst = max(pairs, key=lambda pair: pair[1] / pair[2])
        print(
            f"W{arguments.weights} seed {seed}: auto at most fixed 0.5 on {better} of {len(pairs)} "
            f"layers ({better / len(pairs):.0%}); error ratio {math.exp(ratio):.3f}; worst "
            f"{worst[0]} {worst[1] / worst[2]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
