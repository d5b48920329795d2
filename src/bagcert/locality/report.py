"""What a measurement of locality found, and what follows from it."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Consequence = Literal["exact", "guarded", "refused"]
Kind = Literal["leak", "NaN", "drift"]
FootprintMatch = Literal["equal", "inside", "larger", "unmeasured"]

# Rounding that mixes neighbours (Winograd in float32) leaks about 1e-6 of the largest score, quantization over the
# whole map 1e-3 and more.
LEAK_LIMIT = 1e-4
# bfloat16 keeps 8 bits: another order of summation moves scores by 1/256 of themselves and a little more.
DRIFT_LIMIT = 2e-2
# float32 and bfloat16 end at 3.4e38; what is left covers the rounding of weights and of sums.
OVERFLOW = 1e30
SAFETY = 4.0  # a measured maximum is no bound
# Likewise. Searches of up to 60 s for images on which the shipped CIFAR-10 model drifts found 2.1 times what
# the probes find.
DRIFT_SAFETY = 8.0


@dataclass(frozen=True)
class Probe:
    """One way of provoking a change, and the largest change it provoked where there should be none.

    Attributes:
        name: what was done.
        kind: "leak" within one configuration, "NaN" likewise for patches of NaN, "drift" across configurations.
        trials: how many images were compared.
        scores: how many scores were compared, those in reach of the patch left out.
        largest_z: the largest change of a real-valued score; inf where one became, or ceased to be, NaN or infinite.
        largest_levels: the largest change of an integer score.
    """

    name: str
    kind: Kind
    trials: int
    scores: int
    largest_z: float
    largest_levels: int


@dataclass(frozen=True)
class LocalityReport:
    """What was measured of one model on one device and dtype.

    Attributes:
        model: its name.
        backend: "torch" or "onnxruntime".
        device, dtype, threads: where and how.
        image_size: (height_px, width_px).
        patches: (height_px, width_px) of the patches tried.
        footprint: what NaN in pixel lines reached, compared with the declared receptive fields.
        probes: the numerical ones.
        largest_score: the largest |z| of clean images, the scale that limits refer to; inf where one is not finite.
        activation_bound: no value in the net exceeds it, whatever the image; None where unknown or not asked for. It
            is asked for where NaN spreads, or may spread, beyond the receptive fields though the layers are local: see
            `overflow`.
        refusal: a reason to refuse whatever the probes say, or "".
        thorough: all of it, as `bagcert doctor` does, or the short check at load.
        guardable: whether a rule could count small changes for the attacker. Attention pooling has no worst case that
            could be named, so that there all that moves is refused.
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
        """The largest change within one configuration; where NaN causes a finite one, that counts as well."""
        finite = [p.largest_z for p in self.probes if p.kind == "NaN" and math.isfinite(p.largest_z)]
        return max(self._largest("leak"), *finite, 0.0)

    @property
    def drift_z(self) -> float:
        """The largest change across configurations."""
        return self._largest("drift")

    @property
    def leak_levels(self) -> int:
        """`leak_z` as it arrives in integer scores."""
        return max((probe.largest_levels for probe in self.probes if probe.kind == "leak"), default=0)

    @property
    def drift_levels(self) -> int:
        """`drift_z` as it arrives in integer scores."""
        return max((probe.largest_levels for probe in self.probes if probe.kind == "drift"), default=0)

    @property
    def nan_spreads(self) -> bool:
        """Does NaN in a pixel reach regions that are declared not to see it?"""
        return self.footprint == "larger" or any(
            probe.largest_z == math.inf for probe in self.probes if probe.kind == "NaN"
        )

    @property
    def is_finite(self) -> bool:
        """Are all scores of clean images finite? Otherwise what a patch does to them cannot be told."""
        return math.isfinite(self.largest_score)

    @property
    def cannot_overflow(self) -> bool:
        """Is it proved that no value in the net becomes infinite or NaN?"""
        return self.activation_bound is not None and self.activation_bound < OVERFLOW

    @property
    def consequence(self) -> Consequence:
        """Within one configuration: exact where nothing moved at all, guarded below the limit, else refused."""
        if self.refusal or not self.is_finite or (self.nan_spreads and not self.cannot_overflow):
            return "refused"
        return self._consequence(self.leak_z, LEAK_LIMIT)

    @property
    def across_configurations(self) -> Consequence:
        """The same for a certificate that is to hold where batch sizes or threads are others."""
        if self.consequence == "refused":
            return "refused"
        drift = self._consequence(self.drift_z, DRIFT_LIMIT)
        return self.consequence if drift == "exact" else drift

    def tolerance(self, portable: bool = False) -> float:
        """How far `z` may move, for the guard: 4 times the largest leak measured; 0 if none.

        Portable: 8 times the largest drift, if that is more. It is an estimate from a few images, not a bound.

        >>> report = LocalityReport("m", "torch", "cpu", "float32", 1, (8, 8), (), "equal", (), 1.0, "", True)
        >>> report.consequence, report.tolerance()
        ('exact', 0.0)
        """
        leak = SAFETY * self.leak_z
        return max(leak, DRIFT_SAFETY * self.drift_z) if portable else leak

    @property
    def reason(self) -> str:
        """Why it is refused, in a clause; "" if it is not."""
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
        """Ready for JSON. A change that is not finite is null."""
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
        """Of a change, with its limit as a share of the largest score."""
        if moved == 0:
            return "exact"
        return "guarded" if self.guardable and moved <= limit * self.largest_score < math.inf else "refused"

    def _largest(self, kind: Kind) -> float:
        return max((probe.largest_z for probe in self.probes if probe.kind == kind), default=0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
