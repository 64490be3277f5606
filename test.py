"""Score a method on pictures with ground truth, or dehaze pictures without.

Score an experiment on the pictures that its config.yml names (test.hazy, test.clear):
    python test.py --model nedr --checkpoints checkpoints/test_example
Dehaze a folder, a .flist or one picture:
    python test.py --checkpoints checkpoints/test_example --hazy photos --output dehazed
The authors' released weights, with the airlight and filter that suit the pictures:
    python test.py --weights FILE --hazy HAZY --clear CLEAR nedr.airlight=dark_channel nedr.guided_filter=true
A method without weights, on the embedded samples:
    python test.py --model dcp --hazy sample:test/hazy --clear sample:test/clear

Settings are those of configs.yml, DIR/config.yml and the command line, later ones winning.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

import models
from data import datasets, images
from models import Method
from utils import config, device, errors, report, scoring
from utils.errors import UserError

WEIGHTS = ("best.pt", "last.pt", "weights.safetensors")  # looked for in this order


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` as on the command line. Returns 0, or 2 if some pictures could not be used."""
    args = parse(argv)
    if args.list_models:
        print("\n".join(models.names()))
        return 0
    folder, files, overrides = sources(args)
    types = models.settings_types()
    settings = config.load(args.model or models.names()[0], types, files, overrides)
    place = device.pick(settings.device)
    device.autocast(place, settings.precision)  # refused here rather than at the first picture
    items, output = find(settings.test), Path(settings.test.output or (folder or Path()) / "results")

    method, weights = load(args.model, folder, settings, files, overrides)
    name = models.name_of(method)
    method.to(place).eval()

    def dehaze(hazy):
        with device.autocast(place, settings.precision):
            return method.dehaze(hazy)

    skipped: list[str] = []
    score = score_all if settings.test.clear else dehaze_all
    ...


if __name__ == "__main__":
    errors.run(main)
