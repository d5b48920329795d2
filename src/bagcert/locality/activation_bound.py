"""Upper bound on the values inside a network over all images.

Some kernels multiply values outside the receptive field by zero: bfloat16 convolutions on CPUs read pixels in pairs and
pad with zero weights. This is exact for finite values, but 0 * inf is NaN. If NaN spreads beyond the receptive field on
a device, certificates are sound only if no value can overflow, which must be proved rather than sampled.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from bagcert.locality.probes import magnitude
from bagcert.nets.bagnet import BagNet, Bottleneck
from bagcert.nets.region_convnet import RegionConvNet
from bagcert.nets.region_pyramid import RegionPyramid
from bagcert.nets.region_resnet import RegionResNet, Residual
from bagcert.nets.region_scorer import RegionScorer

# Layers for which |out| <= layer with absolute weights (|in|), and modules that only add and crop their parts.
_LAYERS = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity}
_CONTAINERS = {nn.Sequential, RegionConvNet, RegionPyramid, RegionResNet, Residual, BagNet, Bottleneck}


def activation_bound(scorer: RegionScorer) -> float:
    """Bound the absolute value of every number in the network for all images in [0, 1]; inf if no bound is known.

    The numbers are the normalized image, the output of every layer, and the weights, which bfloat16 may round to
    infinity.

    Guarantee: an upper bound in exact arithmetic, by induction over the layers: with the absolute values of all
    weights, biases and means, a layer maps a bound of its input to a bound of its output. Only layers of the package's
    own architectures are supported.
    """
    parts = list(scorer.net.modules())
    if any(type(part) not in _LAYERS | _CONTAINERS for part in parts):
        return math.inf
    net = copy.deepcopy(scorer.net).cpu().double().eval()
    largest = [0.0]

    def take(value: Tensor) -> None:
        largest.append(float(magnitude(value).max()))

    def record(part: nn.Module, inputs: Any, out: Tensor) -> None:
        take(out)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for part in net.modules():
            part.register_forward_hook(record)
            for parameter in part.parameters(recurse=False):
                take(parameter.abs_())
            if isinstance(part, nn.BatchNorm2d):
                if part.running_mean is None or part.running_var is None:
                    return math.inf
                take(part.running_mean.abs_().neg_())
                take((1 if part.weight is None else part.weight) / (part.running_var + part.eps).sqrt())
        mean, std = scorer.normalize.mean.cpu().double(), scorer.normalize.std.cpu().double()
        centered = torch.maximum(mean.abs(), (1 - mean).abs())
        image = centered / std.abs()
        for value in (mean, centered, image):
            take(value)
        net(image.expand(1, -1, *scorer.image_size).contiguous())
    return max(largest)
