"""BagCert, a region scorer deployed with a rule and a patch; and loading of shipped, local and hub models."""

import copy
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from bagcert.defenses.region_defense import RegionDefense
from bagcert.devices import resolve_device, tune_malloc
from bagcert.errors import UnreadableError, UsageError, nearest, reason_of
from bagcert.locality import LocalityReport, cached_report, require_local
from bagcert.locality.cache import cache_folder
from bagcert.nets.region_scorer import RegionScorer, not_finite
from bagcert.nets.runtimes import fastest_backend, get_runner
from bagcert.nets.saved_model import (
    CONFIG,
    GRAPH,
    WEIGHTS,
    ModelConfig,
    first_line,
    normalization,
    patch_text,
    read_model,
    weights_sha256,
    write_model,
)
from bagcert.rules import get_rule
from bagcert.scores import check_counting, require_sum
from bagcert.threat import PatchLike, PatchThreatModel

ALIASES = {"default": "cifar10", "cifar10-cpu": "cifar10"}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class BagCert(RegionDefense):
    """Certified defense based on a region scorer: certificates prove that no patch of the threat changes a prediction.

    A single forward pass computes a score map. The rule derives predictions and certificates from it.

    Source: Metzen & Yatsura, ICLR 2021 ("vote"); Xiang et al., PatchCleanser, USENIX Security 2022
    ("double-masking"); docs/method.md.

    Args:
        rule: the deployed rule, a name from `bagcert.rules.RULES`.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        masks_per_axis: the deployed limit, see the property `masks_per_axis`; None keeps the limit of the scorer.
        config, weights_sha256, folder: of a loaded model.

    Attributes:
        locality: report of `check_locality`, or None if it was not called. `load` calls it.

    >>> model = load("digits")
    >>> model.image_size, len(model.class_names)
    ((8, 8), 10)
    """

    def __init__(
        self,
        scorer: RegionScorer,
        rule: str = "double-masking",
        *,
        patch: PatchLike = 5,
        masks_per_axis: int | None = None,
        config: ModelConfig | None = None,
        weights_sha256: str = "",
        folder: Path | None = None,
    ) -> None:
        get_rule(rule)
        super().__init__(scorer, rule, patch, config.name if config else type(scorer.net).__name__)
        self.config = config
        self.weights_sha256 = weights_sha256
        self.folder = folder
        self.locality: LocalityReport | None = None
        self.portable = False
        if masks_per_axis is not None:
            self.masks_per_axis = masks_per_axis

    def __repr__(self) -> str:
        dtype = str(self.scorer.autocast_dtype or torch.float32).removeprefix("torch.")
        return (
            f"BagCert({self.name!r}, {len(self.class_names)} classes, patch "
            f"{patch_text(str(self.patch), self.image_size)}, rule {self.rule}, {self.backend} on "
            f"{self.scorer.device} in {dtype})"
        )

    @property
    def backend(self) -> str:
        """Name of the backend of the forward pass: torch or onnxruntime."""
        return self.scorer.backend

    @property
    def masks_per_axis(self) -> int | None:
        """Largest number of masks per axis, or None for all windows of the patch.

        With k masks per axis, neighboring windows are merged. Double masking then needs at most k^2 (k^2 + 1) / 2 pairs
        of masks per shape, and certifies fewer images. Predictions and certificates depend on this number like on the
        patch. See `RegionGrid.windows`.
        """
        return self.scorer.masks_per_axis

    @masks_per_axis.setter
    def masks_per_axis(self, most: int | None) -> None:
        if most is not None and most < 1:
            raise UsageError(f"the number of masks per axis must be at least 1, got {most}")
        self.scorer.masks_per_axis = most

    def check_locality(self, portable: bool = False) -> "BagCert":
        """Measure how much scores outside a patch's reach change on this device, and set the tolerance accordingly.

        A cached report is used if available.

        Args:
            portable: as for `load`.

        Raises:
            UnsoundError: scores change too much for sound certificates.
        """
        self.locality = cached_report(self, thorough=portable)
        require_local(self.locality, portable)
        self.scorer.tolerance = self.locality.tolerance(portable)
        self.portable = portable
        self.scorer.locality_checked = True
        return self

    def to(self, device: str | torch.device) -> "BagCert":
        """Move the network to a device (auto, cpu, cuda, cuda:N or mps), in place.

        If locality was measured before, it is measured on the new device.

        Raises:
            UsageError: unknown device, or a backend that runs on the CPU only.
            UnsoundError: as for `load`; the network is moved back to the previous device.
        """
        target, source = resolve_device(str(device)), self.scorer.device
        if target.type != "cpu" and self.scorer.runner is not None:
            raise UsageError(f"the backend {self.backend} runs on the CPU, got the device {target}")
        check_counting(target)
        before = self.locality, self.scorer.tolerance, self.scorer.locality_checked
        try:
            self._move(target)
            if self.locality is not None:
                self.check_locality(self.portable)
        except BaseException:
            self._move(source)
            self.locality, self.scorer.tolerance, self.scorer.locality_checked = before
            raise
        return self

    def _move(self, device: torch.device) -> None:
        self.scorer.to(device).freeze()
        self.scorer.locality_checked = False

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Save the model with its current rule and patch to a folder that `load` and all commands accept.

        A loaded model is saved with its architecture. Other networks are saved as the list of operations found by
        `torch.export`, so loading them does not need their code. The geometry is not saved; it is derived from the
        operations at each load.

        Args:
            folder: created if it does not exist; an existing model in it is replaced.
            name: name of the model for tables; defaults to its current name.

        Raises:
            UsageError: the network contains an operation that cannot be saved or does not take RGB images, or the patch
                cannot be expressed in the patch notation (for example with restricted placements).
            BagcertError: the folder cannot be written.
        """
        if self.scorer.channels == 1:
            raise UsageError("a saved model must take RGB images, this one takes images of one channel")
        scorer = self._as_configured()
        facts: dict[str, Any] = {
            "name": name or self.name,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "head": self.scorer.head,
            "scale": self.scorer.scale,
            "rule": self.rule,
            "patch": self._notation(),
            "masks_per_axis": self.masks_per_axis,
        }
        if self.config is None:
            normalize, readout = self.scorer.normalize, self.scorer.readout
            facts |= {"mean": normalize.mean.flatten().tolist(), "std": normalize.std.flatten().tolist()}
            if readout is not None:
                facts |= {"values": readout.values, "attention_heads": readout.heads}
                facts["hidden"] = readout.first.out_features
        else:
            facts = self.config.model_dump() | facts | normalization(self.scorer.state_dict(), self.config)
        if scorer is None:
            facts |= {"architecture": GRAPH, "width": None, "depth": None, "padded": True}
        try:
            config = ModelConfig.model_validate(facts)
        except ValidationError as error:
            raise UsageError(f"this model cannot be saved: {first_line(error)}") from None
        write_model(Path(folder), scorer or self.scorer, config)
        return Path(folder)

    def _as_configured(self) -> RegionScorer | None:
        """The scorer with the layers of the config, before folding batch norm; None if the network was replaced."""
        if self.config is None or self.config.architecture == GRAPH:
            return None
        with torch.device("meta"):
            built = self.config.build()
        if _same_layers(built, self.scorer):
            return self.scorer
        if self.folder is None:
            return None
        try:
            kept, _ = read_model(self.folder)
        except UnreadableError:
            return None
        folded = copy.deepcopy(kept).fold_batch_norm()
        mine, theirs = self.scorer.state_dict(), folded.state_dict()
        same = _same_layers(folded, self.scorer) and all(torch.equal(mine[key].cpu(), theirs[key]) for key in theirs)
        return kept if same else None

    def _notation(self) -> str:
        threat = PatchThreatModel.parse(self.patch, self.image_size)
        if threat != PatchThreatModel.parse(threat.notation, self.image_size):
            raise UsageError("this patch cannot be saved with a model: the patch notation cannot express it")
        return threat.notation


def _same_layers(first: RegionScorer, second: RegionScorer) -> bool:
    mine, theirs = ({name: t.shape for name, t in net.state_dict().items()} for net in (first, second))
    return mine == theirs and repr(first.net) == repr(second.net) and repr(first.readout) == repr(second.readout)


def load(
    name: str | Path = "default",
    device: str = "auto",
    *,
    dtype: str | torch.dtype = "float32",
    portable: bool = False,
    checked: bool = True,
    backend: str = "torch",
    masks_per_axis: int | None = None,
) -> BagCert:
    """Load a model by name (`default`, `digits`, ...), folder, or hub id (`owner/name`).

    Batch norm is folded into the convolutions. No code from the model is executed.

    Loading checks that sums are exact on the device, and measures whether scores outside a patch's reach change, once
    per model, device and dtype (`bagcert.locality`). If they change slightly, certificates account for the change and
    are marked `locality: measured`.

    Args:
        name: name of a shipped model, path of a model folder, or hub id.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: "float32" or "bfloat16", or the corresponding `torch.dtype`.
        portable: whether certificates must also hold if the attacked image is processed with another batch size or
            number of threads, whose kernels may round differently. Certificates then also account for 8 times the
            measured drift. This is an estimate; if possible, certify and deploy in the same configuration.
        checked: if False, skip the measurement of locality. Certificates are then marked `locality: unchecked`.
        backend: backend of the forward pass: "torch", "onnxruntime" (CPU only), or "auto" for the fastest installed
            one. Locality is measured on that backend. Heads and rules do not depend on it.
        masks_per_axis: limit for the masks per axis instead of that of the model, see `BagCert.masks_per_axis`.

    Raises:
        UsageError: unknown model, device, dtype or backend, or a missing library.
        UnreadableError: the model files are damaged or invalid.
        UnsoundError: sums are not exact on this device, or scores outside a patch's reach change too much.
    """
    dtype = dtype_name(dtype)
    chosen = fastest_backend(device, dtype) if backend == "auto" else backend
    target = resolve_device("cpu" if device == "auto" and chosen != "torch" else device)
    if target.type == "cpu":
        tune_malloc()
    folder = model_folder(name)
    scorer, config = read_model(folder)
    try:
        if not get_rule(config.rule).pools:
            require_sum(scorer.readout, f"the rule {config.rule}", "use double-masking or detection")
        PatchThreatModel.parse(config.patch, scorer.image_size)
    except UsageError as error:
        raise UnreadableError(f"{folder / CONFIG} cannot be deployed: {error}") from None
    if broken := not_finite(scorer.fold_batch_norm().state_dict()):
        raise UnreadableError(f"tensor {broken!r} in {folder / WEIGHTS} is not finite with batch norm folded into it")
    scorer.to(target).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scorer.freeze().autocast_dtype = DTYPES[dtype]
    check_counting(target)
    cache = cache_folder()
    scorer.runner = get_runner(chosen, scorer, DTYPES[dtype], None if cache is None else cache / "onnx")
    model = BagCert(
        scorer,
        config.rule,
        patch=config.patch,
        masks_per_axis=masks_per_axis,
        config=config,
        weights_sha256=weights_sha256(folder),
        folder=folder,
    )
    return model.check_locality(portable) if checked else model


def dtype_name(dtype: str | torch.dtype) -> str:
    """Normalize a dtype given by name or as `torch.dtype` to its name.

    >>> dtype_name(torch.bfloat16), dtype_name("float32")
    ('bfloat16', 'float32')

    Raises:
        UsageError: unsupported dtype.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise UsageError(f"a dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return name


def shipped_models() -> dict[str, Path]:
    """Folders of the models included in the package, by name."""
    weights = Path(str(resources.files("bagcert"))) / "weights"
    return {path.parent.name: path.parent for path in sorted(weights.glob(f"*/{CONFIG}"))}


def list_models() -> list[str]:
    """List the names of the models included in the package, with their aliases.

    >>> list_models()
    ['default', 'cifar10-cpu', 'cifar10', 'cifar10-small', 'digits']
    """
    return [*ALIASES, *shipped_models()]


def model_folder(name: str | Path) -> Path:
    """Find the folder of a model by the `name` argument of `load`; hub models are downloaded to the hub's cache.

    Raises:
        UsageError: unknown model.
        UnreadableError: the hub cannot be reached or has no such model.
    """
    shipped = shipped_models()
    text = ALIASES.get(str(name), str(name))
    if text in shipped:
        return shipped[text]
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UsageError(f"{text} is a file; give the model folder with {WEIGHTS} and {CONFIG}")
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "/", "~")):
        return _from_hub(text)
    hint = nearest(text, list_models())
    raise UsageError(f"unknown model {text!r}: not a shipped model, a folder or a hub id (owner/name){hint}")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # errors of the hub, the file system or an HTTP library
        raise UnreadableError(
            f"{name!r} is not a local folder, and it cannot be downloaded from the hub: {reason_of(error)}"
        ) from None
