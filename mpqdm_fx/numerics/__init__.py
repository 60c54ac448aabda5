"""Mathematics of quantization: tensors in, tensors out, and no import but torch."""
