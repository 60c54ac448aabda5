"""Calibration data: denoising runs, samplers, recorded inputs, ranges."""
