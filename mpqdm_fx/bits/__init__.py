"""What decides widths and kinds: sensitivities, rounding errors, costs of inputs, limits."""
