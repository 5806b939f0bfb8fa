"""Linears that skip inputs, with int4 weights: dense or group-sparse along the outputs of an input-major weight."""
