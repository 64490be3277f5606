"""Warnings about trivial solutions of adversarial training, recognised in the logged figures."""

from collections.abc import Iterator, Mapping

DURATION = 300  # steps; shorter dips are noise of a few batches
FLAT = 0.03  # deviation of t within an image; in haze with depth it is 0.1 to 0.2
PERFECT = 0.01  # a discriminator's loss; at chance it is 0.25 (lsgan), 1.4 (vanilla), 2 (hinge)
WARNINGS = {  # figure -> its lower bound, and the warning if it stays below
    "t_deviation": (
        FLAT,
        "t has been flat within the images for {} steps: the cycles treat the haze as uniform, and only its level "
        "still changes. Try {block}.dark_channel_energy_weight above 0, a warm start with warm_start.replay=true, or "
        "a lower {block}.learning_rate",
    ),
    "discriminator_clear": (
        PERFECT,
        "the discriminator of clear images has had hardly any loss for {} steps: it separates dehazed from clear "
        "images perfectly and gives the generators no useful gradient. Try a lower {block}.discriminator_rate, or hazy "
        "and clear images of similar scenes",
    ),
    "discriminator_hazy": (
        PERFECT,
        "the discriminator of hazy images has had hardly any loss for {} steps: it separates synthetic from real haze "
        "perfectly and gives the generators no useful gradient. Try a lower {block}.discriminator_rate, or a "
        "{block}.density_range and {block}.airlight_range that suit data.hazy",
    ),
}


class Watch:
    """Follows the figures of the training whose settings are in ``block``; a resumed run starts counting again."""

    def __init__(self, block: str):
        self.block = block
        self.since: dict[str, int] = {}  # figure -> the step at which it fell below its bound

    def warnings(self, step: int, figures: Mapping[str, float]) -> Iterator[str]:
        """A warning for each figure that has been below its bound for `DURATION` steps; its text is always the same."""
        for name, (bound, message) in WARNINGS.items():
            if figures.get(name, bound) >= bound:
                self.since.pop(name, None)
            elif step - self.since.setdefault(name, step) >= DURATION:
                yield message.format(f"{DURATION} or more", block=self.block)
