"""The authors' released files: inspect one, convert it to this project's format, or export weights in the authors'.

    python -m models.official inspect FILE
    python -m models.official import FILE --output weights.safetensors
    python -m models.official export checkpoints/mine/weights.safetensors --output released.pth

Formats are recognised by their keys, whatever the file's name; wrappers and DataParallel's prefix are stripped, and
nothing in a file is ever executed. For an unsuitable file the error lists some of its keys, and nothing is written.
train.py (train.init) and test.py (--weights) accept released files directly.
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import models
from utils import checkpoint, config, errors, files
from utils.errors import UserError

SHOWN = 3  # names of unused tensors


def main(arguments: list[str] | None = None) -> int:
    """Run the command; ``arguments`` as on the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m models.official", description=__doc__, formatter_class=style)
    parser.add_argument("verb", choices=("inspect", "import", "export"))
    parser.add_argument("file", type=Path, metavar="FILE", help="a released file, or one of this project")
    parser.add_argument("--output", type=Path, metavar="FILE", help="what to write; folders are made")
    options = parser.parse_args(arguments)
    if (options.output is None) != (options.verb == "inspect"):
        remedy = "writes nothing; leave --output out" if options.output else "give --output FILE"
        raise UserError(f"{options.verb}: {remedy}")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        warnings.simplefilter("always", UserWarning)
        return {"inspect": inspect, "import": import_file, "export": export_file}[options.verb](options)


def inspect(options: argparse.Namespace) -> int:
    """Print the contents of the file."""
    print("\n".join(describe(options.file, models.load(options.file))))
    return 0


def import_file(options: argparse.Namespace) -> int:
    """Write a released file in this project's format, with all its networks."""
    method, output = models.load(options.file), options.output
    if method.skipped is None:
        raise UserError(f"{options.file}: is in this project's format already; copy it, or name a released file")
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: imported weights are written as .safetensors; use that suffix")
    name = models.name_of(method)
    settings = dataclasses.replace(config.load(name, models.settings_types()), method=method.settings)
    origin = {"official": options.file.name, "sha256": files.sha256(options.file)}
    metadata = {"model": name, "settings": config.to_dict(settings)} | origin
    checkpoint.save_weights(output, method.state_dict(), metadata)
    print("\n".join([*describe(options.file, method), f"written to {output}"]))
    return 0


def export_file(options: argparse.Namespace) -> int:
    """Write weights in the format that the authors' code loads."""
    method, output = models.load(options.file), options.output
    state = method.to_official()
    checkpoint.write(output, state)
    print("\n".join([*describe(options.file, method), f"written to {output}, in the authors' format"]))
    return 0


def describe(path: Path, method: models.Method) -> Iterator[str]:
    """Lines about a file: its format, networks and settings, and the tensors without use."""
    name = models.name_of(method)
    owner = "this project's" if method.skipped is None else "its authors'"
    yield f"{path}: {name}, in {owner} format"
    for child, network in method.named_children():
        yield f"  {child}: {sum(p.numel() for p in network.parameters()):,} parameters"
    defaults = config.load(name, models.settings_types()).method
    settings = {key: value for key, value in vars(method.settings).items() if value != getattr(defaults, key)}
    settings |= {key: getattr(method.settings, key) for key in method.test_time}
    yield f"  settings: {', '.join(f'{key}={json.dumps(value)}' for key, value in settings.items())}"
    if method.skipped:
        more = f", ... ({len(method.skipped)} in all)" if len(method.skipped) > SHOWN else ""
        yield f"  left out, since the authors' code never uses it: {', '.join(method.skipped[:SHOWN])}{more}"


if __name__ == "__main__":
    errors.run(main)
