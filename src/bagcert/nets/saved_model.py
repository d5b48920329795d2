"""Saved models: folders with `model.safetensors` and `config.json`. Their content is never executed as code."""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from bagcert.errors import CONTROL, BagcertError, UnreadableError, UsageError, sanitize
from bagcert.io.files import read_regular, write_together
from bagcert.nets import get_architecture
from bagcert.nets.attention_pooling import AttentionReadout
from bagcert.nets.graph_network import GraphNetwork, NetworkGraph, as_graph, graph_text
from bagcert.nets.heads import HeadName, check_readout
from bagcert.nets.region_scorer import RegionScorer, not_finite

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GRAPH = "graph"
"""Architecture name of networks stored as a list of operations in the metadata of the weights file."""

MAX_WEIGHTS_BYTES = 1 << 31
"""Limit for the weights file, which is read into memory at once; enough for half a billion float32 values."""
MAX_CONFIG_BYTES = 1 << 24
"""Limit for the config file; enough for 100,000 class names and a recipe."""


def _without_controls(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("a name must not hold control characters")
    return text


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    json.dumps(values, allow_nan=False)  # fails now rather than when it is printed as JSON
    return values


Name = Annotated[str, Field(max_length=1000), AfterValidator(_without_controls)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, le=16384)]


class ModelConfig(BaseModel):
    """Content of `config.json`: architecture, deployment and provenance of a model.

    Limits protect against damaged and hostile files: width 65536, depth 4096, image sides 16384 px, 100000 classes,
    names of 1000 characters on one line.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    name: Name
    architecture: Name
    width: int | None = Field(default=None, ge=1, le=65536)
    depth: int | None = Field(default=None, ge=1, le=4096)
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
    masks_per_axis: int | None = Field(default=None, ge=1, le=16384)
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

    @model_validator(mode="after")
    def _sizes_fit_the_architecture(self) -> "ModelConfig":
        for name, size in (("width", self.width), ("depth", self.depth)):
            if size is None and self.architecture != GRAPH:
                raise ValueError(f"{name}: field required with every architecture but {GRAPH}")
            if size is not None and self.architecture == GRAPH:
                raise ValueError(f"{name} does not belong to the architecture {GRAPH}")
        return self

    @property
    def ablated(self) -> bool:
        """Whether the network takes ablated images (derandomized smoothing)."""
        return len(self.mean) == 6

    @property
    def readout(self) -> dict[str, int]:
        """Sizes of the readout; empty for heads without a readout."""
        sizes = {"values": self.values, "attention_heads": self.attention_heads, "hidden": self.hidden}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def patch_text(self) -> str:
        """The patch with its unit and the image size."""
        return patch_text(self.patch, self.image_size)

    def build(self, graph: NetworkGraph | None = None) -> RegionScorer:
        """Build the region scorer with newly initialized weights.

        Args:
            graph: operations of the network for the architecture `graph`; None for all others.
        """
        readout = None
        if self.values and self.attention_heads and self.hidden:
            _, _, rows, cols = self._map_shape(self.values + self.attention_heads, graph)
            size = (rows, cols)
            readout = AttentionReadout(len(self.class_names), self.values, self.attention_heads, self.hidden, size)
        net = self._net(len(self.class_names) if readout is None else readout.channels, graph)
        scorer = RegionScorer(
            net, self.class_names, self.image_size, self.head, self.scale, self.mean, self.std, readout=readout
        )
        scorer.masks_per_axis = self.masks_per_axis
        return scorer

    def _net(self, outputs: int, graph: NetworkGraph | None) -> nn.Module:
        if (graph is not None) != (self.architecture == GRAPH):
            raise UsageError(f"the architecture {self.architecture} is not built from a list of operations")
        if graph is not None:
            found = self._map_shape(outputs, graph)[1]
            if found != outputs:
                raise UsageError(f"the network has {found} output channels where {outputs} are needed")
            return GraphNetwork(graph)
        assert self.width is not None and self.depth is not None  # noqa: PT018
        architecture = get_architecture(self.architecture)
        return architecture.build(outputs, self.width, self.depth, self.padded, len(self.mean))

    def _map_shape(self, outputs: int, graph: NetworkGraph | None) -> tuple[int, ...]:
        """Shape [1, channels, rows, columns] of the map for an image of `image_size`, computed on the meta device."""
        with torch.device("meta"):
            image = torch.empty(1, len(self.mean), *self.image_size)
            if graph is not None:
                return tuple(GraphNetwork(graph).eval().require_bounded(image).shape)
            try:
                return tuple(self._net(outputs, None).eval()(image).shape)
            except RuntimeError as error:
                raise UsageError(f"images of {self.image_size} px are too small for {self.architecture}") from error


def patch_text(patch: str, image_size: Sequence[int]) -> str:
    """Format a patch with its unit and the size of the images to which its pixels refer.

    >>> patch_text("5", (32, 32)), patch_text("2%", (224, 224))
    ('5 px at 32x32', '2% at 224x224')
    """
    return f"{patch}{'' if '%' in patch else ' px'} at {image_size[0]}x{image_size[1]}"


def write_model(folder: Path, scorer: RegionScorer, config: ModelConfig) -> None:
    """Write both files of a model atomically, so that files of different models are never combined.

    With the architecture `graph` any network is stored as a list of operations.

    Raises:
        BagcertError: the folder cannot be written, or the weights are not finite.
        UsageError: the network cannot be stored as a list of operations.
    """
    state, metadata = scorer.state_dict(), None
    if config.architecture == GRAPH:
        net = as_graph(scorer.net, (scorer.channels, *scorer.image_size))
        state = {name: tensor for name, tensor in state.items() if not name.startswith("net.")}
        state |= {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
        metadata = {GRAPH: graph_text(net.graph).decode()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if name := not_finite(tensors):
        raise BagcertError(f"tensor {name!r} has values that are not finite; nothing was written to {folder}")
    text = config.model_dump_json(indent=2) + "\n"
    write_together({folder / WEIGHTS: safetensors.torch.save(tensors, metadata), folder / CONFIG: text.encode()})


def read_model(folder: Path) -> tuple[RegionScorer, ModelConfig]:
    """Read a model: the region scorer in eval mode, and its config.

    The geometry is not stored in the files; it is derived from the layers or operations.

    Raises:
        UnreadableError: a file is missing, truncated or invalid; tensors are missing, unknown, of another shape or
            dtype, or not finite; integer sums of the readout would not be exact; the normalization differs from that of
            the config; a variance is negative.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    try:
        content = read_regular(path, MAX_WEIGHTS_BYTES)
        tensors = safetensors.torch.load(content)
    except FileNotFoundError:
        raise UnreadableError(f"the model folder {folder} has no {WEIGHTS}") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # errors of the library, and those of unsupported dtypes
        raise UnreadableError(f"{path} is not a valid safetensors file: {sanitize(error)}") from None
    try:
        # Build on the meta device first, since the config may describe a larger network than the file contains.
        graph = _read_graph(path, content) if config.architecture == GRAPH else None
        with torch.device("meta"):
            scorer = config.build(graph)
    except UsageError as error:
        source = folder / CONFIG if config.architecture != GRAPH else path
        raise UnreadableError(f"{source} does not describe a network: {sanitize(error)}") from None
    expected = scorer.state_dict()
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise UnreadableError(f"{path} {what} tensor {sanitize(sorted(names)[0])!r} (and {len(names) - 1} more)")
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
    if graph is not None:
        try:
            scorer.grid()
        except BagcertError as error:
            raise UnreadableError(f"{path} holds a network that cannot be certified: {sanitize(error)}") from None
    return scorer, config


def _read_graph(path: Path, content: bytes) -> NetworkGraph:
    """Read the operations from the metadata of a safetensors file whose header was already validated."""
    (size,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    if GRAPH not in metadata:
        raise UnreadableError(f"{path} holds no list of operations, which the architecture {GRAPH} needs")
    try:
        return NetworkGraph.model_validate_json(metadata[GRAPH])
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} holds no valid list of operations: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Format an error in one line; for pydantic, only its first error."""
    if isinstance(error, ValidationError):
        found = error.errors()[0]
        return sanitize(": ".join([*filter(None, [".".join(map(str, found["loc"]))]), found["msg"].lower()]))
    return sanitize(error)


def normalization(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, list[float]]:
    """`mean` and `std` of the tensors where they differ from the config in float32; empty if they agree."""
    found = {name: tensors[f"normalize.{name}"].flatten().tolist() for name in ("mean", "std")}
    stated = {"mean": config.mean, "std": config.std}
    return {name: own for name, own in found.items() if own != torch.tensor(stated[name], dtype=torch.float32).tolist()}


def read_config(folder: Path) -> ModelConfig:
    """Read the config of a model folder.

    Raises:
        UnreadableError: the config is missing or invalid.
    """
    path = folder / CONFIG
    try:
        text = read_regular(path, MAX_CONFIG_BYTES).decode()
        config = ModelConfig.model_validate(json.loads(text))
        if config.architecture != GRAPH:
            get_architecture(config.architecture)
    except OSError as error:
        raise UnreadableError(
            f"the model folder {folder} has no readable {CONFIG}: {error.strerror or error}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is not a model config: {first_line(error)}") from None
    return config


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights file, which identifies a model in records."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
