"""KA-Net (Feng et al., TPAMI 2024)."""

from models.kanet.method import KANet
