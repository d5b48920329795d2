"""Distance of forward pass and double masking from the limits of this machine: measured seconds over a lower bound.

    python benchmarks/speed_limit.py --data data/cifar10 --out results/speed/limit.json

Two rates are measured first, in the process that measures all the rest: multiply-adds per second of the fastest of many
matrix products, in its fastest run, and bytes per second of a copy that no cache holds. The arithmetic bound is every
convolution's multiply-adds at the first rate, with all else free. The bound of a single layer is the larger of its
arithmetic and its bytes (inputs, outputs and weights once) at the second rate; a layer whose inputs are still in a
cache may beat the latter.

Then, in turn: every layer of the network as it is deployed; what each way to run it brings; images per forward pass;
and the whole way from encoded images to records, part by part.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from bagcert.certificate import Certificate
from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.data.photo import as_batch
from bagcert.defenses.bagcert import DTYPES, BagCert, load, model_folder
from bagcert.devices import device_name, resolve_device
from bagcert.errors import UnsoundError, UsageError
from bagcert.evaluation.evaluate import evaluate, versions
from bagcert.io.files import write_atomically
from bagcert.io.optional import installed
from bagcert.nets.region_scorer import PIXELS_AT_ONCE, RegionScorer
from bagcert.nets.runtimes import RUNNERS, installed_backends
from bagcert.nets.runtimes.onnx_graph import OPSET
from bagcert.nets.runtimes.onnxruntime import onnx_session
from bagcert.nets.saved_model import read_model
from bagcert.records import Record
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel

SHAPES = ((16384, 256, 256), (4096, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096))
"""Rows, inner and columns of matrix products; the first is a layer of the default network on 256 images."""
COPIED_BYTES = 2**29
CHUNKS = (4, 8, 16, 32, 64, 128, 256, 512)
GOAL = 1.5


def clock(device: torch.device) -> float:
    """Returns the time in seconds after all work on the device is finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(call: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    call()
    return clock(device) - start


def in_turn(calls: dict[Any, Callable[[], object]], repeat: int, device: torch.device) -> dict[Any, float]:
    """Median seconds of each, measured in turn, so that a slow moment hits all alike."""
    seconds: dict[Any, list[float]] = {what: [] for what in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):
        for what, call in calls.items():
            seconds[what].append(timed(call, device))
    return {what: statistics.median(values) for what, values in seconds.items()}


def rates(dtype: torch.dtype, device: torch.device, repeat: int, quick: bool) -> dict[str, Any]:
    """What the machine does: multiply-adds per second in a dtype, and bytes read and written per second."""
    products = dict(matrix_products(dtype, device, SHAPES[:1] if quick else SHAPES))
    for product in products.values():
        product()
    fastest = {what: min(timed(product, device) for _ in range(repeat)) for what, product in products.items()}
    speeds = {what: math.prod(what[1:]) / seconds for what, seconds in fastest.items()}
    best = max(speeds, key=lambda what: speeds[what])
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    copied = in_turn({0: lambda: target.copy_(source)}, repeat, device)[0]
    return {
        "multiply_adds_per_second": speeds[best],
        "product": f"{best[0]}, {best[1]}x{best[2]} by {best[2]}x{best[3]}",
        "bytes_per_second": 2 * COPIED_BYTES / copied,
    }


def matrix_products(
    dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[tuple[str, int, int, int], Callable[[], object]]]:
    """Products of many shapes by every library here: no single one is the fastest on all machines."""
    for rows, inner, cols in shapes:
        one = torch.randn(rows, inner, device=device).to(dtype)
        other = torch.randn(inner, cols, device=device).to(dtype)
        yield ("torch", rows, inner, cols), partial(torch.mm, one, other)
        images = one.T.reshape(1, inner, rows, 1).contiguous(memory_format=torch.channels_last)
        weight = other.T.reshape(cols, inner, 1, 1).contiguous(memory_format=torch.channels_last)
        yield ("torch convolution", rows, inner, cols), partial(torch.conv2d, images, weight)
        if installed(RUNNERS["onnxruntime"].libraries) and device.type == "cpu" and dtype == torch.float32:
            session = onnx_session(product_graph(other.numpy()), torch.get_num_threads())
            yield ("onnxruntime", rows, inner, cols), partial(session.run, None, {"x": one.numpy()})


def product_graph(weight: np.ndarray) -> bytes:
    """An ONNX file that multiplies its input by a matrix."""
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    node, held = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(weight, "w")
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [held])
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def layers_of(scorer: RegionScorer, batch: Tensor, repeat: int) -> Iterator[dict[str, Any]]:
    """Each layer of the network: multiply-adds, bytes and median seconds, for one batch."""
    names = {module: name for name, module in scorer.named_modules() if not list(module.children())}
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    begun: dict[nn.Module, float] = {}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        begun[module] = clock(scorer.device)

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        now = clock(scorer.device)
        name = names[module]
        seconds.setdefault(name, []).append(now - begun[module])
        moved = sum(t.numel() * t.element_size() for t in (*inputs, output, *module.parameters()))
        weight = module.weight if isinstance(module, nn.Conv2d) else None
        macs = 0 if weight is None else output.numel() * weight[0].numel()
        shape = "" if weight is None else " " + "x".join(map(str, weight.shape))
        rows[name] = {"layer": name, "kind": type(module).__name__ + shape, "multiply_adds": macs, "bytes": moved}

    handles = []
    for module in names:
        if not isinstance(module, nn.Identity):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    for _ in range(repeat + 1):
        scorer.forward_batch(batch)
    for handle in handles:
        handle.remove()
    for name, row in rows.items():
        yield {**row, "seconds": statistics.median(seconds[name][1:])}


def ways(name: str, model: BagCert, batch: Tensor, quick: bool) -> dict[tuple[str, str], Callable[[], object]]:
    """The same scores of the same images in other ways; all but the first are with batch norm folded."""
    device = model.scorer.device
    trained, _ = read_model(model_folder(name))
    trained.to(device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    folded = copy.deepcopy(trained).fold_batch_norm()
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for dtype, autocast in DTYPES.items():
        for scorer, words in ((trained, "as trained"), (folded, "batch norm folded")):
            found[words, dtype] = contiguous(scorer, batch, autocast)
        deployed = model.scorer if autocast is None else load(name, str(device), dtype=dtype, checked=False).scorer
        found["batch norm folded, channels last", dtype] = partial(deployed.forward_batch, batch)
        if not quick:
            compiled = copy.deepcopy(deployed)
            compiled.net = torch.compile(compiled.net, dynamic=False)  # type: ignore[assignment]
            found["the same, torch.compile", dtype] = partial(compiled.forward_batch, batch)
        for backend in installed_backends() if device.type == "cpu" else ():
            if backend != "torch":
                with suppress(UsageError):  # a backend without this dtype
                    other = load(name, "cpu", dtype=dtype, checked=False, backend=backend).scorer
                    found[backend, dtype] = partial(other.forward_batch, batch)
    return found


def contiguous(scorer: RegionScorer, batch: Tensor, autocast: torch.dtype | None) -> Callable[[], object]:
    """A forward pass that leaves the images as they lie in memory, channel by channel."""
    parts = batch.split(PIXELS_AT_ONCE // (batch.shape[2] * batch.shape[3]))
    scorer.eval()

    def run() -> Tensor:
        device = scorer.device
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return torch.cat([scorer(part.to(device)).float() for part in parts])

    return run


def in_chunks(model: BagCert, batch: Tensor) -> dict[int, Callable[[], object]]:
    """The deployed network on so many images at a time."""
    calls: dict[int, Callable[[], object]] = {}
    for count in CHUNKS:
        calls[count] = partial(_each, model.scorer.forward_batch, batch.split(count))
    return calls


def _each(call: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    return [call(part) for part in parts]


def _certify_each(model: BagCert, threat: PatchThreatModel, batches: Sequence[np.ndarray]) -> list[Certificate]:
    rule = get_rule(model.rule)
    return [rule.certify(model.score_map(batch), threat) for batch in batches]


def in_batches(images: ImageSet, batch_size: int) -> list[np.ndarray]:
    """All pixels, uint8 [batch, height, width, 3]."""
    pixels = images.array()
    return [pixels[first : first + batch_size] for first in range(0, len(pixels), batch_size)]


def stages(model: BagCert, images: ImageSet, patch: str, batch_size: int) -> dict[str, Callable[[], object]]:
    """What happens on the way from encoded images to records; then all of it, as `bagcert evaluate` does it."""
    batches = in_batches(images, batch_size)
    floats = [as_batch(batch) for batch in batches]
    z = [model.scorer.forward_batch(batch) for batch in floats]
    size = batches[0].shape[1:3]
    maps = [model.scorer.to_scores(each, size) for each in z]
    threat = PatchThreatModel.parse(patch, size)
    rule = get_rule(model.rule)
    certificates = [rule.certify(each, threat) for each in maps]
    return {
        "read and decode": lambda: images.read(range(len(images))),
        "to floats": lambda: [as_batch(batch) for batch in batches],
        "forward": lambda: [model.scorer.forward_batch(batch) for batch in floats],
        "head": lambda: [model.scorer.to_scores(each, size) for each in z],
        "rule": lambda: [rule.certify(each, threat) for each in maps],
        "records": lambda: [Record.each(each) for each in certificates],
        "evaluate": lambda: evaluate(model, images, patches=[patch], batch_size=batch_size),
    }


def certified(
    name: str, device: torch.device, images: ImageSet, patch: str, batch_size: int
) -> dict[tuple[str, str], Callable[[], object]]:
    """From pixels to certificates on every backend that is local; the seconds are those of forward pass and rule."""
    batches = in_batches(images, batch_size)
    threat = PatchThreatModel.parse(patch, batches[0].shape[1:3])
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for backend in installed_backends() if device.type == "cpu" else ["torch"]:
        for dtype in DTYPES:
            with suppress(UsageError, UnsoundError):  # a backend without this dtype, or not local in it
                model = load(name, str(device), dtype=dtype, backend=backend)
                found[backend, dtype] = partial(_certify_each, model, threat, batches)
    return found


def main() -> None:
    """Measures all of it and writes one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--patch", default="5")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small product, no torch.compile: to try the command")
    parser.add_argument("--out", type=Path, default=Path("results/speed/limit.json"))
    arguments = parser.parse_args()
    device, load_before = resolve_device(arguments.device), psutil.getloadavg()[0]
    model = load(arguments.model, str(device))
    images = load_dataset(arguments.data, "test", arguments.images)
    batch = as_batch(images.take(PIXELS_AT_ONCE // math.prod(model.image_size)).array()).to(device)
    repeat, quick = arguments.repeat, arguments.quick
    speed = {dtype: rates(autocast or torch.float32, device, repeat, quick) for dtype, autocast in DTYPES.items()}
    print(json.dumps(speed), flush=True)
    layers = list(layers_of(model.scorer, batch, 4 * repeat))
    each = sum(layer["multiply_adds"] for layer in layers) // len(batch)
    here = speed["float32"]
    for layer in layers:
        arithmetic = layer["multiply_adds"] / here["multiply_adds_per_second"]
        layer["bound_seconds"] = max(arithmetic, layer["bytes"] / here["bytes_per_second"])
    result: dict[str, Any] = {
        "command": f"python benchmarks/speed_limit.py --model {arguments.model} --data {arguments.data} "
        f"--images {arguments.images} --patch {arguments.patch} --batch-size {arguments.batch_size} "
        f"--device {arguments.device} --repeat {repeat}" + (" --quick" if quick else ""),
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "rule": model.rule,
        "patch": arguments.patch,
        "device": device_name(model.scorer.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(load_before, 2),
        "versions": versions(model),
        "rates": speed,
        "multiply_adds_per_image": each,
        "goal": GOAL,
        "layers": {"images": len(batch), "rows": layers},
    }

    def bounded(seconds: float, count: int, dtype: str = "float32") -> dict[str, float]:
        bound = count * each / speed[dtype]["multiply_adds_per_second"]
        return {
            "seconds": seconds,
            "images_per_second": round(count / seconds, 1),
            "arithmetic_bound_seconds": bound,
            "over_bound": round(seconds / bound, 3),
        }

    found = in_turn(ways(arguments.model, model, batch, quick), repeat, device)
    result["ways"] = [
        {"way": way, "dtype": dtype, "images": len(batch), **bounded(seconds, len(batch), dtype)}
        for (way, dtype), seconds in found.items()
    ]
    several = torch.cat([batch] * max(1, max(CHUNKS) // len(batch)))
    result["images_at_once"] = [
        {"images_at_once": count, **bounded(seconds, len(several))}
        for count, seconds in in_turn(in_chunks(model, several), repeat, device).items()
    ]
    found = in_turn(stages(model, images, arguments.patch, arguments.batch_size), repeat, device)
    result["stages"] = {"images": len(images), "seconds": {what: round(s, 4) for what, s in found.items()}}
    calls = certified(arguments.model, device, images, arguments.patch, arguments.batch_size)
    result["forward_and_rule"] = [
        {"backend": backend, "dtype": dtype, "images": len(images), **bounded(seconds, len(images), dtype)}
        for (backend, dtype), seconds in in_turn(calls, repeat, device).items()
    ]
    for row in (*layers, *result["ways"], *result["images_at_once"], result["stages"], *result["forward_and_rule"]):
        print(json.dumps(row), flush=True)
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


def processor() -> str:
    """Returns the name of the processor, if the system provides it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


if __name__ == "__main__":
    main()
