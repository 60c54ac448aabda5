"""What models call the argument that tells them how much noise is in each sample."""

__all__ = ["NOISE_NAMES", "TIMESTEP_NAMES"]

TIMESTEP_NAMES = frozenset({"t", "timestep", "timesteps", "timestep_ratio"})
"""What diffusers models call the argument that tells them the noise level."""

NOISE_NAMES = frozenset(
    {
        "sigma", "sigmas", "noise_level", "noise_levels", "noise_label", "noise_labels", "c_noise",
        "log_snr", "logsnr", "log_sigma", "time", "times",
    }
)  # fmt: skip
"""What other models call it; a number stays a single one (0-d), as the model's own code has it."""
