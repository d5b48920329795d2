"""A network with its geometry, its head and its class names: images in [0,1] in, integer score maps out."""

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
PIXELS_AT_ONCE = 2**18  # 256 images of 32x32: large enough for speed, small enough for caches and memory


class Normalize(nn.Module):
    """`(x - mean) / std` per channel, inside the network so that sizes and ranges are the user's."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] in [0, 1] to the same, normalized."""
        return (x - self.mean) / self.std


class RegionScorer(nn.Module):
    """A region scorer: `forward` gives the real-valued map `z`, `score_map` the integers that rules see.

    Args:
        net: maps normalized images [batch, channels, height, width] to [batch, classes, rows, cols]; every
            layer must be local. Its geometry is derived from its layers when first needed.
        class_names: one per output channel.
        image_size: (height_px, width_px) the net is meant for.
        head: "binary" (scores `[z > 0]`, range [0, 1]), "fixed-point" (`clip(round(z * scale), ±2047)`), or
            "attention-pooling" (values and attention weights for a readout, see `bagcert.aggregation`).
        scale: of the fixed-point head.
        readout: of the attention-pooling head, and of no other.
        mean, std: per channel, applied as the first layer; three values for RGB images, one for grey ones, six for
            ablated ones `[x, 1 - x]` (`bagcert.defenses.derandomized_smoothing`), which only `forward` takes.

    Attributes:
        autocast_dtype: what the net computes in; None is float32.
        tolerance: how far `z` may move where it should stand still, as measured on this device; score maps carry what
            that does to each score as their slack. 0 where locality is exact.
        runner: computes `z` in the network's place, see `bagcert.nets.runtimes`; None is torch.

    Source: Metzen & Yatsura, ICLR 2021, section 3; docs/method.md, "Score map".
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
            raise UsageError(f"a head is one of {', '.join(HEADS)}; got {head!r}")
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
                f"mean and std have three values (RGB), one (grey) or six (ablated RGB), got {len(mean)} and {len(std)}"
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
        self.runner: Runner | None = None
        self._frozen: AttentionPooling | None = None
        self._grids: dict[tuple[int, int], RegionGrid] = {}

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
        """A region scorer from any module that maps images to [batch, classes, rows, cols].

        The geometry is derived from the layers, then measured with NaN and perturbation probes. The module is
        wrapped, not copied: it is in eval mode afterwards. A module that is refused is left as it was. A classifier
        that ends with mean pooling and a linear layer becomes such a module with `bagcert.regionalize`.

        Args:
            module: images [batch, channels, height, width], normalized, to scores.
            class_names, image_size, head, mean, std: as for the class.
            scale: of the fixed-point head; "auto" takes it from `images`, see `calibrate`.
            images: as for `score_map`.

        Raises:
            UnsoundError: a layer is not local (it is named), or the module reaches beyond its derived geometry.
            UsageError: the module cannot be traced, its weights are not finite float32, it does not take images
                of `mean`'s channels, or its output does not fit `class_names`; or an argument is out of range.
        """
        automatic = isinstance(scale, str)
        if scale != "auto" and automatic:
            raise UsageError(f'a scale is a number or "auto", got {scale!r}')
        if automatic != (images is not None):
            raise UsageError('scale="auto" needs images to take it from, and images need scale="auto"')
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
        """Sets the scale of the fixed-point head so that the largest score of some images is the largest integer.

        Any scale gives sound certificates. With one that is too small scores are rounded coarsely; with one that is too
        large they are clipped. A hundred images like those of the deployment are enough.

        Args:
            images: as for `score_map`, at least one.

        Raises:
            UsageError: bad images, another head, or scores that are not finite or all 0.
        """
        if self.head != "fixed-point":
            raise UsageError(f"only the fixed-point head has a scale, this network has the {self.head} head")
        batch = self.as_batch(images)
        z = self.real_scores(batch)
        if not z.isfinite().all() or not z.any():
            raise UsageError("the scale cannot be taken from these images: their scores are not finite, or all 0")
        scale = scale_of([z])
        if not is_normal(scale):
            raise UsageError(f"the scale of the fixed-point head must be {NORMAL}, these images give {scale}")
        self.scale = scale
        return self

    def _require_local(self) -> None:
        """The checks of `from_module`."""
        weight = next((p for p in self.net.parameters() if p.is_floating_point()), None)
        if weight is not None:
            if weight.dtype != torch.float32:
                raise UsageError(f"the module's weights must be float32, got {weight.dtype}; convert it with .float()")
            self.normalize.to(weight.device)
        if broken := not_finite(self.net.state_dict()):
            raise UsageError(f"tensor {broken!r} of the module has values that are not finite")
        most = min(64, PIXELS_AT_ONCE // (self.image_size[0] * self.image_size[1]))  # in batches, as in use
        try:
            grid = derive_grid(self.net, self.image_size, self.channels, (1, 3, *([most] if most > 3 else [])))
        except UsageError as error:
            if "channels" not in str(error):
                raise
            raise UsageError(
                f"{error}; the image has one channel for each value of mean and std, {self.channels} here"
            ) from error
        self._grids[self.image_size] = grid
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
        """Image channels."""
        return self.normalize.mean.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.normalize.mean.device

    @property
    def backend(self) -> str:
        """What computes `z`: torch, or the name of the runner's."""
        return "torch" if self.runner is None else self.runner.name

    @property
    def form(self) -> Head:
        """The head itself: its range, its integers, their differentiable form, and the aggregation of regions."""
        return make_head(self.head, self.scale, self.readout, self._frozen)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Real-valued scores `z` [batch, classes, rows, cols] of images in [0, 1]."""
        return self.net(self.normalize(images))

    def grid(self, image_size: tuple[int, int] | None = None) -> RegionGrid:
        """Which pixels each region sees, for images of (height_px, width_px); derived from the layers."""
        size = self.image_size if image_size is None else (image_size[0], image_size[1])
        if size not in self._grids:
            self._grids[size] = derive_grid(self.net, size, self.channels)
        return self._grids[size]

    def real_scores(self, images: object) -> Float[Tensor, "batch classes rows cols"]:
        """`z` in float32, in eval mode, without gradients, in the dtype the scorer was loaded for."""
        return self.forward_batch(self.as_batch(images))

    def forward_batch(self, batch: Float[Tensor, "batch channels height width"]) -> Tensor:
        """`real_scores` of a batch that is what it should be, or, for probes of locality, deliberately is not."""
        self.eval()  # all of it: one batch norm left in train mode would leak across the map
        dtype = self.autocast_dtype
        parts = batch.split(max(1, PIXELS_AT_ONCE // (batch.shape[2] * batch.shape[3])))
        if self.runner is not None:
            return torch.cat([self.runner(part) for part in parts])
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            scores = [self(part.to(self.device, memory_format=torch.channels_last)).float() for part in parts]
        return torch.cat(scores)

    def score_map(self, images: object) -> ScoreMap:
        """The integer score map of a batch.

        Args:
            images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1]; numpy or torch.
                Likewise with one channel for a network of grey images.

        Raises:
            UsageError: another layout, dtype or range, or images too small for the network.
        """
        batch = self.as_batch(images)
        size = (batch.shape[2], batch.shape[3])
        self.grid(size)  # says in a sentence what an image that is too small lacks
        return self.to_scores(self.real_scores(batch), size)

    def to_scores(self, z: Float[Tensor, "batch channels rows cols"], image_size: tuple[int, int]) -> ScoreMap:
        """The head: integers with their range and geometry, from real scores of images of `image_size`."""
        form = self.form
        return form.score_map(form.integers(z), self.grid(image_size), form.slack(z, self.tolerance))

    def integers(self, z: Float[Tensor, "batch classes rows cols"]) -> Tensor:
        """The head alone: integers of the same shape; class scores never fall where `z` rises."""
        return self.form.integers(z)

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Names of the parameters whose size depends on the number of classes."""
        if self.readout is not None:
            return ("readout.second.weight", "readout.skip.weight", "readout.skip.bias")
        return tuple(name for name, _ in list(self.net.named_parameters(prefix="net"))[-2:])

    def freeze(self) -> "RegionScorer":
        """Makes the integer readout once, where there is one; for inference only. Training unmakes it.

        Raises:
            UsageError: weights of the readout are so large that integer sums would not be exact.
        """
        self.eval()
        self._frozen = None if self.readout is None else self.readout.frozen()
        return self

    def train(self, mode: bool = True) -> "RegionScorer":
        """As for every module. In training mode weights change, and the readout with them."""
        if mode:
            self._frozen = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for every module; the readout follows."""
        self._frozen = None
        return super().load_state_dict(*args, **kwargs)

    def fold_batch_norm(self) -> "RegionScorer":
        """Folds every batch norm into the convolution before it, in place; for inference only."""
        self.eval()
        for module in list(self.net.modules()):
            # A subclass with a forward of its own may use what is between the two.
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                names = list(module._modules)
                for name, following in pairwise(names):
                    first, second = module._modules[name], module._modules[following]
                    if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                        module._modules[name] = fuse_conv_bn_eval(first, second)
                        module._modules[following] = nn.Identity()
        return self

    def as_batch(self, images: object) -> Float[Tensor, "batch channels height width"]:
        """Float images in [0, 1] with the network's channels; grey ones are checked as RGB of three equal channels."""
        batch = with_batch_axis(images)
        if self.channels == 6:
            raise UsageError("this network scores ablated images only; deploy it as derandomized smoothing")
        if self.channels == 3 or batch.ndim < 3:
            return as_batch(batch)
        axis = batch.ndim - (1 if batch.dtype in (np.uint8, torch.uint8) else 3)
        if batch.shape[axis] != 1:
            raise UsageError(f"this network takes images of one channel, got {list(batch.shape)}")
        if isinstance(batch, np.ndarray):
            return as_batch(np.repeat(batch, 3, axis))[:, :1]
        return as_batch(batch.repeat_interleave(3, axis))[:, :1]


def is_normal(value: float) -> bool:
    """Can float32 multiply by a value and divide by it: positive, finite, and not so small that digits are lost?

    >>> is_normal(1e-30), is_normal(1e-44), is_normal(1e300), is_normal(float("nan"))
    (True, False, False, False)
    """
    return FLOAT32.tiny <= value <= FLOAT32.max


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
