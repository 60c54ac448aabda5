"""Passes that quantize: weights, activations, scaled inputs, the lane that carries errors."""
