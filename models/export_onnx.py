"""Export of NeDR to ONNX files, which run without PyTorch (benchmarks/examples/onnx_dehaze.py).

    python -m models.export_onnx [--weights FILE] [--output DIR] [--fp16] [--int8]

writes ``network.onnx``: small (1,3,h,w), sides multiples of 32 and at least 128 -> transmission (1,1,h,w) and airlight
(1,3,1,1); and ``picture.onnx``: hazy (1,3,H,W) of any size whose sides are above the working size -> clear (1,3,H,W)
and transmission (1,1,H,W), with the resizing and the formula in the graph. Both take images in [0,1].
Needs `pip install -r requirements-extras.txt`.
"""

import argparse
import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models.nedr import airlight, kan
from models.nedr.method import NeDR
from models.pyramid import STRIDE
from utils import errors, files, physics
from utils.errors import UserError

LARGE = 2**16  # weights of a layer from which on it is written in 8 bits
OPSET = 18
NETWORK, PICTURE = "network.onnx", "picture.onnx"


class Transmission(nn.Module):
    """small (1,3,h,w) -> t as the method estimates it at its working size, and the pooled maps (1,P)."""

    def __init__(self, method: NeDR):
        super().__init__()
        self.removal = method.removal

    def forward(self, small: Tensor) -> tuple[Tensor, Tensor]:
        features, pooled = self.removal.pyramid(small)
        return self.removal._transmission(features), pooled


class Airlight(nn.Module):
    """small (1,3,h,w), the pooled maps and t -> A (1,3,1,1)."""

    def __init__(self, method: NeDR):
        super().__init__()
        self.removal, self.kind = method.removal, method.settings.airlight

    def forward(self, small: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        return self.removal.estimate_airlight(small, pooled * 1, t * 1, self.kind)  # * 1 keeps unused inputs


class Resizing(nn.Module):
    """hazy (1,3,H,W) -> small, of the size given by `working_size.network_size`.

    Computed as two matrix products: onnxruntime's own antialiasing differs by 2e-3.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, hazy: Tensor) -> Tensor:
        sides = torch._shape_as_tensor(hazy)[2:].double()
        reduced = (sides * (self.size / sides.min()) / STRIDE).round()
        reduced = torch.minimum(reduced, (sides / STRIDE).floor()) * STRIDE
        rows, columns = _resize_weights(sides[0], reduced[0]), _resize_weights(sides[1], reduced[1])
        return (rows @ hazy @ columns.T).clamp(0, 1)


class Restoration(nn.Module):
    """hazy (1,3,H,W), small, t and A -> the clear image and t at full size."""

    def __init__(self, method: NeDR):
        super().__init__()
        self.method = method

    def forward(self, hazy: Tensor, small: Tensor, t: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        t = self.method.to_full_size(t, small, hazy)
        return physics.restore(hazy, t, A), t


def export(method: NeDR, folder: Path) -> tuple[Path, Path]:
    """Write both graphs into ``folder``. Raises `UserError` for a method that has no working size."""
    onnx = library()
    size = _working_size(method)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    small = torch.rand(1, 3, size, size + STRIDE)
    hazy = torch.rand(1, 3, 2 * size, 2 * size + 40)
    pooled = small.new_zeros(1, method.removal.pyramid.pooled)
    low, high = {2: "h", 3: "w"}, {2: "H", 3: "W"}
    # Traced in parts, since the exporter treats sizes after a resizing as fixed.
    t_part = _trace(onnx, Transmission(method), {"small": (small, low)}, ["t", "pooled"])
    inputs = {"small": (small, low), "pooled": (pooled, {}), "t": (small[:, :1], low)}
    A_part = _trace(onnx, Airlight(method), inputs, ["A"])
    inputs = {"hazy": (hazy, high), "small": (small, low), "t": (small[:, :1], low), "A": (small[:, :, :1, :1], {})}
    restoration = _trace(onnx, Restoration(method), inputs, ["clear", "transmission"])
    resizing = _trace(onnx, Resizing(size), {"hazy": (hazy, high)}, ["small"])
    network = _chain(onnx, [t_part, A_part], ["small"], {"t": [1, 1, "h", "w"], "A": [1, 3, 1, 1]})
    outputs = {"clear": [1, 3, "H", "W"], "transmission": [1, 1, "H", "W"]}
    picture = _chain(onnx, [resizing, t_part, A_part, restoration], ["hazy"], outputs)
    paths = folder / NETWORK, folder / PICTURE
    for model, path in zip((network, picture), paths, strict=True):
        onnx.save(model, str(path))
    return paths


def library() -> Any:
    """The module onnx. Raises `UserError` if it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise UserError("the export needs onnx, not installed; pip install -r requirements-extras.txt") from error
    return onnx


def _working_size(method: Any) -> int:
    if not isinstance(method, NeDR):
        raise UserError(f"{type(method).__name__} cannot be exported; name weights of nedr or d4")
    s = method.settings
    if (
        s.working_size < method.minimum
        or s.working_size % STRIDE
        or s.query != 1
        or s.guided_filter
        or s.balance != "none"
    ):
        raise UserError(
            f"{s.block}: the export needs a working size, a multiple of {STRIDE} from {method.minimum} on, query 1, "
            f"no guided_filter and no balance; name such weights, or train with nedr.working_size=192"
        )
    return s.working_size


def _trace(onnx: Any, module: nn.Module, inputs: dict[str, tuple[Tensor, dict]], outputs: list[str]) -> Any:
    """The module's graph for images of any size: values that depend on it are computed in the graph (`_in_graph`)."""
    examples = tuple(example for example, _ in inputs.values())
    axes = {name: axes for name, (_, axes) in inputs.items()}
    names = {"input_names": list(inputs), "output_names": outputs}
    buffer = io.BytesIO()
    with torch.no_grad(), _in_graph(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants; only values independent of the size are constants here
        options = {"dynamic_axes": axes, "opset_version": OPSET, "dynamo": False}
        torch.onnx.export(module.eval(), examples, buffer, **options, **names)
    return onnx.load_from_string(buffer.getvalue())


@contextlib.contextmanager
def _in_graph(module: nn.Module) -> Iterator[None]:
    """Context in which functions that read a map's size as Python numbers read it from the graph instead."""
    drem = getattr(getattr(module, "removal", None), "drem", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(airlight, "_quantile", _quantile))
        stack.enter_context(mock.patch.object(airlight, "halved", _halved))
        stack.enter_context(mock.patch.object(physics, "dark_channel_airlight", _dark_channel_airlight))
        stack.enter_context(mock.patch.object(kan, "_Activations", _Activations))
        stack.enter_context(mock.patch.object(physics, "_line_mean", _line_mean))
        stack.enter_context(mock.patch.object(torch, "ones_like", lambda x: x * 0 + 1))  # else of a fixed size
        if drem is not None and hasattr(drem, "is_identity") and drem.is_identity():
            stack.enter_context(mock.patch.object(module.removal, "drem", nn.Identity()))
        yield


class _Activations:
    """`kan._Activations` without writing into parts of a map, which tracing does not record."""

    @staticmethod
    def apply(x: Tensor, dtype: torch.dtype) -> Tensor:
        parts = [F.silu(x)]
        for centre in kan.CENTRES:
            u = ((x - centre) / kan.STEP).abs()
            parts.append((2 - u).relu().pow(3) - 4 * (1 - u).relu().pow(3))
        return torch.stack(parts, -2).to(dtype)


def _line_mean(x: Tensor, radius: int, dim: int) -> Tensor:
    size = torch._shape_as_tensor(x)[dim]
    zero = x.narrow(dim, 0, 1).double() * 0
    cumulative = torch.cat([zero, x.double().cumsum(dim)], dim)
    index = torch.arange(size)
    first, last = (index - radius).clamp(min=0), torch.minimum(index + radius + 1, size)
    sums = cumulative.index_select(dim, last) - cumulative.index_select(dim, first)
    count = (last - first).double()
    return (sums / (count.unsqueeze(1) if dim == 2 else count)).to(x.dtype)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    position = share * (torch._shape_as_tensor(ordered)[1:] - 1).double()
    low = position.floor().long()
    fraction = (position - low).to(ordered.dtype)
    high = low + (fraction > 0).long()
    return ordered.index_select(1, low).lerp(ordered.index_select(1, high), fraction)


def _dark_channel_airlight(image: Tensor, cap: float = physics.AIRLIGHT_CAP) -> Tensor:
    dark = physics.dark_channel(image).flatten(1)
    k = (0.001 * torch._shape_as_tensor(dark)[1:].double()).floor().long().clamp(min=1)
    threshold = dark.sort(1, descending=True).values.index_select(1, k - 1)
    bright = (dark >= threshold).unsqueeze(1)
    return image.flatten(2).masked_fill(~bright, 0).amax(2)[..., None, None].clamp(max=cap)


def _halved(x: Tensor) -> Tensor:
    """Half the size, antialiased: with even sides four taps an axis, normalised at the border."""
    channels = int(x.shape[1])
    kernel = torch.tensor([[[[a * b / 64 for b in (1, 3, 3, 1)] for a in (1, 3, 3, 1)]]] * channels)  # a constant
    options = {"stride": 2, "padding": 1, "groups": channels}
    return F.conv2d(x, kernel, **options) / F.conv2d(torch.ones_like(x), kernel, **options)


def _chain(onnx: Any, parts: list, inputs: list[str], outputs: dict[str, list]) -> Any:
    """One graph of ``parts``, whose inputs and outputs of equal names are connected; all of one opset and dtype."""
    nodes, weights = [], []
    for number, part in enumerate(parts):
        graph = onnx.ModelProto.FromString(part.SerializeToString()).graph
        public = {each.name for each in (*graph.input, *graph.output)}

        def unique(name: str, number: int = number, public: set[str] = public) -> str:
            return name if not name or name in public else f"p{number}/{name}"

        for weight in graph.initializer:
            weight.name = unique(weight.name)
        for node in graph.node:
            node.name = f"p{number}/{node.name or node.output[0]}"
            node.input[:] = map(unique, node.input)
            node.output[:] = map(unique, node.output)
        nodes += graph.node
        weights += graph.initializer
    dtype = onnx.TensorProto.FLOAT
    sides = {"hazy": ["H", "W"], "small": ["h", "w"]}
    input_infos = [onnx.helper.make_tensor_value_info(name, dtype, [1, 3, *sides[name]]) for name in inputs]
    output_infos = [onnx.helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()]
    graph = onnx.helper.make_graph(nodes, "nedr", input_infos, output_infos, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _resize_weights(size: Tensor, reduced: Tensor) -> Tensor:
    """(reduced, size): the weights of antialiased bilinear interpolation along one side."""
    ratio = size / reduced
    centres = (torch.arange(reduced.long()) + 0.5) * ratio
    weights = (1 - ((torch.arange(size.long()) + 0.5) - centres.unsqueeze(1)).abs() / ratio).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE", help="of nedr or d4; by default the shipped ones")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("onnx"), help="folder to write to (onnx)")
    parser.add_argument("--fp16", action="store_true", help="also write half-precision weights: half the size")
    parser.add_argument("--int8", action="store_true", help="also write 8-bit weights: a third of the size")
    args = parser.parse_args(argv)
    method = models.load(args.weights)
    for path in export(method, args.output):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        for kind in filter(lambda kind: getattr(args, kind), ("fp16", "int8")):
            compressed = compress(path, kind)
            print(f"{compressed}: {compressed.stat().st_size / 1e6:.1f} MB")


def compress(path: Path, kind: str) -> Path:
    """Write a graph beside ``path`` whose large weights are stored as ``fp16`` or ``int8``; it computes in float32.

    int8: one scale per row of a weight, which in nearly all of them is an output channel. Layers with few weights
    make up little of the file and are the ones that lose by it; they stay in half precision.
    """
    onnx = library()
    model = onnx.load(str(path))
    weights, nodes = [], []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < 1024:
            weights.append(weight)
        elif kind == "int8" and values.ndim > 1 and values.size >= LARGE:
            scale = np.abs(values).reshape(len(values), -1).max(1).clip(1e-12) / 127
            integers = (values / scale.reshape(-1, *[1] * (values.ndim - 1))).round().astype(np.int8)
            names = [f"{weight.name}/{part}" for part in ("int8", "scale")]
            weights += map(onnx.numpy_helper.from_array, (integers, scale.astype(np.float32)), names)
            nodes.append(onnx.helper.make_node("DequantizeLinear", names, [weight.name], axis=0))
        else:
            weights.append(onnx.numpy_helper.from_array(values.astype(np.float16), f"{weight.name}/half"))
            cast = onnx.helper.make_node("Cast", [f"{weight.name}/half"], [weight.name], to=onnx.TensorProto.FLOAT)
            nodes.append(cast)
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(weights)
    model.graph.node.extend(nodes)
    target = path.with_name(f"{path.stem}_{kind}.onnx")
    onnx.save(model, str(target))
    return target


if __name__ == "__main__":
    errors.run(main)
