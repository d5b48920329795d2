"""Report of a locality measurement and its consequence for certificates."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Consequence = Literal["exact", "guarded", "refused"]
Kind = Literal["leak", "NaN", "drift"]
FootprintMatch = Literal["equal", "inside", "larger", "unmeasured"]

# Rounding that mixes neighboring regions (Winograd in float32) leaks about 1e-6 of the largest score; quantization over
# the whole map leaks 1e-3 and more.
LEAK_LIMIT = 1e-4
# bfloat16 has 8 significant bits: another order of summation changes scores by about 1/256 of their value.
DRIFT_LIMIT = 2e-2
# float32 and bfloat16 overflow at 3.4e38; the difference covers the rounding of weights and sums.
OVERFLOW = 1e30
SAFETY = 4.0  # a measured maximum is not a proven bound
# Likewise. Searches of up to 60 s for images on which the shipped CIFAR-10 model drifts found 2.1 times the drift that
# the probes find.
DRIFT_SAFETY = 8.0


@dataclass(frozen=True)
class Probe:
    """Result of one probe: the largest change of scores that should not change.

    Attributes:
        kind: "leak" within one configuration, "NaN" within one configuration for patches of NaN, or "drift" across
            configurations.
        scores: number of compared scores; scores in reach of the patch are excluded.
        largest_z: largest change of a real-valued score; inf if a score was, became, or ceased to be NaN or infinite.
    """

    name: str
    kind: Kind
    trials: int
    scores: int
    largest_z: float
    largest_levels: int


@dataclass(frozen=True)
class LocalityReport:
    """Locality measurement of one model on one device and dtype.

    Attributes:
        image_size: (height_px, width_px).
        patches: (height_px, width_px) of the tested patches.
        footprint: regions reached by NaN in pixel rows and columns, compared with the declared receptive fields.
        largest_score: largest |z| of clean images, to which limits are relative; inf if one is not finite.
        activation_bound: bound on all values in the network for any image, or None if unknown or not needed. It is
            needed if NaN spreads beyond the receptive fields although the layers are local: see `cannot_overflow`.
        refusal: reason to refuse the model regardless of the probes, or "".
        thorough: whether this is the full measurement, as by `bagcert doctor`, or the short check at load.
        guardable: whether rules can account for small changes. Attention pooling has no known worst case, so any change
            is refused.
    """

    model: str
    backend: str
    device: str
    dtype: str
    threads: int
    image_size: tuple[int, int]
    patches: tuple[tuple[int, int], ...]
    footprint: FootprintMatch
    probes: tuple[Probe, ...]
    largest_score: float
    refusal: str
    thorough: bool
    activation_bound: float | None = None
    guardable: bool = True

    @property
    def leak_z(self) -> float:
        """Largest change within one configuration, including finite changes caused by NaN."""
        finite = [p.largest_z for p in self.probes if p.kind == "NaN" and math.isfinite(p.largest_z)]
        return max(self._largest("leak"), *finite, 0.0)

    @property
    def drift_z(self) -> float:
        """Largest change across configurations."""
        return self._largest("drift")

    @property
    def leak_levels(self) -> int:
        """Largest change of an integer score within one configuration."""
        return max((probe.largest_levels for probe in self.probes if probe.kind == "leak"), default=0)

    @property
    def drift_levels(self) -> int:
        """Largest change of an integer score across configurations."""
        return max((probe.largest_levels for probe in self.probes if probe.kind == "drift"), default=0)

    @property
    def nan_spreads(self) -> bool:
        """Whether NaN in a pixel reaches regions that are declared not to see it."""
        return self.footprint == "larger" or any(
            probe.largest_z == math.inf for probe in self.probes if probe.kind == "NaN"
        )

    @property
    def is_finite(self) -> bool:
        """Whether all scores of clean images are finite; otherwise the influence of a patch cannot be measured."""
        return math.isfinite(self.largest_score)

    @property
    def cannot_overflow(self) -> bool:
        """Whether it is proved that no value in the network becomes infinite or NaN."""
        return self.activation_bound is not None and self.activation_bound < OVERFLOW

    @property
    def consequence(self) -> Consequence:
        """Consequence within one configuration: exact if nothing changed, guarded below the limit, else refused."""
        if self.refusal or not self.is_finite or (self.nan_spreads and not self.cannot_overflow):
            return "refused"
        return self._consequence(self.leak_z, LEAK_LIMIT)

    @property
    def across_configurations(self) -> Consequence:
        """Consequence for certificates that must hold for other batch sizes and numbers of threads."""
        if self.consequence == "refused":
            return "refused"
        drift = self._consequence(self.drift_z, DRIFT_LIMIT)
        return self.consequence if drift == "exact" else drift

    def tolerance(self, portable: bool = False) -> float:
        """Tolerance of `z` for the guard: 4 times the largest measured leak, 0 if there is none.

        With `portable`, at least 8 times the largest drift. This is an estimate from a few images, not a bound.

        >>> report = LocalityReport("m", "torch", "cpu", "float32", 1, (8, 8), (), "equal", (), 1.0, "", True)
        >>> report.consequence, report.tolerance()
        ('exact', 0.0)
        """
        leak = SAFETY * self.leak_z
        return max(leak, DRIFT_SAFETY * self.drift_z) if portable else leak

    @property
    def reason(self) -> str:
        """Reason for a refusal, or "" if the model is not refused."""
        if self.refusal:
            return self.refusal
        if not self.is_finite:
            return "an image without a patch has scores that are NaN or infinite"
        if self.nan_spreads and not self.cannot_overflow:
            return "NaN in a pixel reaches regions that are declared not to see it"
        if self.consequence == "refused":
            limit = LEAK_LIMIT * self.largest_score
            name = next(p.name for p in self.probes if p.kind != "drift" and p.largest_z == self.leak_z)
            if not self.guardable:
                return (
                    f"scores outside a patch's reach moved by {self.leak_z:g} ({name}), and attention pooling needs "
                    "scores that do not move at all"
                )
            return f"scores outside a patch's reach moved by {self.leak_z:g} ({name}), above the limit of {limit:g}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON; values that are not finite become None."""
        values = asdict(self)
        values["image_size"] = list(self.image_size)
        values["patches"] = [list(patch) for patch in self.patches]
        values["probes"] = [{**probe, "largest_z": _finite(probe["largest_z"])} for probe in values["probes"]]
        return {
            **values,
            "largest_score": _finite(self.largest_score),
            "activation_bound": None if self.activation_bound is None else _finite(self.activation_bound),
            "leak_z": _finite(self.leak_z),
            "leak_levels": self.leak_levels,
            "drift_z": _finite(self.drift_z),
            "drift_levels": self.drift_levels,
            "consequence": self.consequence,
            "across_configurations": self.across_configurations,
            "reason": self.reason,
        }

    def _consequence(self, moved: float, limit: float) -> Consequence:
        """Consequence of a change `moved`, with its limit as a share of the largest score."""
        if moved == 0:
            return "exact"
        return "guarded" if self.guardable and moved <= limit * self.largest_score < math.inf else "refused"

    def _largest(self, kind: Kind) -> float:
        return max((probe.largest_z for probe in self.probes if probe.kind == kind), default=0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
