"""Ranges of activations, static and dynamic."""
