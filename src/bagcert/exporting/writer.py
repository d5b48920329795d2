"""Export of a model to an ONNX file: build the graph, measure locality, compare with the package's rules, write."""

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
    """Images for static quantization: even-numbered ones calibrate the ranges, the others measure the accuracy loss.

    Attributes:
        images: [images, channels, height, width] in [0, 1], at least two.
        labels: class indices of the model.
    """

    images: Float[Tensor, "images channels height width"]
    labels: Int64[np.ndarray, " images"]


@dataclass(frozen=True)
class Exported:
    """The written files, and the results of the checks.

    Attributes:
        files: the ONNX file first.
        metadata: metadata of the files.
        locality: exact or guarded, as measured in onnxruntime.
        leak_z: largest change of `z` outside a patch's footprint.
        check: results of the comparison in onnxruntime.
        accuracy: clean and certified accuracy of the float32 and the int8 file on the same images; None without int8.
    """

    files: list[str]
    metadata: dict[str, str]
    locality: str
    leak_z: float
    check: Check
    accuracy: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serializable dictionary."""
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
    """Exports a model with its rule and certification to ONNX, after comparing the file with the package's rules.

    The comparison covers label, certified and margin on synthetic scores (ties, counting, range limits, noise) and on
    images. Scores are compared with torch's; they may differ by one at a rounding boundary, because other kernels sum
    in another order. Locality is measured as by `bagcert doctor`; if it is not exact, the file includes the guard.

    Args:
        model: a float32 model on the CPU.
        out: the `.onnx` file.
        patch, rule, placements: what to deploy; by default as for the model.
        images: images to compare on, in addition to random ones.
        calibration: quantize the network to 8 bits with these images.
        on_step: called with the name of each step.

    Returns:
        The written files, and the results of the checks.

    Raises:
        UsageError: a missing library, a rule or network that cannot be exported, or a patch that does not fit.
        UnsoundError: a check failed. Nothing is written.
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
    """Builds graphs with `z` among their outputs, quantized if requested."""

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
    """Measures clean and certified accuracy of a file on labeled images."""
    right = proved = 0
    for start in range(0, len(images), CHECK_BATCH):
        part = slice(start, start + CHECK_BATCH)
        label, certified, *_ = run(images[part].numpy())
        right += int((label == labels[part]).sum())
        proved += int(((label == labels[part]) & certified).sum())
    return {"clean_accuracy": right / len(images), "certified_accuracy": proved / len(images)}


def _samples(model: BagCert, images: Tensor | None) -> Tensor:
    """Returns random images, and the given ones if there are any."""
    shape = (RANDOM_IMAGES, model.scorer.channels, *model.image_size)
    random = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255
    return random if images is None else torch.cat([images.cpu().float(), random])


def _function(model: Any) -> Run:
    """Returns a function that runs a graph in onnxruntime."""
    session = onnx_session(model.SerializeToString(), torch.get_num_threads())
    name, *others = [each.name for each in session.get_inputs()]

    def run(inputs: np.ndarray) -> Sequence[np.ndarray]:
        feed = {name: np.ascontiguousarray(inputs, dtype=np.float32)}
        return session.run(None, feed | {other: np.ones(len(inputs), dtype=bool) for other in others})

    return run


def _same(final: bytes, graph: Any, samples: Tensor) -> None:
    """Checks that the final file gives the same results as the graph that was checked."""
    session = onnx_session(final, torch.get_num_threads())
    found, checked = session.run(None, {INPUT: samples.numpy()}), _function(graph)(samples.numpy())
    for name, here, there in zip(OUTPUTS, found, checked, strict=False):
        if not np.array_equal(here, there):
            raise UnsoundError(f"the file answers otherwise than the graph that was checked: its {name} differs")
