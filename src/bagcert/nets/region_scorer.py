"""Region scorers: a network with geometry, head and class names, mapping images in [0, 1] to integer score maps."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bagcert.aggregation import AttentionPooling
from bagcert.data.photo import as_batch, with_batch_axis
from bagcert.errors import UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.nets.attention_pooling import AttentionReadout
from bagcert.nets.heads import HEADS, Head, HeadName, make_head, scale_of
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.receptive_field.probe import check_locality
from bagcert.scores import ScoreMap

if TYPE_CHECKING:
    from bagcert.nets.runtimes.base import Runner

FLOAT32 = torch.finfo(torch.float32)
NORMAL = f"positive and finite in float32, from {FLOAT32.tiny:.4g} to {FLOAT32.max:.4g}"
PIXELS_AT_ONCE = 2**18  # 256 images of 32x32 px: large enough for speed, small enough for caches and memory


class Normalize(nn.Module):
    """Normalization `(x - mean) / std` per channel, as the first layer of the network."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize images [batch, channels, height, width] in [0, 1]."""
        return (x - self.mean) / self.std


class RegionScorer(nn.Module):
    """Region scorer: `forward` computes the real-valued map `z`, `score_map` the integer score map used by rules.

    Source: Metzen & Yatsura, ICLR 2021, section 3; docs/method.md, "Score map".

    Args:
        net: maps normalized images [batch, channels, height, width] to [batch, classes, rows, cols]. Every layer must
            be local. The geometry is derived from the layers when first needed.
        class_names: class names by output channel.
        image_size: (height_px, width_px) of the images for which the network is built.
        head: "binary" (scores `[z > 0]`, range [0, 1]), "fixed-point" (`clip(round(z * scale), ±2047)`), or
            "attention-pooling" (values and attention weights for a readout, see `bagcert.aggregation`).
        mean, std: normalization per channel, applied as the first layer: three values for RGB images, one for gray
            images, or six for ablated images `[x, 1 - x]` (`bagcert.defenses.derandomized_smoothing`), which only
            `forward` supports.

    Attributes:
        autocast_dtype: dtype of the network; None for float32.
        tolerance: bound on the change of `z` outside a patch's reach, as measured on this device; determines the slack
            of score maps. 0 if locality is exact.
        masks_per_axis: largest number of windows per axis, see `RegionGrid.windows`; None for no limit.
        runner: backend that computes `z` instead of torch, see `bagcert.nets.runtimes`; None for torch.
    """

    def __init__(
        self,
        net: nn.Module,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        head: HeadName = "fixed-point",
        scale: float = 1.0,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        readout: AttentionReadout | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise UsageError(f"a head must be one of {', '.join(HEADS)}; got {head!r}")
        if (readout is not None) != (head == "attention-pooling"):
            raise UsageError(f"the attention-pooling head needs a readout, and no other head takes one; got {head!r}")
        if not is_normal(scale):
            raise UsageError(f"the scale of the fixed-point head must be {NORMAL}, got {scale}")
        if len(class_names) < 2:
            raise UsageError(f"a region scorer needs at least two class names, got {len(class_names)}")
        if len(image_size) != 2 or min(image_size) < 1:
            raise UsageError(f"an image size is (height_px, width_px), each at least 1, got {tuple(image_size)}")
        if len(mean) != len(std) or len(mean) not in (1, 3, 6):
            raise UsageError(
                f"mean and std must have three values (RGB), one (gray) or six (ablated RGB), got {len(mean)} and "
                f"{len(std)}"
            )
        if not all(abs(value) <= FLOAT32.max for value in mean):
            raise UsageError(f"mean must be finite in float32, got {tuple(mean)}")
        if not all(map(is_normal, std)):
            raise UsageError(f"std must be {NORMAL}, got {tuple(std)}")
        self.normalize = Normalize(mean, std)
        self.net = net
        self.readout = readout
        self.class_names = tuple(class_names)
        self.image_size = (image_size[0], image_size[1])
        self.head: HeadName = head
        self.scale = float(scale)
        self.autocast_dtype: torch.dtype | None = None
        self.tolerance = 0.0
        self.locality_checked = False  # whether `tolerance` was measured on this device
        self.masks_per_axis: int | None = None
        self.runner: Runner | None = None
        self._frozen: AttentionPooling | None = None
        self._grids: dict[tuple[tuple[int, int], int | None], RegionGrid] = {}

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        head: HeadName = "fixed-point",
        scale: float | str = 1.0,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        images: object = None,
    ) -> "RegionScorer":
        """Create a region scorer from any module that maps images to [batch, classes, rows, cols].

        The geometry is derived from the layers and then measured with NaN and perturbation probes. The module is
        wrapped, not copied, and put into eval mode; if it is refused, its mode is restored. Use `bagcert.regionalize`
        to convert a classifier that ends with mean pooling and a linear layer.

        Args:
            module: maps normalized images [batch, channels, height, width] to scores.
            class_names, image_size, head, mean, std: as for the class.
            scale: scale of the fixed-point head; "auto" calibrates it on `images`, see `calibrate`.

        Raises:
            UnsoundError: a layer is not local (the message names it), or the module exceeds its derived geometry.
            UsageError: the module cannot be traced, its weights are not finite float32, it does not take images with
                the channels of `mean`, its output does not match `class_names`, or an argument is out of range.
        """
        automatic = isinstance(scale, str)
        if scale != "auto" and automatic:
            raise UsageError(f'a scale must be a number or "auto", got {scale!r}')
        if automatic != (images is not None):
            raise UsageError('scale="auto" needs images for calibration, and images need scale="auto"')
        scorer = cls(module, class_names, image_size, head, 1.0 if isinstance(scale, str) else scale, mean, std)
        modes = [(part, part.training) for part in module.modules()]
        try:
            scorer.eval()._require_local()
            if automatic:
                scorer.calibrate(images)
        except BaseException:
            for part, training in modes:
                part.training = training
            raise
        return scorer

    def calibrate(self, images: object) -> "RegionScorer":
        """Set the scale of the fixed-point head so that the largest score on `images` becomes the largest integer.

        Certificates are sound for any scale. A scale that is too small rounds scores coarsely, and one that is too
        large clips them. About 100 images similar to those of the deployment are sufficient.

        Args:
            images: at least one image, as for `score_map`.

        Raises:
            UsageError: invalid images, another head, or scores that are not finite or all 0.
        """
        if self.head != "fixed-point":
            raise UsageError(f"only the fixed-point head has a scale, this network has the {self.head} head")
        batch = self.as_batch(images)
        z = self.real_scores(batch)
        if not z.isfinite().all() or not z.any():
            raise UsageError("the scale cannot be calibrated on these images: their scores are not finite, or all 0")
        scale = scale_of([z])
        if not is_normal(scale):
            raise UsageError(f"the scale of the fixed-point head must be {NORMAL}, these images give {scale}")
        self.scale = scale
        return self

    def _require_local(self) -> None:
        weight = next((p for p in self.net.parameters() if p.is_floating_point()), None)
        if weight is not None:
            if weight.dtype != torch.float32:
                raise UsageError(f"the module's weights must be float32, got {weight.dtype}; convert it with .float()")
            self.normalize.to(weight.device)
        if broken := not_finite(self.net.state_dict()):
            raise UsageError(f"tensor {broken!r} of the module has values that are not finite")
        most = min(64, PIXELS_AT_ONCE // (self.image_size[0] * self.image_size[1]))  # batch size in deployment
        try:
            grid = derive_grid(self.net, self.image_size, self.channels, (1, 3, *([most] if most > 3 else [])))
        except UsageError as error:
            if "channels" not in str(error):
                raise
            raise UsageError(
                f"{error}; the image has one channel for each value of mean and std, {self.channels} here"
            ) from error
        self._grids[self.image_size, None] = grid
        with torch.no_grad():
            out = self(torch.zeros(1, self.channels, *self.image_size, device=self.device))
        if out.shape[1] != len(self.class_names):
            raise UsageError(f"the module has {out.shape[1]} output channels for {len(self.class_names)} class names")
        report = check_locality(self, self.image_size, grid, self.channels)
        if report.largest_leak > 0:
            raise UnsoundError(
                f"scores outside a patch's reach moved by {report.largest_leak:g} in a perturbation test; "
                "certificates need a module whose far outputs do not change at all"
            )

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.normalize.mean.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.normalize.mean.device

    @property
    def backend(self) -> str:
        """Name of the backend that computes `z`."""
        return "torch" if self.runner is None else self.runner.name

    @property
    def form(self) -> Head:
        """The head: range, integers, differentiable form, and aggregation of regions."""
        return make_head(self.head, self.scale, self.readout, self._frozen)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Compute real-valued scores `z` [batch, classes, rows, cols] of images in [0, 1]."""
        return self.net(self.normalize(images))

    def grid(self, image_size: tuple[int, int] | None = None) -> RegionGrid:
        """Geometry for images of (height_px, width_px), derived from the layers and cached."""
        size = self.image_size if image_size is None else (image_size[0], image_size[1])
        if (size, None) not in self._grids:
            self._grids[size, None] = derive_grid(self.net, size, self.channels)
        if (size, self.masks_per_axis) not in self._grids:
            self._grids[size, self.masks_per_axis] = self._grids[size, None].with_masks_per_axis(self.masks_per_axis)
        return self._grids[size, self.masks_per_axis]

    def real_scores(self, images: object) -> Float[Tensor, "batch classes rows cols"]:
        """Compute `z` as float32, in eval mode, without gradients, with the network in its deployed dtype."""
        return self.forward_batch(self.as_batch(images))

    def forward_batch(self, batch: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Compute `real_scores` of a batch without checking it, as probes need for NaN."""
        self.eval()  # batch norm in train mode would leak across the map
        dtype = self.autocast_dtype
        parts = batch.split(max(1, PIXELS_AT_ONCE // (batch.shape[2] * batch.shape[3])))
        if self.runner is not None:
            return torch.cat([self.runner(part) for part in parts])
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            scores = [self(part.to(self.device, memory_format=torch.channels_last)).float() for part in parts]
        return torch.cat(scores)

    def score_map(self, images: object) -> ScoreMap:
        """Compute the integer score map of a batch.

        Args:
            images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1]; numpy or torch.
                Networks for gray images take one channel instead of three.

        Raises:
            UsageError: invalid layout, dtype or range, or images too small for the network.
        """
        batch = self.as_batch(images)
        size = (batch.shape[2], batch.shape[3])
        self.grid(size)  # gives a clear error if the image is too small
        return self.to_scores(self.real_scores(batch), size)

    def to_scores(self, z: Float[Tensor, "batch channels rows cols"], image_size: tuple[int, int]) -> ScoreMap:
        """Apply the head to real-valued scores of images of size `image_size`."""
        form = self.form
        return form.score_map(form.integers(z), self.grid(image_size), form.slack(z, self.tolerance))

    def integers(self, z: Float[Tensor, "batch classes rows cols"]) -> Tensor:
        """Compute the integers of the head, with the shape of `z`; for class scores, monotone in `z`."""
        return self.form.integers(z)

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Names of the parameters whose shape depends on the number of classes."""
        if self.readout is not None:
            return ("readout.second.weight", "readout.skip.weight", "readout.skip.bias")
        return tuple(name for name, _ in list(self.net.named_parameters(prefix="net"))[-2:])

    def freeze(self) -> "RegionScorer":
        """Switch to eval mode and cache the integer readout, if there is one; training discards it.

        Raises:
            UsageError: weights of the readout are so large that integer sums would not be exact.
        """
        self.eval()
        self._frozen = None if self.readout is None else self.readout.frozen()
        return self

    def train(self, mode: bool = True) -> "RegionScorer":
        """Set the training mode as for every module; training mode discards the cached integer readout."""
        if mode:
            self._frozen = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict as for every module; discards the cached integer readout."""
        self._frozen = None
        return super().load_state_dict(*args, **kwargs)

    def fold_batch_norm(self) -> "RegionScorer":
        """Fold every batch norm into the preceding convolution, in place; for inference only."""
        self.eval()
        for module in list(self.net.modules()):
            # A subclass with its own forward may use the value between the two layers.
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                names = list(module._modules)
                for name, following in pairwise(names):
                    first, second = module._modules[name], module._modules[following]
                    if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                        module._modules[name] = fuse_conv_bn_eval(first, second)
                        module._modules[following] = nn.Identity()
        return self

    def as_batch(self, images: object) -> Float[Tensor, "batch channels height width"]:
        """Convert images to float in [0, 1] and check them; gray images are checked as RGB with equal channels."""
        batch = with_batch_axis(images)
        if self.channels == 6:
            raise UsageError("this network takes only ablated images; deploy it with derandomized smoothing")
        if self.channels == 3 or batch.ndim < 3:
            return as_batch(batch)
        axis = batch.ndim - (1 if batch.dtype in (np.uint8, torch.uint8) else 3)
        if batch.shape[axis] != 1:
            raise UsageError(f"this network takes images of one channel, got {list(batch.shape)}")
        if isinstance(batch, np.ndarray):
            return as_batch(np.repeat(batch, 3, axis))[:, :1]
        return as_batch(batch.repeat_interleave(3, axis))[:, :1]


def is_normal(value: float) -> bool:
    """Whether a value is positive, finite and not subnormal in float32, so that multiplying and dividing is accurate.

    >>> is_normal(1e-30), is_normal(1e-44), is_normal(1e300), is_normal(float("nan"))
    (True, False, False, False)
    """
    return FLOAT32.tiny <= value <= FLOAT32.max


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, or None."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
