"""The same numbers at every rung: float model, quantized graphs, edge program, `.pte`."""
