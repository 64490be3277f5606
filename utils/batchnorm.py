"""Batch norm: recalibration of running statistics, and statistics over several processes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _SyncBatchNorm
from torch.optim.swa_utils import update_bn


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """Update the running statistics of ``norm`` by a batch's ``mean`` and unbiased ``var`` (C,), as batch norm does."""
    norm.num_batches_tracked.add_(1)
    weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, weight)
    norm.running_var.lerp_(var, weight)


def recalibrate(method: nn.Module, batches: Iterable[dict], device: torch.device) -> None:
    """Recompute the batch-norm statistics of ``method.inference`` as plain means over the hazy ``batches``, in place.

    Running averages of tiny batches vary from step to step; these do not. Training modes are unchanged.
    """
    batches = [batch["hazy"] for batch in batches]
    for network in (getattr(method, name) for name in method.inference):
        if batches and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            update_bn(batches, network, device)


def synchronise(module: nn.Module) -> None:
    """Make batch norm in ``module`` compute its statistics over the batches of all processes, in place.

    Names, weights, buffers and activations are kept. GPUs use PyTorch's SyncBatchNorm, which does not support CPUs, and
    whose conversion loses the activation that timm's norms, and ours, have.
    """
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.__class__ = SyncBatchNorm


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes in training, followed by the norm's activation, if it has one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.is_cuda:
            y = self._by_pytorch(x)
        elif self.training:
            y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
            track(self, mean, var)
        else:
            y = super().forward(x)
        return self.act(y) if hasattr(self, "act") else y

    def _by_pytorch(self, x: Tensor) -> Tensor:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # a plain mean; waits for the GPU to read the number of batches
            momentum = 1 / float(self.num_batches_tracked)
        running = self.running_mean, self.running_var
        processes = dist.group.WORLD, dist.get_world_size()
        return _SyncBatchNorm.apply(x, self.weight, self.bias, *running, self.eps, momentum, *processes)


class _Normalise(torch.autograd.Function):
    """x (N,C,H,W), weight and bias (C) -> the normalised x, and the mean and unbiased variance (C) of all processes.

    Processes may have different numbers of pixels. Saves no more for the backward pass than batch norm does.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
        moments = torch.stack([torch.ones_like(mean), mean, var + mean * mean]).double() * (x.numel() // x.shape[1])
        dist.all_reduce(moments)
        n, total, squares = moments
        mean, var = total / n, (squares / n - (total / n).square()).clamp_min(0)
        unbiased = (var * n / (n - 1).clamp_min(1)).to(exact.dtype)
        mean, var = mean.to(exact.dtype), var.to(exact.dtype)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), n[:1])
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, unbiased

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, n = ctx.saved_tensors
        centred, exact = x.to(mean.dtype) - mean.view(-1, 1, 1), g.to(mean.dtype)
        sums = torch.stack([exact.sum((0, 2, 3)), (exact * centred).sum((0, 2, 3)) * scale])
        local = sums.clone()  # gradients of weight and bias, which are averaged over processes with all others
        dist.all_reduce(sums)
        of_mean, of_scale = ((sums / n).to(mean.dtype) * torch.stack([torch.ones_like(scale), scale])).view(2, -1, 1, 1)
        dx = (exact - of_mean).addcmul_(centred, of_scale, value=-1).mul_((weight * scale).view(-1, 1, 1))
        return dx.to(x.dtype), local[1].to(weight.dtype), local[0].to(weight.dtype), None
