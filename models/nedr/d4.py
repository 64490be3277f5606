"""D4 (Yang et al., CVPR 2022): NeDR with its three modules off."""

from dataclasses import dataclass

from models.method import About
from models.nedr.method import NeDR
from models.nedr.settings import NeDRSettings
from utils.errors import UserError


@dataclass
class D4Settings(NeDRSettings):
    block = "d4"

    def __post_init__(self):
        super().__post_init__()
        for module in ("kan_cid", "idrm", "drem"):
            if getattr(self, module):
                raise UserError(
                    f"d4.{module}=true: D4 is NeDR without its modules; use --model nedr nedr.{module}=true"
                )


class D4(NeDR):
    """Self-augmented unpaired dehazing by density and depth decomposition, with its released settings."""

    about = About(
        "Self-Augmented Unpaired Image Dehazing via Density and Depth Decomposition",
        "Yang, Wang, Liu, Zhang, Guo and Tao, CVPR 2022",
        "unpaired hazy and clear images; optionally a supervised warm start",
    )
    Settings = D4Settings
