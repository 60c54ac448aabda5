"""Sets of levels: uniform, codebook, four-bit; and their packing."""
