"""A quantized model: what it is, how it is assembled, stored and loaded."""
