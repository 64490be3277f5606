"""Comparisons that need more than one training run."""
