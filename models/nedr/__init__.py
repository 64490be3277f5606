"""NeDR (arXiv 2511.13110); with its three modules off it is D4 (CVPR 2022)."""

from models.nedr.method import NeDR

__all__ = ["NeDR"]
