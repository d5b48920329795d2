"""Plain convolutional networks with convolutions and ReLU only, for layer-by-layer bounds.

The layout follows the small networks of Chiang et al., ICLR 2020, with the mean over regions in place of the first
fully connected layer, so that images of any size are supported.
"""

from torch import nn

from bagcert.nets.region_resnet import Stem


class RegionConvNet(nn.Sequential):
    """Strided convolutions with ReLU, followed by a 1x1 classifier for every region.

    Args:
        width: channels of the last convolution.
        padded: zero padding ("same" maps), or none (every region sees real pixels only).
    """

    def __init__(
        self, classes: int, width: int, stem: Stem, depth: int, padded: bool = True, channels: int = 3
    ) -> None:
        layers: list[nn.Module] = []
        for kernel, stride, share in stem:
            outputs = max(8, round(width * share))
            padding = (kernel - 1) // 2 if padded else 0
            layers += [nn.Conv2d(channels, outputs, kernel, stride, padding), nn.ReLU()]
            channels = outputs
        for _ in range(depth):
            layers += [nn.Conv2d(channels, channels, 1), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(channels, classes, 1))
