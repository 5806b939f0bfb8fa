"""Measuring models: perplexity today; every number states how it was made."""
