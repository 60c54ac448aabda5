"""Calibration data: denoising trajectories, recorded inputs, statistics of every weight layer."""
