"""VNN-LIB properties for one image and one patch placement, for external neural network verifiers.

A property consists of two files. The ONNX file takes one image [1, channels, height, width] and returns a number for
each class, the largest of which belongs to the deployed prediction:

- `vote` and `levine-feizi`: the sum of the integer region scores, minus `c / 2^k` for class c, so that the lowest class
  index wins ties.
- `double-masking`: 1 for the predicted class, 0 for the others. The prediction on an attacked image need not have the
  largest sum, so a property about sums would not correspond to the certificate.

The VNN-LIB file fixes every pixel outside the patch, leaves those under it free in [0, 1], and asserts that some other
class reaches the value of the prediction. `sat` means a broken certificate; `unsat` confirms the certificate.

Source: Demarchi et al., "Supporting standardization of neural networks verification with VNNLIB and CoCoNet", 2023.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnsoundError, UsageError
from bagcert.exporting.graph import with_metadata
from bagcert.exporting.module import CertifiedModule
from bagcert.exporting.rules import EXACT
from bagcert.io.files import write_together
from bagcert.io.optional import require_installed
from bagcert.nets.runtimes import inference_copy
from bagcert.nets.runtimes.onnx_graph import INPUT, LIBRARIES, to_onnx
from bagcert.nets.runtimes.onnxruntime import onnx_session
from bagcert.rules import get_rule
from bagcert.rules.largest import VOTING_RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchLike, PatchThreatModel

OUTPUT = "class_scores"
FILLS = 32


class ClassSums(nn.Module):
    """Maps images to sums of integer region scores, with ties resolved by the tie rule."""

    less: Tensor

    def __init__(self, model: BagCert, threat: PatchThreatModel) -> None:
        super().__init__()
        self.inner = CertifiedModule(model.scorer, "vote", threat)
        classes, (rows, cols) = len(model.class_names), model.scorer.grid().map_size
        steps = 2 ** (classes - 1).bit_length()
        largest = max(abs(self.inner.low), abs(self.inner.high)) * rows * cols + 1
        if largest * steps >= EXACT:
            raise UsageError(f"sums of {classes} classes can reach {largest:,} here, too much to tell equal ones apart")
        self.register_buffer("less", torch.arange(classes) / steps)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns one number per class; the largest belongs to the prediction."""
        return self.inner.head(self.inner.net(images)).flatten(2).sum(2) - self.less


class Answers(nn.Module):
    """Maps images to 1 for the class that double masking predicts, and 0 for the others."""

    def __init__(self, model: BagCert, threat: PatchThreatModel) -> None:
        super().__init__()
        self.inner = CertifiedModule(model.scorer, "double-masking", threat)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns one number per class; that of the prediction is 1."""
        label, *_ = self.inner.decide(self.inner.net(images))
        return (self.inner.rule.index == label[:, None]).float()


def write_property(
    model: BagCert,
    image: object,
    placement: tuple[int, int, int, int],
    out: Path,
    patch: PatchLike | None = None,
    rule: str | None = None,
) -> int:
    """Writes `out`, an ONNX file, and next to it the `.vnnlib` file with the property for one patch placement.

    Args:
        model: a float32 model on the CPU.
        image: one image of the model's size, uint8 [height, width, 3] or float [3, height, width] in [0, 1].
        placement: (top, left, height, width) of the patch in pixels.
        out: the `.onnx` file.
        patch, rule: the deployed patch and rule; by default those of the model. `placement` must match the patch.

    Returns:
        The prediction on the image, which the property is about.

    Raises:
        UsageError: a missing library, a rule without a property, a placement that is not a patch of the defense, more
            than one image, an image of another size, or a graph that cannot be written.
        UnsoundError: the results of the file differ from those of the model.
    """
    require_installed(["onnxruntime", *LIBRARIES], "onnx", "writing a VNN-LIB property")
    rule = rule or model.rule
    if rule not in (*VOTING_RULES, "double-masking"):
        get_rule(rule)
        raise UsageError(f"the rule {rule} has no VNN-LIB property; {', '.join(VOTING_RULES)} and double-masking have")
    if model.scorer.device.type != "cpu" or model.scorer.autocast_dtype is not None or model.scorer.runner is not None:
        raise UsageError("a property is written on the CPU, by torch in float32; load the model so")
    if out.suffix != ".onnx":
        raise UsageError(f"{out} must be a .onnx file")
    threat = PatchThreatModel.parse(model.patch if patch is None else patch, model.image_size)
    if threat.patches > 1:
        raise UsageError(f"a property is about one patch, and {threat} stands for {threat.patches}")
    _require_placement(threat, placement)
    pixels = _one_image(model, image)
    net = (ClassSums if rule in VOTING_RULES else Answers)(model, threat)
    graph = to_onnx(net, (pixels.shape[1], *model.image_size), [OUTPUT], batch=1)
    about = {"model": model.name, "weights_sha256": model.weights_sha256, "rule": rule, "patch": str(threat)}
    content = with_metadata(graph, about).SerializeToString()
    label = _compared(content, model, pixels, placement, threat, rule)
    lines = property_lines(pixels[0].numpy(), placement, len(model.class_names), label)
    comment = f"; {about}, placement (top, left, height, width) {placement}, answer {label}\n"
    text = comment.replace("\r", " ") + "\n".join(lines) + "\n"
    write_together({out: content, out.with_suffix(".vnnlib"): text.encode()})
    return label


def property_lines(
    image: Float[np.ndarray, "channels height width"],
    placement: tuple[int, int, int, int],
    classes: int,
    label: int,
) -> list[str]:
    """Iterates over the assertions: bounds of every input, and that another class reaches the prediction."""
    top, left, height, width = placement
    free = np.zeros(image.shape, dtype=bool)
    free[:, top : top + height, left : left + width] = True
    exact = image.astype(np.float64)  # shortest decimals that are read back as the same float32
    lower, upper = (np.where(free, limit, exact).ravel() for limit in (0.0, 1.0))
    lines = [f"(declare-const X_{k} Real)" for k in range(image.size)]
    lines += [f"(declare-const Y_{c} Real)" for c in range(classes)]
    for k, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{k} {_decimal(low)}))", f"(assert (<= X_{k} {_decimal(high)}))"]
    others = " ".join(f"(and (>= Y_{c} Y_{label}))" for c in range(classes) if c != label)
    return [*lines, f"(assert (or {others}))"]


def _decimal(value: float) -> str:
    """Formats a number without an exponent, which some VNN-LIB parsers do not support."""
    return np.format_float_positional(value, trim="0")


def _require_placement(threat: PatchThreatModel, placement: tuple[int, int, int, int]) -> None:
    top, left, height, width = placement
    fits = any(height <= h and width <= w for h, w in threat.shapes)
    inside = 0 <= top <= threat.image_size[0] - height and 0 <= left <= threat.image_size[1] - width
    if min(height, width) < 1 or not fits or not inside:
        raise UsageError(f"{placement} is no (top, left, height, width) of the patch {threat} within the image")


def _one_image(model: BagCert, image: object) -> Float[Tensor, "1 channels height width"]:
    if not isinstance(image, np.ndarray | Tensor) or image.ndim != 3:
        raise UsageError("a property is about one image, an array of three dimensions")
    pixels = model.scorer.as_batch(image[None]).cpu()
    if tuple(pixels.shape[2:]) != model.image_size:
        expected, found = ("x".join(map(str, size)) for size in (model.image_size, pixels.shape[2:]))
        raise UsageError(f"a property is about an image of the model's size, {expected} px, got {found}")
    return pixels


def _compared(
    content: bytes,
    model: BagCert,
    pixels: Tensor,
    placement: tuple[int, int, int, int],
    threat: PatchThreatModel,
    rule: str,
) -> int:
    """Returns the prediction on the image, after comparing file and rule on it and on random patch contents."""
    top, left, height, width = placement
    random = torch.Generator().manual_seed(0)
    images = pixels.repeat(FILLS + 1, 1, 1, 1)
    images[1:, :, top : top + height, left : left + width] = torch.rand(
        FILLS, pixels.shape[1], height, width, generator=random
    )
    session = onnx_session(content, torch.get_num_threads())
    net = inference_copy(model.scorer)
    found, expected = [], []
    for one in images.split(1):
        found.append(session.run(None, {INPUT: one.numpy()})[0][0])
        with torch.no_grad():
            scores = model.scorer.integers(net(one)).long()
        form = model.scorer.form
        score_map: ScoreMap = form.score_map(scores, model.scorer.grid())
        expected.append(int(get_rule(rule).predict(score_map, threat)))
    answers = np.argmax(np.stack(found), 1)
    if answers[0] != expected[0] or (answers != expected).sum() > 1:  # allows for one score at a rounding boundary
        raise UnsoundError("the file of the property answers otherwise than the model; it would be wrong")
    return expected[0]
