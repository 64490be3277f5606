"""The metadata that a dehazed image keeps from its source: the colour profile and the EXIF data."""

from collections.abc import Sequence
from pathlib import Path

from PIL import ExifTags, Image

# EXIF tags on storage and orientation of the source file; the new file is stored differently and is upright.
STORAGE = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 280, 281, 284, 290, 291, 292, 293, 297, 301}
    | {317, 318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340, 341, 347, 513, 514, 529}
    | {530, 531, 532, 700, 33723, 34377, 34675, 37724}
)


def metadata(path: str | Path, size: Sequence[int]) -> dict[str, bytes]:
    """Options for Pillow's save, for an image of ``size`` (H, W) made from ``path``: ``icc_profile``, ``exif``.

    The profile is kept only if it is an RGB one, since the output is RGB. Metadata that cannot be read is left out.
    """
    kept = {}
    try:
        with Image.open(path) as image:
            profile = image.info.get("icc_profile") or b""
            if profile[16:20] == b"RGB " and image.mode not in ("CMYK", "LAB"):
                kept["icc_profile"] = profile
            exif = _exif(image, size)
            if exif:
                kept["exif"] = exif
    except Exception:  # on broken EXIF blocks Pillow raises nearly any kind
        pass
    return kept


def _exif(image: Image.Image, size: Sequence[int]) -> bytes:
    """The EXIF data without the tags in `STORAGE` and without the thumbnail, which would show the source image."""
    exif = image.getexif()
    for tag in STORAGE & set(exif):
        del exif[tag]
    details = exif.get_ifd(ExifTags.IFD.Exif) if ExifTags.IFD.Exif in exif else {}
    for tag, side in ((ExifTags.Base.ExifImageHeight, size[0]), (ExifTags.Base.ExifImageWidth, size[1])):
        if tag in details:
            details[tag] = side
    return exif.tobytes() if len(exif) else b""
