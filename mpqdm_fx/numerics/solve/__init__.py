"""Rounding one layer: statistics, scales, GPTQ, refinement, propagation."""
