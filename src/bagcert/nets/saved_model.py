"""A model on disk: a folder with `model.safetensors` and `config.json`. Nothing in it is ever executed."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from bagcert.aggregation import check_readout
from bagcert.errors import CONTROL, BagcertError, UnreadableError, UsageError, shown
from bagcert.io.files import read_regular, write_together
from bagcert.nets import get_architecture
from bagcert.nets.attention_pooling import AttentionReadout
from bagcert.nets.heads import HeadName
from bagcert.nets.region_scorer import RegionScorer, not_finite

WEIGHTS, CONFIG = "model.safetensors", "config.json"

MAX_WEIGHTS_BYTES = 1 << 31
"""Weights are read into memory as a whole; half a billion float32 values are more than any region scorer needs."""
MAX_CONFIG_BYTES = 1 << 24
"""100,000 class names and a recipe fit well."""


def _without_controls(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("a name must not hold control characters")
    return text


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    json.dumps(values, allow_nan=False)  # what is printed as JSON later must not fail then
    return values


Name = Annotated[str, Field(max_length=1000), AfterValidator(_without_controls)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, le=16384)]


class ModelConfig(BaseModel):
    """What `config.json` holds: how to build the net, what it is deployed as, and where it comes from.

    Limits, so that a damaged or hostile file costs no more than an error: width 65536, depth 4096, image sides
    16384 px, 100000 classes, names of 1000 characters on one line.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    name: Name
    architecture: Name
    width: int = Field(ge=1, le=65536)
    depth: int = Field(ge=1, le=4096)
    padded: bool = True
    head: HeadName
    values: int | None = Field(default=None, ge=1, le=1024)
    attention_heads: int | None = Field(default=None, ge=1, le=1024)
    hidden: int | None = Field(default=None, ge=1, le=1024)
    scale: float = Field(gt=0, allow_inf_nan=False)
    mean: list[Finite] = Field(min_length=3, max_length=6)
    std: list[Annotated[Finite, Field(gt=0)]] = Field(min_length=3, max_length=6)
    class_names: list[Name] = Field(min_length=2, max_length=100_000)
    image_size: tuple[Pixels, Pixels]
    rule: Name
    patch: Name
    recipe: Annotated[dict[str, Any], AfterValidator(_as_json)] = {}
    provenance: Annotated[dict[str, Any], AfterValidator(_as_json)] = {}

    @model_validator(mode="after")
    def _readout_fits_the_head(self) -> "ModelConfig":
        sizes = (self.values, self.attention_heads, self.hidden)
        if self.head == "attention-pooling":
            check_readout(*sizes, ablated=self.ablated)
        elif any(size is not None for size in sizes):
            raise ValueError(
                f"values, attention_heads and hidden belong to the attention-pooling head, not to {self.head}"
            )
        return self

    @property
    def ablated(self) -> bool:
        """Whether the net takes ablated images, as derandomized smoothing makes them."""
        return len(self.mean) == 6

    @property
    def readout(self) -> dict[str, int]:
        """The sizes of the readout, of the head that has one."""
        sizes = {"values": self.values, "attention_heads": self.attention_heads, "hidden": self.hidden}
        return {name: size for name, size in sizes.items() if size is not None}

    def build(self) -> RegionScorer:
        """The scorer with fresh weights."""
        readout = None
        if self.values and self.attention_heads and self.hidden:
            size = self._map_size(self.values + self.attention_heads)
            readout = AttentionReadout(len(self.class_names), self.values, self.attention_heads, self.hidden, size)
        net = self._net(len(self.class_names) if readout is None else readout.channels)
        return RegionScorer(
            net, self.class_names, self.image_size, self.head, self.scale, self.mean, self.std, readout=readout
        )

    def _net(self, outputs: int) -> nn.Module:
        architecture = get_architecture(self.architecture)
        return architecture.build(outputs, self.width, self.depth, self.padded, len(self.mean))

    def _map_size(self, outputs: int) -> tuple[int, int]:
        """(rows, columns) of the map for images of `image_size`, found without memory."""
        with torch.device("meta"):
            try:
                shape = self._net(outputs).eval()(torch.empty(1, len(self.mean), *self.image_size)).shape
            except RuntimeError as error:
                raise UsageError(f"images of {self.image_size} px are too small for {self.architecture}") from error
        return shape[2], shape[3]


def write_model(folder: Path, scorer: RegionScorer, config: ModelConfig) -> None:
    """Writes both files, each whole or not at all, and never one beside the other of another model.

    Raises:
        BagcertError: the folder cannot be written, or the weights are not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in scorer.state_dict().items()}
    if name := not_finite(tensors):
        raise BagcertError(f"tensor {name!r} has values that are not finite; nothing was written to {folder}")
    text = config.model_dump_json(indent=2) + "\n"
    write_together({folder / WEIGHTS: safetensors.torch.save(tensors), folder / CONFIG: text.encode()})


def read_model(folder: Path) -> tuple[RegionScorer, ModelConfig]:
    """A trained scorer in eval mode, and its config.

    Raises:
        UnreadableError: a file is missing, truncated or not what it should be; tensors are missing, extra,
            of another shape, not finite, or of a readout whose integer sums would not be exact; the normalization is
            not that of the config; a variance is negative.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    try:
        tensors = safetensors.torch.load(read_regular(path, MAX_WEIGHTS_BYTES))
    except FileNotFoundError:
        raise UnreadableError(f"the model folder {folder} has no {WEIGHTS}") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the library's own, and whatever a dtype leads to that it or torch does not have
        raise UnreadableError(f"{path} is not a whole safetensors file: {shown(error)}") from None
    try:
        # Shapes first, without memory: the config may claim more than the file has.
        with torch.device("meta"):
            scorer = config.build()
    except UsageError as error:
        raise UnreadableError(f"{folder / CONFIG} does not describe a network: {shown(error)}") from None
    expected = scorer.state_dict()
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise UnreadableError(f"{path} {what} tensor {shown(sorted(names)[0])!r} (and {len(names) - 1} more)")
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != expected[name].dtype:
            raise UnreadableError(f"tensor {name!r} in {path} is {tensor.dtype}, expected {expected[name].dtype}")
        if tensor.shape != expected[name].shape:
            raise UnreadableError(
                f"tensor {name!r} in {path} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
            )
    if broken := not_finite(tensors):
        raise UnreadableError(f"tensor {broken!r} in {path} has values that are not finite")
    for name in normalization(tensors, config):
        raise UnreadableError(f"tensor 'normalize.{name}' in {path} is not the {name} that {CONFIG} states")
    for name, tensor in sorted(tensors.items()):
        if name.endswith("running_var") and (tensor < 0).any():
            raise UnreadableError(f"tensor {name!r} in {path} has a negative variance")
    scorer.to_empty(device="cpu")
    scorer.load_state_dict(tensors)
    try:
        scorer.eval().freeze()
    except UsageError as error:
        raise UnreadableError(f"{path} holds a readout that cannot be certified: {error}") from None
    return scorer, config


def normalization(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, list[float]]:
    """What the tensors say of `mean` and `std` where the config, in float32, says otherwise; {} where they agree."""
    found = {name: tensors[f"normalize.{name}"].flatten().tolist() for name in ("mean", "std")}
    stated = {"mean": config.mean, "std": config.std}
    return {name: own for name, own in found.items() if own != torch.tensor(stated[name], dtype=torch.float32).tolist()}


def read_config(folder: Path) -> ModelConfig:
    """The config of a model folder.

    Raises:
        UnreadableError: it is missing or not valid.
    """
    path = folder / CONFIG
    try:
        text = read_regular(path, MAX_CONFIG_BYTES).decode()
        config = ModelConfig.model_validate(json.loads(text))
        get_architecture(config.architecture)
    except OSError as error:
        raise UnreadableError(
            f"the model folder {folder} has no readable {CONFIG}: {error.strerror or error}"
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            error = ValueError(": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"].lower()]))
        raise UnreadableError(f"{path} is not a model config: {shown(error)}") from None
    return config


def weights_sha256(folder: Path) -> str:
    """The hash of the weights file, which names a model in records."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
