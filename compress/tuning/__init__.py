"""Optimization after the passes: block by block against the dense block, then end to end against the dense model."""
