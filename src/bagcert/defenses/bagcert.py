"""BagCert: a region scorer deployed with a rule and a patch. Loading shipped, local and hub models."""

import copy
import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from bagcert.defenses.base import ScoreMapDefense
from bagcert.devices import resolve_device, tune_malloc
from bagcert.errors import UnreadableError, UsageError, nearest
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
from bagcert.scores import ScoreMap, check_counting, require_sum
from bagcert.threat import PatchLike, PatchThreatModel

ALIASES = {"default": "cifar10"}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class BagCert(ScoreMapDefense):
    """A certified defense: predictions with a proof that no patch of the given size changes them.

    One forward pass gives a score map; the rule reads prediction and certificate from it. Source: Metzen &
    Yatsura, ICLR 2021 ("vote"); Xiang et al., PatchCleanser, USENIX Security 2022 ("double-masking"); docs/method.md.

    Args:
        scorer: the network.
        rule: the deployed rule, a name from `bagcert.rules.RULES`.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        config: where it comes from, for loaded models.
        weights_sha256: of the weights file, for loaded models.
        folder: of that file, for loaded models.

    `locality` is what `check_locality` found, None before it is asked; `load` asks.

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
        config: ModelConfig | None = None,
        weights_sha256: str = "",
        folder: Path | None = None,
    ) -> None:
        get_rule(rule)
        self.scorer = scorer.eval()
        self.class_names, self.image_size = scorer.class_names, scorer.image_size
        self.rule = rule
        self.patch = patch
        self.config = config
        self.weights_sha256 = weights_sha256
        self.folder = folder
        self.locality: LocalityReport | None = None
        self.portable = False
        self.name = config.name if config else type(scorer.net).__name__

    def __repr__(self) -> str:
        dtype = str(self.scorer.autocast_dtype or torch.float32).removeprefix("torch.")
        return (
            f"BagCert({self.name!r}, {len(self.class_names)} classes, patch "
            f"{patch_text(str(self.patch), self.image_size)}, rule {self.rule}, {self.backend} on "
            f"{self.scorer.device} in {dtype})"
        )

    @property
    def backend(self) -> str:
        """What computes the forward pass: torch or onnxruntime."""
        return self.scorer.backend

    @property
    def locality_checked(self) -> bool:
        """Whether the network's locality was measured on its device; see `BagCert.check_locality`."""
        return self.scorer.locality_checked

    def score_map(self, images: np.ndarray | Tensor) -> ScoreMap:
        """Integer scores of a batch: uint8 [batch, height, width, 3] or float [batch, 3, height, width] in [0, 1]."""
        return self.scorer.score_map(images)

    def check_locality(self, portable: bool = False) -> "BagCert":
        """Measures what moves outside a patch's reach on this device, or recalls it, and guards against that.

        Args:
            portable: as for `load`.

        Raises:
            UnsoundError: more moves than a guard could make good.
        """
        self.locality = cached_report(self, thorough=portable)
        require_local(self.locality, portable)
        self.scorer.tolerance = self.locality.tolerance(portable)
        self.portable = portable
        self.scorer.locality_checked = True
        return self

    def to(self, device: str | torch.device) -> "BagCert":
        """Moves the network to a device. Where locality was measured it is measured there as well.

        Args:
            device: auto, cpu, cuda, cuda:N or mps.

        Raises:
            UsageError: no such device, or a backend that runs on the CPU only.
            UnsoundError: as for `load`; the network is then back where it was.
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
        """Writes a model folder that `load` and every command take, with the rule and the patch as they are now.

        A loaded model is written as it was loaded. The network of any other is written as a list of operations, as
        `torch.export` finds them, so that a module of your own needs no code where it is loaded. Geometry is not
        written: it is derived from the operations at each load.

        Args:
            folder: made if it is not there; a model in it is replaced.
            name: of the model, for tables; its own name if it has one.

        Returns:
            The folder.

        Raises:
            UsageError: the network holds an operation that cannot be stored or does not take RGB images, or the patch
                is a threat model that its notation does not describe, as one with allowed placements.
            BagcertError: the folder cannot be written.
        """
        if self.scorer.channels == 1:
            raise UsageError("a model folder is of a network of RGB images, this one takes images of one channel")
        scorer = self._as_configured()
        facts: dict[str, Any] = {
            "name": name or self.name,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "head": self.scorer.head,
            "scale": self.scorer.scale,
            "rule": self.rule,
            "patch": self._notation(),
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
        """The scorer as the config builds it, before batch norm was folded; None where it is another network."""
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
            raise UsageError("this patch cannot be written into a model folder: its notation does not say all of it")
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
) -> BagCert:
    """A model by shipped name (`default`, `digits`, ...), folder, or hub id (`owner/name`).

    Batch norm is folded into the convolutions. Nothing in the model is executed as code.

    That the device counts exactly and that scores outside a patch's reach stand still is measured, the latter once
    per model, device and dtype (`bagcert.locality`). Where they move a little, scores that could be another integer
    count for the attacker and certificates are marked `locality: measured`.

    Args:
        name: as above.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: "float32" or "bfloat16", or torch's own.
        portable: certificates are to hold as well where the attacked image is seen in another batch size or with
            another number of threads, whose kernels may round otherwise: 8 times the drift that was measured is guarded
            against, too. That is an estimate; where you can, certify and deploy in one configuration.
        checked: False leaves the measurement out, for whoever measures next.
        backend: what computes the forward pass, on the CPU: torch or onnxruntime; or auto, the faster of those
            installed. Locality is measured on that backend; heads and rules are the same on all.

    Raises:
        UsageError: no such model, device, dtype or backend, or its libraries are not installed.
        UnreadableError: the files are damaged or not what they should be.
        UnsoundError: on this device sums are not exact, or scores move where they must not.
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
        config=config,
        weights_sha256=weights_sha256(folder),
        folder=folder,
    )
    return model.check_locality(portable) if checked else model


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a dtype given by name or as torch's own.

    >>> dtype_name(torch.bfloat16), dtype_name("float32")
    ('bfloat16', 'float32')

    Raises:
        UsageError: models do not run in it.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise UsageError(f"a dtype is one of {', '.join(DTYPES)}; got {name!r}")
    return name


def shipped_models() -> dict[str, Path]:
    """The models in the package, by name."""
    weights = Path(str(resources.files("bagcert"))) / "weights"
    return {path.parent.name: path.parent for path in sorted(weights.glob(f"*/{CONFIG}"))}


def list_models() -> list[str]:
    """The names that `load` takes without a network: the shipped models and their aliases.

    >>> list_models()
    ['default', 'cifar10', 'cifar10-cpu', 'digits']
    """
    return [*ALIASES, *shipped_models()]


def model_folder(name: str | Path) -> Path:
    """The folder of a model named as in `load`; a hub model is downloaded into the hub's cache.

    Raises:
        UsageError: no such model.
        UnreadableError: the hub cannot be reached or has no such model.
    """
    shipped = shipped_models()
    text = ALIASES.get(str(name), str(name))
    if text in shipped:
        return shipped[text]
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UsageError(f"{text} is a file; a model is the folder with {WEIGHTS} and {CONFIG}")
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "/", "~")):
        return _from_hub(text)
    hint = nearest(text, list_models())
    raise UsageError(f"unknown model {text!r}: not a shipped model, a folder or a hub id (owner/name){hint}")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # the hub's own, the file system's, and those of whatever HTTP library it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnreadableError(
            f"{name!r} is not a folder here, and the hub has no such model within reach: {reason}"
        ) from None
