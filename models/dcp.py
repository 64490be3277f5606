"""The dark channel prior (He, Sun, Tang, TPAMI 2011): the floor that every method must beat."""

from dataclasses import dataclass

from torch import Tensor

from models.method import Method
from utils import physics


@dataclass
class DCPSettings:
    guided_filter: bool


class DCP(Method):
    """Dehazing without weights, with the constants of D4's code (airlight capped at 220/255, guided-filter refined)."""

    Settings = DCPSettings
    test_time = ("guided_filter",)

    def restore(self, hazy: Tensor) -> Tensor:
        airlight = physics.dark_channel_airlight(hazy)
        t = physics.dark_channel_transmission(hazy, airlight)
        if self.settings.guided_filter:
            t = physics.guided_filter(hazy, t)
        # D4's code does not clamp t, and the filter may carry it below 0; only a division by 0 is prevented here.
        return physics.restore(hazy, t.where(t.abs() > 1e-6, 1e-6), airlight)
