"""The dark channel prior (He, Sun, Tang, TPAMI 2011), the baseline without training."""

from dataclasses import dataclass

from torch import Tensor

from models.method import About, Method
from utils import physics, tiling


@dataclass
class DCPSettings:
    guided_filter: bool


class DCP(Method):
    """Dehazing without weights, with the constants of D4's code (airlight capped at 220/255, guided-filter refined)."""

    about = About("Dark channel prior", "He, Sun and Tang, TPAMI 2011; guided filter: TPAMI 2013", "nothing")
    Settings = DCPSettings
    test_time = ("guided_filter",)

    def predict(self, hazy: Tensor, tile: int | None = None) -> dict[str, Tensor]:
        A = physics.dark_channel_airlight(hazy)

        def transmission(piece: Tensor, _: tiling.Window) -> Tensor:
            return physics.dark_channel_transmission(piece, A)

        def restore(piece: Tensor, window: tiling.Window) -> Tensor:
            return physics.restore(piece, window.cut(t), A)

        t = tiling.apply(transmission, hazy, tile=tile, halo=physics.DARK_CHANNEL_SIZE // 2)
        if self.settings.guided_filter:
            t = physics.guided_filter(hazy, t, tile=tile)
        t = t.clamp(physics.LEAST_TRANSMISSION, 1)  # the filter overshoots
        return {"clear": tiling.apply(restore, hazy, tile=tile), "transmission": t, "airlight": A}
