"""Measurements: signal-to-noise ratios, Frechet distance, class accuracy, tables, image grids."""
