"""The working size: at what size a network sees an image of which it needs the whole view, not every pixel."""

from models.pyramid import STRIDE


def seen_size(height: int, width: int, working_size: int) -> tuple[int, int] | None:
    """(h,w) at which an image of (height,width) is seen if its short side is to have ``working_size`` pixels.

    Sides are rounded to multiples of 32 and never larger than the picture's; a side under 32 stays as it is (the caller
    pads it). None: as it is, since ``working_size`` is 0 or nothing would become smaller.
    """
    scale = working_size / min(height, width)
    if not 0 < scale < 1:
        return None
    return _rounded(height, scale), _rounded(width, scale)


def _rounded(side: int, scale: float) -> int:
    largest = side // STRIDE * STRIDE
    if not largest:
        return side
    return min(max(STRIDE, round(side * scale / STRIDE) * STRIDE), largest)
