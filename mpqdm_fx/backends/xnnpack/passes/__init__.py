"""Passes that only XNNPACK needs."""
