"""BagNets: ResNet-50 with most 3x3 convolutions replaced by 1x1 convolutions.

Source: Brendel & Bethge, "Approximating CNNs with bag-of-local-features models", ICLR 2019, section 3.
The receptive field (9, 17 or 33 px, stride 8) results from one 3x3 convolution at the start of the first stages.
"""

from torch import Tensor, nn

from bagcert.nets.region_resnet import conv_bn

STAGE_STRIDES = (2, 2, 2, 1)
STAGE_DEPTHS = (3, 4, 6, 3)
EXPANSION = 4


class Bottleneck(nn.Module):
    """Bottleneck block of 1x1, kxk (strided, unpadded) and 1x1 convolutions; the skip path is cropped to fit."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.body = nn.Sequential(
            *conv_bn(inputs, width, 1),
            nn.ReLU(inplace=True),
            *conv_bn(width, width, kernel, stride),
            nn.ReLU(inplace=True),
            *conv_bn(width, outputs, 1),
        )
        self.skip = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if inputs != outputs or stride > 1 else None
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, rows, cols] to [batch, 4 * width, ...]."""
        y = self.body(x)
        kept = x if self.skip is None else self.skip(x)
        return self.activation(y + kept[:, :, : y.shape[2], : y.shape[3]])


class BagNet(nn.Sequential):
    """BagNet with a receptive field of 9, 17 or 33 px.

    Args:
        width: channels of the first stage (64 in the paper).
        depth: number of blocks per stage relative to ResNet-50 (3, 4, 6, 3); 1.0 in the paper.
    """

    def __init__(self, classes: int, width: int, receptive_field: int, depth: float = 1.0, inputs: int = 3) -> None:
        stages_that_look_around = {9: 2, 17: 3, 33: 4}[receptive_field]
        layers: list[nn.Module] = [nn.Conv2d(inputs, width, 1, bias=False), *conv_bn(width, width, 3)]
        layers.append(nn.ReLU(inplace=True))
        channels = width
        for stage, (stride, blocks) in enumerate(zip(STAGE_STRIDES, STAGE_DEPTHS, strict=True)):
            stage_width = width * 2**stage
            for block in range(max(1, round(blocks * depth))):
                kernel = 3 if block == 0 and stage < stages_that_look_around else 1
                layers.append(Bottleneck(channels, stage_width, kernel, stride if block == 0 else 1))
                channels = stage_width * EXPANSION
        layers.append(nn.Conv2d(channels, classes, 1))
        super().__init__(*layers)
