"""The working size: the reduced size at which a network processes an image if it needs the view, not every pixel."""

from models.pyramid import STRIDE


def network_size(height: int, width: int, working_size: int) -> tuple[int, int] | None:
    """(h,w) of the reduced image for one of (height,width) if its short side is to have ``working_size`` pixels.

    Sides are rounded to multiples of 32 and never larger than the image's; a side under 32 is kept (the caller pads
    it). None: the image is not reduced, since ``working_size`` is 0 or not smaller than its short side.
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
