"""Train what a quantized graph may still choose, against the float model it came from."""
