"""Writing a file: export, measure, compare, and only then write."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnsoundError, UsageError
from bagcert.exporting.check import Check, Run, check_images, check_rule
from bagcert.exporting.graph import INSIDE, behind_network, metadata, with_metadata, with_outputs
from bagcert.exporting.int8 import quantized
from bagcert.exporting.module import OUTPUTS, CertifiedModule
from bagcert.io.files import write_atomically
from bagcert.io.optional import require_installed
from bagcert.locality import measure_onnx
from bagcert.locality.measurement import dynamic_quantization
from bagcert.nets.runtimes.onnx_graph import INPUT, LIBRARIES, REAL_SCORES, to_onnx
from bagcert.nets.runtimes.onnxruntime import onnx_session
from bagcert.threat import PatchLike, PatchThreatModel

RANDOM_IMAGES = 16
CHECK_BATCH = 64


@dataclass(frozen=True)
class Calibration:
    """Images for static quantization: those at even places find the ranges, the others measure what it costs.

    Attributes:
        images: [images, channels, height, width] in [0, 1], at least two.
        labels: as the model's class indices.
    """

    images: Float[Tensor, "images channels height width"]
    labels: Int64[np.ndarray, " images"]


@dataclass(frozen=True)
class Exported:
    """What was written, and what was found out on the way.

    Attributes:
        files: the ONNX file first.
        metadata: as in the files.
        locality: what moved outside a patch's reach, in onnxruntime: exact or guarded.
        leak_z: by how much at most.
        check: in onnxruntime, the made-up maps included.
        accuracy: of the float32 and the int8 file on the same images, clean and certified; None without int8.
    """

    files: list[str]
    metadata: dict[str, str]
    locality: str
    leak_z: float
    check: Check
    accuracy: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def export(
    model: BagCert,
    out: str | Path,
    *,
    patch: PatchLike | None = None,
    rule: str | None = None,
    placements: "np.ndarray | str | Path | None" = None,
    images: Float[Tensor, "images channels height width"] | None = None,
    calibration: Calibration | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Exported:
    """Writes a model with a rule and its proof as ONNX, after comparing what the file answers with the package's rules.

    Compared are label, certified and margin on made-up scores (ties, counting, the ends of the range, noise) and on
    images; scores with torch's, which may differ by one where z lies at a rounding boundary, since other kernels sum in
    another order; and locality, as `bagcert doctor` measures it. Where it is not exact, the file holds the guard.

    Args:
        model: on the CPU, float32.
        out: the `.onnx` file.
        patch, rule, placements: what to deploy; the model's own when absent.
        images: real images to compare on, besides random ones.
        calibration: quantize the network to 8 bits with these images.
        on_step: called with what is being done.

    Returns:
        What was written and found.

    Raises:
        UsageError: a library is missing; a rule or network that cannot be exported; a patch that does not fit.
        UnsoundError: a check failed; nothing is written.
        BagcertError: a file cannot be written.
    """
    require_installed(["onnxruntime", *LIBRARIES], "onnx", "exporting")
    out, scorer = Path(out), model.scorer
    if scorer.device.type != "cpu" or scorer.autocast_dtype is not None:
        raise UsageError("a model is exported from the CPU in float32; load it so")
    if reason := dynamic_quantization(scorer):
        raise UnsoundError(f"{model.name} cannot be exported: {reason}")
    threat = PatchThreatModel.parse(model.patch if patch is None else patch, model.image_size, placements)
    module = CertifiedModule(scorer, rule or model.rule, threat)
    samples = _samples(model, images)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bagcert-export-")))
        build = _Build(model, threat, folder, calibration, on_step)
        graph = build.graph(module)
        on_step("measuring locality")
        probe = folder / out.name
        probe.write_bytes(with_outputs(graph, [REAL_SCORES]).SerializeToString())
        report = measure_onnx(probe, model, threat, samples)
        if report.consequence == "refused":
            raise UnsoundError(f"the exported network is not local: {report.reason}")
        if report.consequence == "guarded":
            module = CertifiedModule(scorer, module.rule.name, threat, report.tolerance())
            graph = build.graph(module)
        on_step("comparing answers")
        maps = check_rule(_function(behind_network(graph)), module, scorer, threat)
        check = check_images(_function(graph), samples, module, scorer, threat, calibration is not None)
        values = metadata(model, module, threat, "none" if calibration is None else "int8, static")
        final = with_metadata(with_outputs(graph, OUTPUTS), values).SerializeToString()
        _same(final, graph, samples)
        found = Exported(
            [str(out)], values, report.consequence, report.leak_z, replace(check, maps=maps), accuracy=build.accuracy
        )
        write_atomically(out, final)
    return found


@dataclass
class _Build:
    """Makes graphs with `z` among their outputs, quantized where that is asked for."""

    model: BagCert
    threat: PatchThreatModel
    folder: Path
    calibration: Calibration | None
    on_step: Callable[[str], None]
    accuracy: dict[str, Any] | None = None

    def graph(self, module: CertifiedModule) -> Any:
        self.on_step("writing the graph")
        scorer = self.model.scorer
        graph = to_onnx(module, (scorer.channels, *scorer.image_size), [*OUTPUTS, *INSIDE])
        if self.calibration is None:
            return graph
        images, labels = self.calibration.images, self.calibration.labels
        if len(images) < 2:
            raise UsageError(f"static quantization needs at least two calibration images, got {len(images)}")
        self.on_step("quantizing")
        small = quantized(graph, images[::2], self.folder)
        figures = {
            name: accuracy(_function(with_outputs(each, OUTPUTS)), images[1::2], labels[1::2])
            for name, each in (("float32", graph), ("int8", small))
        }
        self.accuracy = {"calibration_images": len(images[::2]), "images": len(images[1::2]), **figures}
        return small


def accuracy(run: Run, images: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Clean and certified accuracy of a file on labelled images."""
    right = proved = 0
    for start in range(0, len(images), CHECK_BATCH):
        part = slice(start, start + CHECK_BATCH)
        label, certified, *_ = run(images[part].numpy())
        right += int((label == labels[part]).sum())
        proved += int(((label == labels[part]) & certified).sum())
    return {"clean_accuracy": right / len(images), "certified_accuracy": proved / len(images)}


def _samples(model: BagCert, images: Tensor | None) -> Tensor:
    """Random images, and real ones where there are any."""
    shape = (RANDOM_IMAGES, model.scorer.channels, *model.image_size)
    random = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255
    return random if images is None else torch.cat([images.cpu().float(), random])


def _function(model: Any) -> Run:
    """A graph as a function, through onnxruntime."""
    session = onnx_session(model.SerializeToString(), torch.get_num_threads())
    name, *others = [each.name for each in session.get_inputs()]

    def run(inputs: np.ndarray) -> Sequence[np.ndarray]:
        feed = {name: np.ascontiguousarray(inputs, dtype=np.float32)}
        return session.run(None, feed | {other: np.ones(len(inputs), dtype=bool) for other in others})

    return run


def _same(final: bytes, graph: Any, samples: Tensor) -> None:
    """The file itself answers as the graph that was checked."""
    session = onnx_session(final, torch.get_num_threads())
    found, checked = session.run(None, {INPUT: samples.numpy()}), _function(graph)(samples.numpy())
    for name, here, there in zip(OUTPUTS, found, checked, strict=False):
        if not np.array_equal(here, there):
            raise UnsoundError(f"the file answers otherwise than the graph that was checked: its {name} differs")
