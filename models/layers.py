"""Faster replacements of PyTorch's layers, mainly on CPUs, with the same results and names of weights.

All work in any memory format and are fastest in channels_last, in which the networks run (`channels_last`): there the
convolutions of oneDNN and cuDNN need no reordering. docs/performance.md lists the gain of each.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, pad_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.batchnorm import track

WIDE = 2**18  # number of values from which `_Reflect` is used for a map


def channels_last(x: Tensor) -> Tensor:
    """``x`` (N,C,H,W) with the channels of a pixel next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def single(x: Tensor) -> Tensor:
    """``x`` in at least single precision: half precision becomes float32, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def reflect(x: Tensor, pad: int) -> Tensor:
    """Reflection padding by ``pad`` on all sides, in the dtype of ``x``: (N,C,H,W) -> (N,C,H+2pad,W+2pad).

    Autocast would convert to float32: twice the memory traffic for a mere copy.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = x.device.type == "cpu" and x.numel() >= WIDE
        if wide or torch.are_deterministic_algorithms_enabled():
            return _Reflect.apply(x, pad)
        return F.pad(x, (pad,) * 4, mode="reflect")


class _Reflect(torch.autograd.Function):
    """PyTorch's padding with a gradient 3 to 7 times as fast as PyTorch's, which works pixel by pixel.

    On a GPU PyTorch's gradient sums in an undefined order; this one is deterministic.
    """

    @staticmethod
    def forward(ctx, x: Tensor, pad: int) -> Tensor:
        ctx.pad = pad
        return F.pad(x, (pad,) * 4, mode="reflect")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        p = ctx.pad
        height, width = (size - 2 * p for size in grad.shape[2:])
        inside = grad[:, :, p : p + height, p : p + width]
        total = inside.clone(memory_format=torch.channels_last)  # a copy: ``grad`` must not be changed in place
        for to_rows, rows in _margins(height, p):  # add each margin to the pixels that it mirrors
            total[:, :, to_rows] += grad[:, :, rows, p : p + width].flip(2)
            for to_columns, columns in _margins(width, p):
                total[:, :, to_rows, to_columns] += grad[:, :, rows, columns].flip(2, 3)
        for to_columns, columns in _margins(width, p):
            total[:, :, :, to_columns] += grad[:, :, p : p + height, columns].flip(3)
        return total, None


def _margins(size: int, pad: int) -> list[tuple[slice, slice]]:
    """The two margins of an axis of ``size`` pixels: the pixels that each mirrors, and its slice of the padded map."""
    return [
        (slice(1, pad + 1), slice(0, pad)),
        (slice(size - pad - 1, size - 1), slice(pad + size, size + 2 * pad)),
    ]


def recomputed(f: Callable) -> Callable:
    """``f`` with gradient checkpointing: its activations are recomputed in the backward pass. No batch norm in it."""
    return functools.partial(checkpoint, f, use_reentrant=False) if torch.is_grad_enabled() else f


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution as a matrix product: (N,C,H,W), ``weight`` (out,C) or (out,C,1,1) -> (N,out,H,W).

    In channels_last nothing has to be reordered.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution by `pointwise`: oneDNN's is up to three times as slow for small maps with many channels."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class ReflectConv(nn.Conv2d):
    """nn.Conv2d with reflection padding by half its kernel, ``padding_mode="reflect"``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **options):
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = reflect(x, self.padding[0])
        if self.groups > 1:
            return depthwise(x, self.weight, self.bias, self.stride[0])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class SameDepthwise(nn.Conv2d):
    """A depthwise convolution with TensorFlow's "same" zero padding, as in EfficientNet."""

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:  # padding equal on all sides, which the convolution does at no cost
            return depthwise(x, self.weight, self.bias, padding=size // 2)
        return depthwise(pad_same(x, self.kernel_size, self.stride), self.weight, self.bias, stride)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """Depthwise convolution: (N,C,H,W), weight (C,1,k,k) -> (N,C,(H+2padding-k)/stride+1,(W+2padding-k)/stride+1).

    Two of its gradients have slow kernels in oneDNN; on a CPU `_Depthwise` computes them differently.
    """
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))
    y = _Depthwise.apply(x, weight, stride, padding)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        y = F.conv2d(x, weight, None, stride, padding, groups=len(weight))  # in autocast's dtype
        ctx.save_for_backward(x.to(y.dtype), weight)
        ctx.stride, ctx.padding, ctx.dtype = stride, padding, x.dtype
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        large = weight.shape[-1] > 3
        output_mask = (ctx.needs_input_grad[0], not large, False)
        options = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight), output_mask)
        dtype = grad.dtype if stride == 1 else single(grad[:0]).dtype  # with strides oneDNN's bf16 is 50 times as slow
        tensors = (grad.to(dtype), x.to(dtype), weight.to(dtype))
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(*tensors, *options)
        if large:
            grad_weight = _weight_gradient(x, grad, weight.shape[-1], stride, padding)
        return None if grad_x is None else grad_x.to(ctx.dtype), grad_weight.to(weight.dtype), None, None


def _weight_gradient(x: Tensor, grad: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The weight's gradient (C,1,size,size): each channel of x convolved with its own output gradient.

    In NeDR's training 10 to 40 times as fast as oneDNN's kernel for it.
    """
    samples = zip(x, grad, strict=True)
    gradients = (F.conv2d(a[None], g.unsqueeze(1), None, 1, padding, stride, len(g)) for a, g in samples)
    return sum(single(each) for each in gradients)[0, :, None, :size, :size]


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, then ``act``.

    In training on a CPU: PyTorch sums batch statistics of channels_last maps naively in float32, which is up to 50
    times less accurate than for other formats (an error of 1e-3 after the encoder's 60 layers); here they are summed
    pairwise. And PyTorch's in-place ReLU6 keeps a copy of its input, though the output suffices for the gradient.
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, act: nn.Module | None = None):
        super().__init__(features, eps, momentum)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return self.act(super().forward(x))
        bounded = isinstance(self.act, nn.ReLU6)
        y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps, bounded)
        count = x.numel() // x.shape[1]
        track(self, mean, var * (count / max(1, count - 1)))
        return y if bounded else self.act(y)


def freeze_batch_norm(*networks: nn.Module) -> None:
    """Batch norm in ``networks`` uses its running statistics, unchanged, until the next `train()`."""
    for norm in _batch_norms(*networks):
        norm.eval()


@contextlib.contextmanager
def untracked_batch_norm(network: nn.Module) -> Iterator[None]:
    """Context in which batches do not enter the running statistics of ``network``: for images unlike those of tests."""
    momenta = {norm: norm.momentum for norm in _batch_norms(network)}
    for norm in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _batch_norms(*networks: nn.Module) -> Iterator[Any]:
    """Batch norm, and whatever else has running statistics (the airlight head's `Standardise`)."""
    modules = (module for network in networks for module in network.modules())
    return (module for module in modules if getattr(module, "running_mean", None) is not None)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) weight + bias, clamped to [0,6] if ``bounded``; and mean and var of the batch."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, bounded: bool) -> tuple[Tensor, ...]:
        if x.dtype in (torch.float32, torch.float64):
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square_().mean((0, 2, 3))
            y, scale = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), (var + eps).rsqrt()
        else:  # half precision is coarser than the error of the sums
            y, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
            mean, scale = mean.float(), scale.float()
            var = scale.pow(-2) - eps
        y = y.clamp_(0, 6) if bounded else y
        ctx.save_for_backward(x, weight, mean, scale, *([y] if bounded else []))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, *result = ctx.saved_tensors
        for y in result:
            grad = torch.ops.aten.hardtanh_backward(grad, y, 0, 6)
        statistics = (None, None, mean, scale, True, ctx.eps)
        grads = torch.ops.aten.native_batch_norm_backward(grad, x, weight, *statistics, ctx.needs_input_grad[:3])
        return *grads, None, None


def use_fast_layers(network: nn.Module) -> nn.Module:
    """Replace layers of a timm network by the faster ones of this module, in place. Returns the network."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
                channels, bias = layer.in_channels, layer.bias is not None
                new = SameDepthwise(channels, channels, layer.kernel_size, layer.stride, groups=channels, bias=bias)
            elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                new = Pointwise(layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None)
            elif isinstance(layer, BatchNormAct2d):
                new = BatchNorm(layer.num_features, layer.eps, layer.momentum, layer.act)
            else:
                continue
            new.load_state_dict(layer.state_dict())
            setattr(module, name, new)
    return network
