"""Residual networks with few channels at fine resolution before each stride, like ordinary residual networks."""

from torch import nn

from bagcert.nets.region_resnet import Residual, conv_bn


class RegionPyramid(nn.Sequential):
    """Stages of a convolution and residual blocks, further blocks, and a 1x1 output layer.

    Args:
        width: channels of the last stage.
        stages: (kernel, stride, share of `width`, residual blocks) of each stage.
        depth: 1x1 residual blocks after the last stage.
        padded: zero padding ("same" maps), or none (every region sees real pixels only).
        kernel: kernel of the residual blocks of the stages.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        stages: tuple[tuple[int, int, float, int], ...],
        depth: int,
        padded: bool = True,
        channels: int = 3,
        kernel: int = 1,
    ) -> None:
        layers: list[nn.Module] = []
        for reach, stride, share, blocks in stages:
            outputs = width if share == 1 else max(8, round(width * share))
            padding = (reach - 1) // 2 if padded else 0
            layers += [*conv_bn(channels, outputs, reach, stride, padding), nn.ReLU(inplace=True)]
            layers += [Residual(outputs, kernel, padded) for _ in range(blocks)]
            channels = outputs
        layers += [Residual(width, 1, padded) for _ in range(depth)]
        super().__init__(*layers, nn.Conv2d(width, classes, 1))
