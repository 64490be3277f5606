"""Dehaze an image by the exported graph, without PyTorch: python onnx_dehaze.py picture.onnx HAZY CLEAR.

Needs only onnxruntime, numpy and pillow; the graph is written by `python -m models.export_onnx`.
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(graph: str, hazy: str, clear: str) -> None:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(hazy)).convert("RGB"), np.float32) / 255
    image, _ = session.run(["clear", "transmission"], {"hazy": pixels.transpose(2, 0, 1)[None]})
    Image.fromarray((image[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(clear)


if __name__ == "__main__":
    main(*sys.argv[1:])
