"""Measurement of the locality of a region scorer."""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bagcert.devices import device_name, dtype_name
from bagcert.errors import BagcertError, UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.locality.activation_bound import activation_bound
from bagcert.locality.probes import Change, Prober, clean_images, places_for, saturated_images, thread_counts
from bagcert.locality.report import FootprintMatch, LocalityReport, Probe
from bagcert.locality.target import Backend, precision, torch_backend
from bagcert.nets.receptive_field.probe import probe_grid
from bagcert.nets.region_scorer import RegionScorer
from bagcert.threat import PatchThreatModel

BATCH_SIZES = (1, 7, 64)  # from 1, which often has special kernels, to one that uses all threads
MORE_BATCH_SIZES = (2, 8, 16, 33)  # only for drift
SHORT_BATCH = 16
SHORT_PIXELS = 2**18  # maximum pixels per batch of the short check, so that loading is fast for large images
RANDOM_PLACES = 4
MOST_ALONE = 4  # places of the adversarial probe with a batch of one image
MOST_SHAPES = 3


def measure(
    model: Any,
    patch: object = None,
    grid: RegionGrid | None = None,
    images: Float[Tensor, "images channels height width"] | None = None,
    thorough: bool = True,
    seed: int = 0,
) -> LocalityReport:
    """Measure the locality of a model on its device and in its dtype.

    Structural probe: NaN in pixel rows and columns, compared with the declared geometry. Numerical probes: NaN, random,
    extreme and adversarial contents of patches at the corners, edges, center and random places, in several batch sizes;
    other images in the batch; other batch sizes and numbers of threads.

    Args:
        model: a defense or a region scorer.
        patch: the patches to test, in the notation of `PatchThreatModel.parse`; default: the deployed patch of the
            defense, or a quarter of each side.
        grid: the declared geometry; default: derived from the layers.
        images: clean images in [0, 1] to test in addition to noise and gray.
        thorough: False selects the short check used at load, with a tenth of the cost and without gradients and drift.

    Returns:
        The report. For a network with a layer that is not local, the report contains the reason for the refusal.
    """
    scorer: RegionScorer = getattr(model, "scorer", model)
    size = scorer.image_size
    shapes = shapes_for(model, patch, size)
    name = getattr(model, "name", type(scorer.net).__name__)
    facts: dict[str, Any] = {
        "model": name,
        "backend": scorer.backend,
        "device": device_name(scorer.device),
        "dtype": dtype_name(scorer.autocast_dtype),
        "threads": torch.get_num_threads(),
        "image_size": size,
        "patches": shapes,
        "thorough": thorough,
        "guardable": scorer.readout is None,
    }
    refusal = dynamic_quantization(scorer)
    try:
        backend = torch_backend(scorer, grid)
    except UnsoundError as error:
        return LocalityReport(
            footprint="unmeasured", probes=(), largest_score=0.0, refusal=refusal or str(error), **facts
        )
    footprint: FootprintMatch = "unmeasured"
    if thorough and not refusal:
        with precision(scorer):
            footprint = compare_footprint(scorer, backend.grid)
    probes, largest = run_probes(backend, shapes, images, thorough, seed)
    report = LocalityReport(footprint=footprint, probes=probes, largest_score=largest, refusal=refusal, **facts)
    if not report.nan_spreads:
        return report
    return replace(report, activation_bound=_proved_bound(scorer, backend.grid))


def run_probes(
    backend: Backend,
    shapes: tuple[tuple[int, int], ...],
    images: Float[Tensor, "images channels height width"] | None,
    thorough: bool,
    seed: int = 0,
) -> tuple[tuple[Probe, ...], float]:
    """Run the numerical probes; return their results and the largest absolute score of clean images."""
    random = torch.Generator().manual_seed(seed)
    size = backend.grid.image_size
    fixed = backend.batch_size
    large = fixed or (max(BATCH_SIZES) if thorough else max(4, min(SHORT_BATCH, SHORT_PIXELS // (size[0] * size[1]))))
    clean = clean_images(size, backend.channels, max(large, SHORT_BATCH), random)
    own = clean[:0] if images is None else images[: len(clean) // 2].cpu().float()
    clean = torch.cat([clean[: len(clean) - len(own)], own])
    places = places_for(size, shapes, random, RANDOM_PLACES)
    prober = Prober(backend, clean, places if thorough else places[:large], random)
    nan = ("NaN",) if backend.takes_nan else ()
    probes = []

    def add(found: dict[str, Change], batch_size: int) -> None:
        for name, change in found.items():
            probes.append(change.probe(f"{name}, batch of {batch_size}", "NaN" if name == "NaN" else "leak"))

    if thorough:
        for batch_size in [fixed] if fixed else BATCH_SIZES:
            add(prober.contents(batch_size, ("random", "extreme", *nan)), batch_size)
        for batch_size, some in [(fixed, places)] if fixed else [(1, places[-MOST_ALONE:]), (SHORT_BATCH, places)]:
            climber = Prober(backend, clean, some, random, prober.seen)
            add({"adversarial": climber.adversarial(batch_size)}, batch_size)
    else:
        add(prober.contents(large, ("mixed", *nan)), large)
        if not fixed:  # also test the kernels for a batch of one image
            add(Prober(backend, clean[1:], places[-1:], random, prober.seen).contents(1, ("mixed", *nan)), 1)
    if large > 1:
        add({"other neighbors": prober.neighbors(large, thorough)}, large)
    if thorough:
        saturated = saturated_images(size, backend.channels, len(clean) - len(own), random)
        add_drift(Prober(backend, torch.cat([saturated, own]), places, random), probes, large)
    return tuple(probes), prober.largest_score


def add_drift(prober: Prober, probes: list[Probe], reference: int) -> None:
    """Add the drift probes: other batch sizes than `reference`, and other numbers of threads."""
    backend, now = prober.backend, torch.get_num_threads()
    if backend.batch_size is None:
        for batch_size in sorted({*BATCH_SIZES, *MORE_BATCH_SIZES} - {reference}):
            change = prober.batch_size(batch_size, reference)
            probes.append(change.probe(f"batch of {batch_size} instead of {reference}", "drift"))
    if backend.threads is not None:
        for count in thread_counts(now):
            change = prober.threads(count, (1, reference) if backend.batch_size is None else (reference,))
            probes.append(change.probe(f"{count} threads instead of {now}", "drift"))


def _proved_bound(scorer: RegionScorer, declared: RegionGrid) -> float | None:
    """The activation bound if the geometry derived from the layers is within the declared one, else None."""
    try:
        local = declared.covers(scorer.grid())
    except BagcertError:
        return None
    bound = activation_bound(scorer) if local else math.inf
    return bound if math.isfinite(bound) else None


def require_local(report: LocalityReport, portable: bool = False) -> None:
    """Refuse a model that is not local on this device, so that certificates would not be sound.

    Raises:
        UnsoundError: the model is not local; the message contains the reason.
    """
    if report.consequence == "refused":
        raise UnsoundError(f"{report.model} is not local on {report.device} in {report.dtype}: {report.reason}")
    if portable and report.across_configurations == "refused":
        why = "too much for certificates that hold across them"
        if not report.guardable:
            why = "and attention pooling needs scores that do not move at all; load it without portable"
        raise UnsoundError(
            f"{report.model} on {report.device} in {report.dtype}: scores move by {report.drift_z:g} from one batch "
            f"size or number of threads to another, {why}"
        )


def compare_footprint(scorer: RegionScorer, declared: RegionGrid) -> FootprintMatch:
    """Compare the regions that NaN in each row and column of pixels reaches with the declared geometry."""
    try:
        measured = probe_grid(scorer, declared.image_size, scorer.channels)
    except UsageError:  # NaN without NaN in the image, for example from a large weight; the numerical probes decide
        return "unmeasured"
    if not declared.covers(measured):
        return "larger"
    return "equal" if measured.covers(declared) else "inside"


def dynamic_quantization(scorer: RegionScorer) -> str:
    """Reason to refuse if a layer is quantized with a range computed from the whole map at run time, else ""."""
    for name, part in scorer.named_modules():
        if "quantized.dynamic" in type(part).__module__:
            return f"{name} ({type(part).__name__}) is quantized dynamically: its range is that of the whole batch"
    return ""


def shapes_for(model: Any, patch: object, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The largest shapes of `patch`, or of the deployed patch of the model."""
    chosen = patch if patch is not None else getattr(model, "patch", None)
    if chosen is None:
        return ((max(1, size[0] // 4), max(1, size[1] // 4)),)
    shapes = PatchThreatModel.parse(chosen, size).shapes  # type: ignore[arg-type]
    return tuple(sorted(shapes, key=lambda shape: -shape[0] * shape[1])[:MOST_SHAPES])
