"""Residual networks with small receptive fields: mostly 1x1 convolutions and a few 3x3 convolutions.

The layout follows BagCert (Metzen & Yatsura, ICLR 2021, section 4): ResNet-like blocks in which most 3x3 convolutions
are replaced by 1x1 convolutions. The kernels determine the receptive field.
"""

from torch import Tensor, nn

Stem = tuple[tuple[int, int, float], ...]
"""(kernel, stride, share of the network's width) of each convolution before the blocks."""


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    """A convolution followed by batch norm, adjacent so that they can be folded into one layer."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Residual block `relu(x + f(x))` with `f` = kxk convolution, ReLU, 1x1 convolution; unpadded, `x` is cropped."""

    def __init__(self, width: int, kernel: int, padded: bool) -> None:
        super().__init__()
        self.crop = 0 if padded else kernel // 2
        padding = kernel // 2 if padded else 0
        self.body = nn.Sequential(
            *conv_bn(width, width, kernel, padding=padding), nn.ReLU(inplace=True), *conv_bn(width, width, 1)
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, width, rows, cols] to the same shape, smaller by `crop` cells at each side."""
        crop = self.crop
        kept = x[:, :, crop:-crop, crop:-crop] if crop else x
        return self.activation(self.body(x) + kept)


class RegionResNet(nn.Sequential):
    """Stem convolutions, residual blocks, and a 1x1 classifier for every region.

    Args:
        blocks: kernel of each residual block.
        padded: zero padding ("same" maps), or none (every region sees real pixels only).
    """

    def __init__(
        self, classes: int, width: int, stem: Stem, blocks: tuple[int, ...], padded: bool = True, channels: int = 3
    ) -> None:
        layers: list[nn.Module] = []
        for kernel, stride, share in stem:
            # The last stem convolution must have the width of the blocks, even if it is small.
            outputs = width if share == 1 else max(8, round(width * share))
            # An even kernel at stride 1 has no symmetric padding, so it is not padded.
            padding = (kernel - 1) // 2 if padded and (kernel % 2 or stride > 1) else 0
            layers += [*conv_bn(channels, outputs, kernel, stride, padding), nn.ReLU(inplace=True)]
            channels = outputs
        layers += [Residual(width, kernel, padded) for kernel in blocks]
        layers.append(nn.Conv2d(width, classes, 1))
        super().__init__(*layers)
