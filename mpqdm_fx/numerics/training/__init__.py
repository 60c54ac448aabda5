"""Rounding that gradients pass through."""
