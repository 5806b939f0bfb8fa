"""Linears that skip inputs: 16-bit input-major weights, of which only the rows of selected inputs are read."""
