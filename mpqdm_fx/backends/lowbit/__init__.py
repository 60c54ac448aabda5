"""Programs on weights of their own widths: the weight blob, and the operators that read it."""
