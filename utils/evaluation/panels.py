"""Images that explain figures: hazy | dehazed | clear | transmission | error, for the best, median and worst."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.evaluation.scoring import Score
from utils.rounding import to_8bit

ERROR_SCALE = 0.25  # the mean absolute error over RGB, in [0,1], that is shown in white
LONG_SIDE = 480  # pixels of each part
CAPTION = 24  # pixels above each part
GAP = 4
RANKS = ("best", "median", "worst", "first", "middle", "last")


def choose(scores: Sequence[Score], key: str | None, better: str = "higher") -> dict[str, Score]:
    """The best, the median and the worst by figure ``key``, without duplicates; only scores with a finite figure count.

    Without a key, or without a finite figure: the first, the middle and the last.
    """
    ranked = [score for score in scores if key in score.figures and math.isfinite(score.figures[key])]
    ranked.sort(key=lambda score: score.figures[key], reverse=better == "higher")
    names = RANKS[:3] if ranked else RANKS[3:]
    ranked = ranked or list(scores)
    chosen: dict[str, Score] = {}
    for name, index in zip(names, (0, len(ranked) // 2, -1), strict=True):
        if ranked and ranked[index] not in chosen.values():
            chosen[name] = ranked[index]
    return chosen


def parts(
    hazy: Tensor, outputs: Mapping[str, Tensor], clear: Tensor | None, score: Score | None = None
) -> dict[str, Tensor]:
    """Images, (3 or 1,H,W) in [0,1], by caption; ``outputs`` as of `Method.estimate`, without the batch dimension."""
    shown = {"hazy": hazy, _caption(score): outputs["clear"]}
    if clear is not None:
        shown["clear"] = clear
    if "transmission" in outputs:
        shown["transmission (white: 1)"] = outputs["transmission"]
    if clear is not None:
        shown[f"error (white: {ERROR_SCALE} or more)"] = error_map(outputs["clear"], clear)
    return shown


def panel(shown: Mapping[str, Tensor]) -> Tensor:
    """The parts side by side, scaled to at most 480 pixels, each under its caption. -> (3,H,W) in [0,1]."""
    pieces = [_shrink(image) for image in shown.values()]
    height = max(piece.height for piece in pieces) + CAPTION
    width = sum(piece.width for piece in pieces) + GAP * (len(pieces) - 1)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    left = 0
    for caption, piece in zip(shown, pieces, strict=True):
        draw.text((left + 2, 3), _fit(caption, piece.width, font), "black", font)
        canvas.paste(piece, (left, CAPTION))
        left += piece.width + GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


def error_map(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error over RGB, from black by red and yellow to white at `ERROR_SCALE`. (3,H,W) -> (3,H,W)."""
    x = 3 * (a - b).abs().mean(0) / ERROR_SCALE
    return torch.stack([x, x - 1, x - 2]).clamp(0, 1)


def _caption(score: Score | None) -> str:
    """``dehazed``, with the first PSNR and SSIM of the score, and their protocol."""
    figures = score.figures if score else {}
    protocol = next((key.removesuffix(".psnr") for key in figures if key.endswith(".psnr")), None)
    if protocol is None:
        return "dehazed"
    return f"dehazed: {figures[f'{protocol}.psnr']:.2f} dB / {figures[f'{protocol}.ssim']:.4f} ({protocol})"


def _shrink(tensor: Tensor) -> Image.Image:
    image = Image.fromarray(to_8bit(tensor.expand(3, -1, -1)))
    scale = LONG_SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def _fit(caption: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The start of the caption that fits into ``width`` pixels."""
    while caption and font.getlength(caption) > width - 2:
        caption = caption[:-1]
    return caption
