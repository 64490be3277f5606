"""NeDR (arXiv 2511.13110) and D4 (CVPR 2022), which is NeDR with its three modules off."""

from models.nedr.d4 import D4
from models.nedr.method import NeDR
