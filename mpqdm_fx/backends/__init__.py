"""Spokes: torch.ao quantized operators, ExecuTorch/XNNPACK programs, packed files."""
