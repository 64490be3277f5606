"""AKNet, a supervised network with large kernels and frequency gates, of OKNet's family."""

from models.aknet.method import AKNet

__all__ = ["AKNet"]
