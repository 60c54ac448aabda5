"""Compile diffusion UNets into extremely low-bit, mixed-precision programs for phone CPUs."""
