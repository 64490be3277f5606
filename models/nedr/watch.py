"""The trivial answers of adversarial training, recognised in the figures of the log."""

from collections.abc import Iterator, Mapping

LASTING = 300  # steps after which it is no mood of a few batches
FLAT = 0.03  # of the deviation of t within an image; in haze with depth it is 0.1 to 0.2
BEATEN = 0.01  # of a discriminator's loss; at chance it is 0.25 (lsgan), 1.4 (vanilla), 2 (hinge)
WHY = {
    "t_deviation": (
        FLAT,
        "t has been flat within the images for {} steps: the cycles see the haze as one veil, and only its level still "
        "moves. Try {block}.dark_channel_energy_weight above 0, a warm start with warm_start.replay=true, or a "
        "lower {block}.learning_rate",
    ),
    "discriminator_clear": (
        BEATEN,
        "the discriminator of clear images has had hardly any loss for {} steps: it tells what is dehazed from what "
        "is clear at a glance, and teaches nothing. Try a lower {block}.discriminator_rate, or pools of like scenes",
    ),
    "discriminator_hazy": (
        BEATEN,
        "the discriminator of hazy images has had hardly any loss for {} steps: it tells what is made from what is "
        "hazy at a glance, and teaches nothing. Try a lower {block}.discriminator_rate, or a {block}.density_range and "
        "{block}.airlight_range that suit data.hazy",
    ),
}


class Watch:
    """Follows the figures of a game whose settings are in ``block``; a resumed run begins to look anew."""

    def __init__(self, block: str):
        self.block, self.since = block, {}

    def remarks(self, step: int, figures: Mapping[str, float]) -> Iterator[str]:
        """What has stood at a trivial answer in every look for so many steps; always the same line for the same."""
        for name, (least, told) in WHY.items():
            if figures.get(name, least) >= least:
                self.since.pop(name, None)
            elif step - self.since.setdefault(name, step) >= LASTING:
                yield told.format(f"{LASTING} or more", block=self.block)
