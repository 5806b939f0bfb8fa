"""Compressed checkpoints for engines that do not know halfweight, and differences between two checkpoints."""
