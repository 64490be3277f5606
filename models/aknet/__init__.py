"""AKNet, a supervised network with large kernels and frequency gates, derived from OKNet."""

from models.aknet.method import AKNet
