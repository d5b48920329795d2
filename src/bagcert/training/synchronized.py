"""Synchronized batch norm on any device, so that distributed training matches single-process training."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with batch statistics over the images of all processes.

    Parameters, buffers and eval mode are those of `nn.BatchNorm2d`. Processes may hold different numbers of images.
    Unlike `nn.SyncBatchNorm`, it also runs on CPUs over gloo.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes [batch, channels, rows, cols]."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None, "a plain average over all batches is not kept"
        y, mean, var, count = _normalized(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return y


class _Normalize(torch.autograd.Function):
    """`(x - mean) / sqrt(var + eps) * weight + bias`; mean and variance by channel, over all processes.

    In the forward pass, each process contributes its mean, sum of squared deviations and count, which are combined as
    in Chan et al. 1979 (numerically stable for large means). The backward pass needs two sums over all processes.
    Weight and bias get this process's share of their gradients, like every other parameter.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.float()
        own_mean = values.mean((0, 2, 3))
        own_squares = (values - own_mean[:, None, None]).square().sum((0, 2, 3))
        own_count = own_mean.new_full((1,), values.numel() // values.shape[1])
        own = torch.cat([own_mean, own_squares, own_count])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        means, squares, counts = torch.stack(parts).split([len(own_mean), len(own_mean), 1], 1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = (squares + counts * (means - mean).square()).sum(0) / count
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, count)
        y = (values - mean[:, None, None]) * (inverse * weight)[:, None, None] + bias[:, None, None]
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad_y, *_):  # type: ignore[no-untyped-def, override]
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad = grad_y.float()
        standard = (x.float() - mean[:, None, None]) * inverse[:, None, None]
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * standard).sum((0, 2, 3))
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        passed_on = (sums / count)[:, :, None, None]
        grad_x = (inverse * weight)[:, None, None] * (grad - passed_on[0] - standard * passed_on[1])
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


@torch.compiler.disable  # a compiled graph ends at what waits for other processes
def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _Normalize.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def synchronize_batch_norm(module: nn.Module) -> None:
    """Replaces every `nn.BatchNorm2d` inside a module by a synchronized one, in place.

    Tensors and their names are kept. The module itself must not be a batch norm. On CUDA, the replacement is the faster
    `nn.SyncBatchNorm`, which only supports GPUs.
    """
    if any(parameter.is_cuda for parameter in module.parameters()):
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for each in module.modules():
        if type(each) is nn.BatchNorm2d:
            each.__class__ = SynchronizedBatchNorm2d
