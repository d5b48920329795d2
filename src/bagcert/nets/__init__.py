"""Region scorers: networks in which every output cell depends on one small rectangle of the image."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bagcert.errors import UsageError, nearest
from bagcert.nets.bagnet import BagNet
from bagcert.nets.region_convnet import RegionConvNet
from bagcert.nets.region_pyramid import RegionPyramid
from bagcert.nets.region_resnet import RegionResNet, Stem

Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Architecture:
    """A named network architecture.

    Attributes:
        build: function (classes, width, depth, padded, channels=3) that creates a module from normalized images to
            region scores.
        image_size: (height_px, width_px) for which it is designed; other sizes work as well.
        receptive_field_px, stride_px: declared geometry; verified by tests.
    """

    build: Build
    image_size: tuple[int, int]
    width: int
    depth: int
    receptive_field_px: int
    stride_px: int
    summary: str


def _require_depth(depth: int, least: int) -> None:
    if depth < least:
        raise UsageError(f"this architecture needs a depth of at least {least} blocks, got {depth}")


def _resnet(stem: Stem, looks_around: int) -> Build:
    """Networks with `depth` residual blocks, of which `looks_around` evenly spaced ones have a 3x3 kernel."""

    def build(classes: int, width: int, depth: int, padded: bool, channels: int = 3) -> nn.Module:
        _require_depth(depth, max(1, looks_around))
        step = depth / looks_around if looks_around else 0
        around = {int((i + 0.5) * step) for i in range(looks_around)}
        blocks = tuple(3 if i in around else 1 for i in range(depth))
        return RegionResNet(classes, width, stem, blocks, padded, channels)

    return build


def _bagnet(receptive_field: int) -> Build:
    def build(classes: int, width: int, depth: int, padded: bool, channels: int = 3) -> nn.Module:
        _require_depth(depth, 1)
        return BagNet(classes, width, receptive_field, depth / 16, channels)

    return build


def _convnet(stem: Stem) -> Build:
    def build(classes: int, width: int, depth: int, padded: bool, channels: int = 3) -> nn.Module:
        _require_depth(depth, 1)
        return RegionConvNet(classes, width, stem, depth, padded, channels)

    return build


def _pyramid(*stages: tuple[int, int, float, int], kernel: int = 1) -> Build:
    def build(classes: int, width: int, depth: int, padded: bool, channels: int = 3) -> nn.Module:
        _require_depth(depth, 1)
        return RegionPyramid(classes, width, stages, depth, padded, channels, kernel)

    return build


_S1 = ((3, 1, 1.0),)
_S2 = ((3, 1, 0.5), (4, 2, 1.0))
_S2_RF8 = ((3, 1, 0.25), (4, 2, 1.0), (2, 1, 1.0))
_S4_RF8 = ((4, 2, 0.25), (3, 2, 1.0))
_PLAIN_S4 = ((4, 2, 0.5), (4, 2, 1.0))
_S4 = ((3, 1, 0.25), (4, 2, 0.5), (4, 2, 1.0))
_P4_RF7 = ((3, 1, 0.25, 0), (3, 2, 0.5, 2), (2, 2, 1.0, 0))
_P4_RF8 = ((3, 1, 0.25, 0), (2, 2, 0.5, 2), (3, 2, 1.0, 0))
_P8 = ((3, 1, 0.125, 0), (3, 2, 0.25, 1), (3, 2, 0.5, 1), (3, 2, 1.0, 1))
_CLASSIFIER = "stride 8, 3x3 blocks; an ordinary classifier, for teachers and PatchCleanser"

ARCHITECTURES: dict[str, Architecture] = {
    "resnet-rf3": Architecture(_resnet(_S1, 0), (8, 8), 64, 3, 3, 1, "stride 1, 1x1 blocks only"),
    "resnet-rf5": Architecture(_resnet(_S1, 1), (32, 32), 64, 4, 5, 1, "stride 1, one 3x3 block"),
    "resnet-rf7": Architecture(_resnet(_S1, 2), (32, 32), 64, 4, 7, 1, "stride 1, two 3x3 blocks"),
    "resnet-rf9": Architecture(_resnet(_S1, 3), (32, 32), 64, 5, 9, 1, "stride 1, three 3x3 blocks"),
    "resnet-rf11": Architecture(_resnet(_S1, 4), (32, 32), 64, 6, 11, 1, "stride 1, four 3x3 blocks"),
    "resnet-rf13": Architecture(_resnet(_S1, 5), (32, 32), 64, 6, 13, 1, "stride 1, five 3x3 blocks"),
    "resnet-rf6s2": Architecture(_resnet(_S2, 0), (32, 32), 128, 4, 6, 2, "stride 2, 1x1 blocks only"),
    "resnet-rf8s2": Architecture(_resnet(_S2_RF8, 0), (32, 32), 128, 4, 8, 2, "stride 2, a 2x2 then 1x1 blocks"),
    "resnet-rf10s2": Architecture(_resnet(_S2, 1), (32, 32), 128, 4, 10, 2, "stride 2, one 3x3 block"),
    "resnet-rf14s2": Architecture(_resnet(_S2, 2), (32, 32), 128, 5, 14, 2, "stride 2, two 3x3 blocks"),
    "resnet-rf8s4": Architecture(_resnet(_S4_RF8, 0), (32, 32), 256, 6, 8, 4, "stride 4, 1x1 blocks only"),
    "resnet-rf36s4": Architecture(
        _resnet(_S4, 3), (32, 32), 192, 6, 36, 4, "stride 4; every region sees a whole 32x32"
    ),
    "resnet-rf12s4": Architecture(_resnet(_S4, 0), (64, 64), 192, 5, 12, 4, "stride 4, 1x1 blocks only"),
    "resnet-rf20s4": Architecture(_resnet(_S4, 1), (64, 64), 192, 5, 20, 4, "stride 4, one 3x3 block"),
    "pyramid-rf3s2": Architecture(_pyramid((3, 2, 1.0, 0)), (32, 32), 192, 6, 3, 2, "stride 2, one convolution"),
    "pyramid-rf4s2": Architecture(
        _pyramid((3, 1, 0.25, 1), (2, 2, 1.0, 0)), (32, 32), 192, 6, 4, 2, "stride 2, a block before it"
    ),
    "pyramid-rf6s2": Architecture(
        _pyramid((3, 1, 0.25, 1), (4, 2, 1.0, 0)), (32, 32), 192, 6, 6, 2, "stride 2, a block before it"
    ),
    "pyramid-rf5s3": Architecture(
        _pyramid((3, 1, 0.25, 1), (3, 3, 1.0, 0)), (32, 32), 192, 6, 5, 3, "stride 3, a block before it"
    ),
    "pyramid-rf4s4": Architecture(
        _pyramid((2, 2, 0.5, 2), (2, 2, 1.0, 0)), (32, 32), 192, 6, 4, 4, "stride 4, two blocks at stride 2"
    ),
    "pyramid-rf7s4": Architecture(_pyramid(*_P4_RF7), (32, 32), 192, 6, 7, 4, "stride 4, two blocks at stride 2"),
    "pyramid-rf8s4": Architecture(_pyramid(*_P4_RF8), (32, 32), 192, 6, 8, 4, "stride 4, two blocks at stride 2"),
    "pyramid-rf45s8": Architecture(_pyramid(*_P8, kernel=3), (32, 32), 384, 1, 45, 8, _CLASSIFIER),
    "convnet-rf10s4": Architecture(
        _convnet(_PLAIN_S4), (32, 32), 128, 1, 10, 4, "stride 4, no batch norm, no shortcuts"
    ),
    "bagnet9": Architecture(_bagnet(9), (224, 224), 64, 16, 9, 8, "BagNet-9"),
    "bagnet17": Architecture(_bagnet(17), (224, 224), 64, 16, 17, 8, "BagNet-17"),
    "bagnet33": Architecture(_bagnet(33), (224, 224), 64, 16, 33, 8, "BagNet-33"),
}


def get_architecture(name: str) -> Architecture:
    """Look up an architecture by name."""
    if name not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
