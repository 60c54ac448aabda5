"""Budgets of bits: OMQ, curves of error, choices under a limit."""
