"""Recipes: all settings of a training run, as validated TOML."""

import json
import reprlib
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bagcert.errors import UnreadableError, UsageError, cleaned, nearest, sanitize
from bagcert.io.files import read_input
from bagcert.nets.heads import check_readout

MAX_RECIPE_BYTES = 1 << 16
"""A recipe has about one kilobyte; TOML nests as deep as a file is long."""


Pixels = Annotated[int, Field(ge=1, le=16384)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _square(size: Any) -> Any:
    return (size, size) if type(size) is int else size


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(_Section):
    """Dataset and validation split."""

    name: str = Field("digits", description="name, path or URL of the data set; `--data` overrides it")
    validation: float = Field(
        0.1, gt=0, lt=1, description="share of the training set to hold out, unless the data has a folder `val`"
    )
    split_seed: int = Field(0, ge=0, lt=2**63, description="seed of the choice of held-out images")
    groups: str | None = Field(
        None,
        description="groups of images to keep on one side of the validation split: `prefix` (files of a class folder "
        "whose names agree up to the last `_`, `-`, `.` or space), or a file with a line `class/file,group` for each "
        "image",
    )
    class_names: str | None = Field(
        None, description="a file with a line `folder: name` for each class folder to be shown under that name"
    )
    class_weights: bool = Field(False, description="weight classes by inverse frequency")
    streaming: bool = Field(False, description="decode images on demand instead of all at the start")
    workers: int = Field(2, ge=0, le=1024, description="decoding processes per training process, when streaming")
    shuffle: int = Field(
        10_000, ge=1, le=2**31, description="images to shuffle together, when streaming; blocks are shuffled as well"
    )


class ModelSection(_Section):
    """Architecture of the region scorer."""

    architecture: str = Field("resnet-rf10s2", description="a name from `bagcert info`")
    width: int | None = Field(None, ge=8, le=65536, description="the architecture's own when absent")
    depth: int | None = Field(None, ge=1, le=4096, description="residual blocks; the architecture's own when absent")
    padded: bool = Field(True, description="zero padding; without it, regions lie entirely inside the image")
    image_size: Annotated[tuple[Pixels, Pixels], BeforeValidator(_square)] | None = Field(
        None, description="`[height, width]` in px that images are squashed to; their own when absent"
    )
    head: Literal["binary", "fixed-point", "attention-pooling"] = Field(
        "fixed-point",
        description="how scores become integers, and regions an answer: 0 or 1 for each class, or fixed-point "
        "numbers, both summed over regions; or attention pooling and a small network",
    )
    values: int = Field(128, ge=1, le=1024, description="pooled values of the attention-pooling head")
    attention_heads: int = Field(8, ge=1, le=1024, description="each weighs values / attention_heads values")
    hidden: int = Field(64, ge=1, le=1024, description="hidden units of the attention-pooling readout")

    @property
    def readout(self) -> dict[str, int]:
        """Returns the sizes of the readout of the attention-pooling head; None for other heads."""
        if self.head != "attention-pooling":
            return {}
        return {"values": self.values, "attention_heads": self.attention_heads, "hidden": self.hidden}


class DefenseSection(_Section):
    """Default rule and patch of the deployed model, and the patch to train against."""

    rule: str = Field("double-masking", description="the rule that predicts and certifies")
    patch: str = Field(
        "5", max_length=1000, description="as for `--patch`, in px of the resized image or as a share (`2%`)"
    )
    masks_per_axis: int | None = Field(
        default=None, ge=1, le=16384, description="largest number of masks per axis; absent: all windows of the patch"
    )


class LossSection(_Section):
    """The training objective; see docs/method.md, "Training"."""

    name: Literal[
        "margin", "smooth-margin", "double-masking", "cross-entropy", "clipped", "masked-features", "interval-bounds"
    ] = Field("double-masking", description="the loss; use `double-masking` with the rule of that name")
    margin: float = Field(0.4, gt=0, le=1, description="margin of the two margin losses")
    temperature: float = Field(
        12.0, gt=0, description="factor on mean scores, for smooth-margin, clipped, and binary double-masking"
    )
    full_weight: float = Field(
        0.3, ge=0, description="weight of the unmasked term of double-masking and interval-bounds losses"
    )
    one_hot_penalty: float = Field(
        0.0, ge=0, description="weight of a penalty on regions that score for several classes"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target that is spread over all classes")
    teacher: str | None = Field(
        None,
        description="a model (name or folder) whose prediction for each augmented image is mixed into the target; for "
        "the cross-entropy, smooth-margin and double-masking losses",
    )
    teacher_weight: float = Field(0.9, gt=0, le=1, description="share of the teacher in the target")
    teacher_temperature: float = Field(2.0, gt=0, description="divisor of the teacher's mean scores before the softmax")


class OptimizerSection(_Section):
    """Optimizer and learning-rate schedule, which begins with a linear warm-up."""

    name: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="`muon` uses Muon for convolution kernels and AdamW for the rest"
    )
    learning_rate: float = Field(2e-3, gt=0, description="maximum learning rate of the schedule")
    others_share: float = Field(
        0.5, gt=0, description="for muon: learning rate of all that is no inner kernel, as a share"
    )
    weight_decay: float = Field(0.01, ge=0, description="weight decay of kernels; batch norm and biases have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="for sgd")
    warmup: float = Field(0.2, ge=0, lt=1, description="length of the linear warm-up, as a share of all steps")
    schedule: Literal["cosine", "hold"] = Field(
        "cosine",
        description="after warm-up: cosine to zero; or the top rate, then linear to zero in the last `decay` share",
    )
    decay: float = Field(0.25, gt=0, le=1, description="share of all steps, for the schedule hold")
    warmup_steps: int | None = Field(
        None, ge=1, description="warm-up in steps, instead of warmup; needed to extend a run"
    )
    gradient_clip: float | None = Field(None, gt=0, description="gradient clipping: maximum norm; absent: no clipping")


class AugmentSection(_Section):
    """Batched augmentation on the device."""

    resized_crop: float | None = Field(
        None, gt=0, le=1, description="least share of the area that a random resized crop keeps; absent: none"
    )
    resize: Pixels | None = Field(
        None, description="side in px that training images are squashed to before the random resized crop"
    )
    crop: int = Field(2, ge=0, le=16384, description="px of padding before the random crop")
    crop_mode: Literal["reflect", "zero"] = Field("reflect", description="content of the padding")
    flip: bool = Field(True, description="mirror half of the images, left to right")
    color: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="brightness, contrast and saturation are multiplied by numbers drawn from [1 - color, 1 + color]",
    )
    cutout: int = Field(0, ge=0, le=16384, description="side in px of a square painted black; 0 for none")
    cutout_candidates: int = Field(
        1, ge=1, le=100, description="random squares per image, of which the one with the largest loss is painted"
    )
    ablation: Literal["none", "column", "row", "block"] = Field(
        "none", description="hide all but a random band or block, as derandomized smoothing does"
    )
    ablation_size: int = Field(4, ge=1, le=16384, description="px of the band or the block's side")


class TrainSection(_Section):
    """Training loop."""

    epochs: int = Field(30, ge=1, le=1_000_000, description="passes over the training images")
    batch_size: int = Field(128, ge=2, le=1_000_000, description="images per step, over all processes and parts")
    accumulate: int = Field(1, ge=1, le=1_000_000, description="gradient accumulation steps, to save memory")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the EMA weights that the model uses; 0 for no EMA")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="precision of the network's arithmetic; bf16 is faster on GPUs and on CPUs with AMX"
    )
    compile: bool = Field(False, description="use torch.compile: slower start, faster steps")
    seed: int = Field(0, ge=0, lt=2**63, description="random seed of weights, order and augmentation")
    validate_every: int = Field(1, ge=1, description="epochs between validations; each validation writes the model")
    validate_images: int = Field(1000, ge=1, description="maximum number of held-out images per validation")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints, in addition to one per epoch")


class Recipe(_Section):
    """All settings of a training run. `name` becomes the model's name."""

    name: str = Field(max_length=200, pattern=NAME, description="of the model and, unless `--out` says, its run folder")
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    defense: DefenseSection = DefenseSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    augment: AugmentSection = AugmentSection()
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _resize_leads_to_a_crop(self) -> "Recipe":
        if self.augment.resize and not (self.augment.resized_crop and self.model.image_size):
            raise ValueError("augment.resize needs augment.resized_crop and model.image_size")
        return self

    @model_validator(mode="after")
    def _readout_can_be_built(self) -> "Recipe":
        if self.model.head == "attention-pooling":
            check_readout(**self.model.readout, ablated=self.augment.ablation != "none")
        return self

    def changed(self, **sections: dict[str, Any]) -> "Recipe":
        """A copy with other values, such as `changed(train={"epochs": 3})`; they are not validated."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        )

    def to_toml(self) -> str:
        """Returns the recipe as TOML, including default values."""
        lines = [f"name = {_toml(self.name)}"]
        for section, values in self.model_dump(exclude_none=True).items():
            if isinstance(values, dict):
                lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"


def shipped_recipes() -> dict[str, Path]:
    """Lists the recipes in the package, by name."""
    folder = Path(str(resources.files("bagcert.training"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(name_or_file: str, overrides: Iterable[str] = ()) -> Recipe:
    """Loads a shipped recipe by name, or a TOML file, and applies `section.key=value` overrides.

    Raises:
        UsageError: unknown recipe, key or value; the nearest known name is given.
        UnreadableError: the file is missing or not TOML.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_file, Path(name_or_file))
    if name_or_file not in shipped and path.suffix != ".toml":
        raise UsageError(f"there is no recipe {name_or_file!r}{nearest(name_or_file, shipped, 0.5)}")
    try:
        values = tomllib.loads(read_input(path, MAX_RECIPE_BYTES, f"the recipe {path}").decode())
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and thousands of brackets
        raise UnreadableError(f"the recipe {path} is not valid TOML: {sanitize(error)}") from None
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Creates a recipe from nested dicts and validates it.

    Raises:
        UsageError: naming the key, what was given and what was expected.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = sanitize(".".join(map(str, first["loc"])), 100)
        if first["type"] == "extra_forbidden":
            known = _keys() if "." in where else Recipe.model_fields
            raise UsageError(f"a recipe has no key {where!r}{nearest(where, known, 0.5)}") from None
        if first["type"] == "missing":
            raise UsageError(f"a recipe needs the key {where!r}") from None
        if first["type"] == "value_error":
            raise UsageError(f"a recipe's {first['ctx']['error']}") from None
        raise UsageError(
            f"recipe key {where}: {first['msg'].lower()}, got {sanitize(reprlib.repr(first.get('input')))}"
        ) from None


def _keys() -> list[str]:
    keys = ["name"]
    for section, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            keys += [f"{section}.{key}" for key in field.annotation.model_fields]
    return keys


def _apply(values: dict[str, Any], override: str) -> None:
    """Writes an override `a.b=c` into nested dicts; `c` is parsed as TOML if possible, else used as text."""
    key, separator, text = (part.strip() for part in override.partition("="))
    if not separator or not key:
        raise UsageError(f"an override is written section.key=value, got {override!r}")
    if key not in _keys():
        raise UsageError(f"a recipe has no key {key!r}{nearest(key, _keys(), 0.5)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(
                f"recipe key {section}: it should be a section [{section}], got {sanitize(reprlib.repr(values))}"
            )
    # A patch of 5 and a name of 1.10 are text, as they were written.
    values[last] = text if last in ("patch", "name") and not isinstance(value, str) else value


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(f"\\u{ord(letter):04x}" if cleaned(letter) != letter else letter for letter in quoted)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
