"""Quantize the bundled UNet in Python: calibrate, convert, look, save, load.

python examples/quantize_digits.py
"""

import tempfile

import torch

import mpqdm_fx
from mpqdm_fx.digits.bundled import load_digits_scheduler, load_digits_unet

model = load_digits_unet()
scheduler = load_digits_scheduler()
calibration = mpqdm_fx.Trajectories(
    model,
    scheduler,
    num_trajectories=4,
    num_inference_steps=10,
    batch_size=20,
    seed=0,
    conditions={"class_labels": torch.tensor([0, 3, 5, 8])},
    held_out=1,  # of the 4 runs, to judge and not to fit to
)
config = mpqdm_fx.MPQConfig(
    weight_bits=3, overrides=[{"pattern": "mid_block.attentions.*", "weight_bits": 6}]
)
quantized = mpqdm_fx.quantize(model, config, calibration)

sample = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
labels = torch.tensor([2, 7])
expected = model(sample, 500, class_labels=labels).sample
actual = quantized(sample, 500, class_labels=labels).sample
error = (expected - actual).square().mean().sqrt() / expected.square().mean().sqrt()
print(f"{quantized.plan.effective_bits:.2f} effective bits, relative error {error:.3f}")

worst = min(
    (layer for layer in quantized.report.layers if layer.sqnr_db is not None),
    key=lambda layer: layer.sqnr_db,
)
print(f"worst layer: {worst.name}, {worst.sqnr_db:.1f} dB at {worst.mean_bits:.1f} bits")

with tempfile.TemporaryDirectory() as folder:
    mpqdm_fx.save(quantized, f"{folder}/digits")
    again = mpqdm_fx.load(f"{folder}/digits")
same = torch.equal(again(sample, 500, class_labels=labels).sample, actual)
print(f"loaded model gives the same numbers: {same}")
