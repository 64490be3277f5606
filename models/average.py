"""The mean of several files of weights of one network (Wortsman et al., "Model soups", ICML 2022).

    python -m models.average A.safetensors B.safetensors C.safetensors --output weights.safetensors

Runs that go on from the same weights (train.init) with other seeds, rates or images stay so near to each other that the
mean of what they learned is often better than each; of runs that began apart it is worth nothing. Score the result.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import models
from utils import checkpoint, errors
from utils.errors import UserError
from utils.evaluation import selection


def average(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The mean of the weights that dehaze in ``files``, and metadata: the settings are those of the first file.

    All images that any of them was chosen on are recorded. Raises `UserError` for files of different networks.
    """
    method, *others = (models.load(file) for file in files)
    mean = {name: value.double() / len(files) for name, value in method.inference_state().items()}
    for file, other in zip(files[1:], others, strict=True):
        if type(other) is not type(method):
            raise UserError(f"{file} holds a {models.name_of(other)} model, {files[0]} a {models.name_of(method)} one")
        checkpoint.load_strict(method, other.inference_state(), f"{file}, beside {files[0]},")
        for name, value in other.inference_state().items():
            mean[name] += value.double() / len(files)
    weights = {name: mean[name].to(value.dtype) for name, value in method.inference_state().items()}
    contents = [checkpoint.read_metadata(file) for file in files]
    chosen = [content["chosen_on"] for content in contents if content.get("chosen_on")]
    merged = chosen and selection.chosen_on(
        sorted({name for each in chosen for name in each["sets"]}),
        max(each["pictures"] for each in chosen),
        [truth for each in chosen for truth in each["truths"]],
    )
    return weights, contents[0] | {"chosen_on": merged or None, "mean_of": [str(file) for file in files]}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; ``arguments`` as on the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m models.average", description=__doc__, formatter_class=style)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="weights.safetensors of several runs")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="what to write")
    parser.add_argument("--float16", action="store_true", help="matrices in half precision: half the size")
    options = parser.parse_args(arguments)
    for file in [*options.files, options.output]:
        if file.suffix != ".safetensors":
            raise UserError(f"{file}: name .safetensors files, as train.py exports them")
    weights, metadata = average(options.files)
    kind = "float16" if options.float16 else "float32"
    checkpoint.save_weights(options.output, checkpoint.cast_matrices(weights, kind), metadata)
    print(f"the mean of {len(options.files)} files in {options.output}; score it before you use it")


if __name__ == "__main__":
    errors.run(main)
