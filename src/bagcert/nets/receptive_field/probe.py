"""Measurement of the receptive fields of a network.

There are two independent probes (docs/method.md, "Locality is checked"). The structural probe sets the pixels of a row
or column to NaN. The regions that become NaN are the true footprint for any weights, since 0 * NaN is NaN. The
numerical probe changes all pixels of a patch; no bit outside the declared reach may change. The first probe tests the
network, the second the arithmetic of the backend. Winograd and FFT convolutions mix values beyond the receptive field
and fail both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bagcert.errors import UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.nets.receptive_field.derive import eval_mode

CONTENTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "random": lambda under, random: torch.rand(under.shape, generator=random),
    "extreme": lambda under, random: torch.randint(0, 2, under.shape, generator=random).float(),
    "huge": lambda under, random: torch.full(under.shape, 1e30),
}


@dataclass(frozen=True)
class ProbeReport:
    """Results of the structural and the numerical probe.

    Attributes:
        nan_footprint_inside: whether only regions declared to see a pixel became NaN. Always True, because
            `check_locality` raises an error otherwise.
        largest_leak: largest change of an output outside the declared reach of a patch, in units of the output; 0.0 if
            no bit changed, inf if an output was, became or ceased to be NaN.
        measured: the measured grid, or None if the cheaper yes/no check sufficed.
        patches: number of tested combinations of patch and content.
    """

    nan_footprint_inside: bool
    largest_leak: float
    measured: RegionGrid | None
    patches: int


def probe_grid(
    module: nn.Module,
    image_size: tuple[int, int],
    channels: int = 3,
    device: torch.device | str | None = None,
    batch_size: int = 64,
    as_is: bool = False,
) -> RegionGrid:
    """Measure which pixel rows and columns each region depends on, with height + width images that contain NaN.

    The result is exact for networks that propagate NaN, as the convolutions, poolings and activations of torch do.
    Operations that hide NaN (`nan_to_num`, comparisons) are detected only by the numerical probe. Integer and boolean
    outputs are compared with the output for the image without NaN, which may miss pixels without influence on it.

    Args:
        module: maps images [batch, channels, height, width] to a map [batch, classes, rows, columns].
        image_size: (height_px, width_px).
        device: device of the images; default: the device of the module. The module is not moved.
        as_is: whether to measure in the current mode of the module instead of eval mode.

    Raises:
        UsageError: the output is not a single map, or is NaN without NaN in the image.
    """
    height, width = image_size
    image = _random_image(module, (channels, height, width), device, torch.Generator().manual_seed(0))
    with _undisturbed(module, as_is):
        plain = _forward(module, image)[0]
        if not plain.dtype.is_floating_point:
            changed = lambda out: out != plain  # noqa: E731
        elif plain.isnan().any():
            raise UsageError("the network returns NaN for an image without any; its weights may not be finite")
        else:
            changed = torch.isnan
        seen = []
        for axis, pixels in enumerate(image_size):
            found = []
            for start in range(0, pixels, batch_size):
                count = min(batch_size, pixels - start)
                batch = image.repeat(count, 1, 1, 1)
                for k in range(count):
                    batch[k].select(1 + axis, start + k).fill_(torch.nan)
                # A region sees the pixel line if any class, anywhere along the line, does.
                found.append(changed(_forward(module, batch, plain.shape)).any(1).any(2 - axis))
            seen.append(torch.cat(found).T.cpu().numpy())
    return RegionGrid(*seen)


def check_locality(
    module: nn.Module,
    image_size: tuple[int, int],
    declared: RegionGrid,
    channels: int = 3,
    device: torch.device | str | None = None,
    batch_size: int = 64,
    as_is: bool = False,
    patch: tuple[int, int] | None = None,
    seed: int = 0,
) -> ProbeReport:
    """Check a network against a declared grid with the structural and the numerical probe.

    The structural probe uses the variant with fewer images: one per pixel row and column (`probe_grid`), or one per
    region row and column, with NaN in all pixels that the regions of that row or column are declared not to see.

    Args:
        module, image_size, channels, device, batch_size, as_is: as for `probe_grid`.
        declared: the grid on which certificates are based.
        patch: (height_px, width_px) of the patches of the numerical probe; default: a quarter of each side. They are
            placed in the corners, in the center and at three random places, with three contents each.

    Returns:
        The report. The caller decides whether a numerical leak is acceptable.

    Raises:
        UnsoundError: a region depends on a pixel outside its declared receptive field; the message names both.
        UsageError: as for `probe_grid`.
    """
    if declared.image_size != tuple(image_size):
        raise UsageError(f"the declared grid is for images of {declared.image_size} px, not {tuple(image_size)} px")
    random = torch.Generator().manual_seed(seed)
    image = _random_image(module, (channels, *image_size), device, random)
    measured = None
    cheaper = sum(declared.map_size) < sum(image_size)
    if not cheaper or _sees_more(module, image, declared, batch_size, as_is):
        measured = probe_grid(module, image_size, channels, device, batch_size, as_is)
        _require_covered(measured, declared)
        if cheaper:
            raise UnsoundError(
                "the network reaches beyond its declared receptive field when several pixel rows or columns change "
                "at once"
            )
    height, width = image_size
    shape = patch or (max(1, height // 4), max(1, width // 4))
    places = _places(image_size, shape, random)
    with _undisturbed(module, as_is):
        leaks = [
            _largest_leak(module, image, declared, shape, places, content, random, batch_size)
            for content in CONTENTS.values()
        ]
    return ProbeReport(True, max(leaks), measured, len(leaks) * len(places))


def _sees_more(module: nn.Module, image: Tensor, declared: RegionGrid, batch_size: int, as_is: bool) -> bool:
    """Whether a region depends on pixels that it is declared not to see, or the map has another size."""
    with _undisturbed(module, as_is):
        plain = _forward(module, image)[0]
        if tuple(plain.shape[1:]) != declared.map_size:
            return True
        for axis, table in enumerate((declared.rows_seen, declared.cols_seen)):
            for start in range(0, len(table), batch_size):
                unseen = ~torch.as_tensor(table[start : start + batch_size], device=image.device)
                batch = image.masked_fill(
                    unseen[:, None, :, None] if axis == 0 else unseen[:, None, None, :], torch.nan
                )
                out = _forward(module, batch, plain.shape)
                changed = out.isnan() if plain.dtype.is_floating_point else out != plain
                for k, line in enumerate(changed):  # only the row or column of regions tested by this image
                    if line.select(1 + axis, start + k).any():
                        return True
    return False


def _require_covered(measured: RegionGrid, declared: RegionGrid) -> None:
    _require_map_size(measured.map_size, declared)
    for axis, found, stated in (
        ("row", measured.rows_seen, declared.rows_seen),
        ("column", measured.cols_seen, declared.cols_seen),
    ):
        beyond = np.argwhere(found & ~stated)
        if len(beyond):
            region, pixel = beyond[0]
            raise UnsoundError(
                f"the network reaches beyond its declared receptive field: the scores of region {axis} {region} "
                f"depend on pixel {axis} {pixel}, which it is declared not to see ({len(beyond)} such pairs); "
                "batch norm in train mode, or a layer that works on the whole map, does that"
            )


def _largest_leak(
    module: nn.Module,
    image: Float[Tensor, "1 channels height width"],
    declared: RegionGrid,
    shape: tuple[int, int],
    places: list[tuple[int, int]],
    content: Callable[[Tensor, torch.Generator], Tensor],
    random: torch.Generator,
    batch_size: int,
) -> float:
    """Largest change outside the reach of a patch of `shape`, over all `places`."""
    touched_rows, touched_cols = declared.touched_rows(shape), declared.touched_cols(shape)
    leak = 0.0
    for start in range(0, len(places), batch_size):
        here = places[start : start + batch_size]
        before = image.repeat(len(here), 1, 1, 1)
        after = before.clone()
        for k, (top, left) in enumerate(here):
            under = after[k, :, top : top + shape[0], left : left + shape[1]]
            under.copy_(content(under, random))
        # Same batch size and position in the batch, so that only the patch can cause a difference.
        out_before = _forward(module, before)
        out_after = _forward(module, after, out_before.shape[1:])
        _require_map_size(tuple(out_before.shape[2:]), declared)
        reach = np.stack([np.outer(touched_rows[top], touched_cols[left]) for top, left in here])
        outside = ~torch.as_tensor(reach, device=out_before.device)[:, None].expand_as(out_before)
        a, b = out_before[outside].double(), out_after[outside].double()
        moved = a != b  # NaN always counts as changed, even if it was NaN before
        if moved.any():
            leak = max(leak, float((a - b)[moved].abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
    return leak


def _places(image_size: tuple[int, int], shape: tuple[int, int], random: torch.Generator) -> list[tuple[int, int]]:
    """(top, left) of patches in the corners, in the center and at three random places, without duplicates."""
    room = (image_size[0] - shape[0], image_size[1] - shape[1])
    if min(room) < 0 or min(shape) < 1:
        raise UsageError(f"a patch of {shape} px does not fit into an image of {tuple(image_size)} px")
    places = [(0, 0), (0, room[1]), (room[0], 0), room, (room[0] // 2, room[1] // 2)]
    for _ in range(3):
        top, left = (int(torch.randint(0, side + 1, (), generator=random)) for side in room)
        places.append((top, left))
    return list(dict.fromkeys(places))


def _random_image(
    module: nn.Module, size: tuple[int, int, int], device: torch.device | str | None, random: torch.Generator
) -> Tensor:
    """Random image [1, *size] in [0, 1] with the dtype and device of the module's weights."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.rand(1, *size, generator=random).to(device or weight.device, weight.dtype)


def _require_map_size(found: tuple[int, ...], declared: RegionGrid) -> None:
    if found != declared.map_size:
        raise UnsoundError(f"the network returns a map of {found} regions, declared are {declared.map_size}")


def _forward(module: nn.Module, images: Tensor, expected: torch.Size | None = None) -> Tensor:
    """Compute the map of images and check its shape; `expected` is [classes, rows, columns]."""
    out = module(images)
    if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != len(images):
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"a network must return one map [batch, classes, rows, columns], this one returns {found}")
    if expected is not None and out.shape[1:] != expected:
        raise UnsoundError(
            f"the network returns a map of {list(expected)} for one image and of {list(out.shape[1:])} for another: "
            "its size depends on the pixels"
        )
    return out


@contextmanager
def _undisturbed(module: nn.Module, as_is: bool) -> Iterator[None]:
    """Context manager without gradients, by default in eval mode; restores buffers, which NaN could corrupt."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), nullcontext() if as_is else eval_mode(module):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
