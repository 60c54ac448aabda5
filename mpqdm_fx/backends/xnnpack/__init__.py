"""ExecuTorch with XNNPACK: a rounded graph becomes a `.pte` for phone CPUs, executed once."""
