"""Operations on ONNX graphs: metadata, selection of outputs, and extraction of the part after the network."""

import json
from collections.abc import Sequence
from typing import Any

from bagcert import __version__
from bagcert.defenses.bagcert import BagCert
from bagcert.exporting.image_range import IN_RANGE
from bagcert.exporting.module import CertifiedModule
from bagcert.nets.runtimes.onnx_graph import REAL_SCORES
from bagcert.proofs.certificate_record import geometry_fields, threat_fields
from bagcert.threat import PatchThreatModel

INSIDE = (REAL_SCORES, IN_RANGE)
"""Additional output of a graph under test."""


def metadata(
    model: BagCert, module: CertifiedModule, threat: PatchThreatModel, quantization: str = "none"
) -> dict[str, str]:
    """Returns the metadata of a file: text and numbers as they are, everything else as JSON."""
    pooling = model.scorer.form.pooling
    sizes = {"classes": pooling.classes, "values": pooling.values, "heads": pooling.heads} if pooling else None
    return {
        "bagcert_version": __version__,
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "rule": module.rule.name,
        "patch": str(threat),
        "threat": json.dumps(threat_fields(threat)),
        "class_names": json.dumps(model.class_names, ensure_ascii=False),
        "image_size": json.dumps(model.image_size),
        "geometry": json.dumps(geometry_fields(model.scorer.grid()), separators=(",", ":")),
        "score_range": json.dumps([module.low, module.high]),
        "readout": json.dumps(sizes),
        "locality": "measured" if module.tolerance > 0 else "exact",
        "tolerance_z": repr(module.tolerance),
        "quantization": quantization,
    }


def with_metadata(model: Any, values: dict[str, str]) -> Any:
    """Returns the graph with these metadata and a name."""
    model = _copied(model)
    model.graph.name = "bagcert"
    model.producer_name, model.producer_version = "bagcert", __version__
    del model.metadata_props[:]
    for key, value in values.items():
        model.metadata_props.add(key=key, value=value)
    return model


def with_outputs(model: Any, names: Sequence[str]) -> Any:
    """Returns the graph with only these outputs, and only the nodes they need."""
    model = _copied(model)
    outputs = {output.name: output for output in model.graph.output}
    del model.graph.output[:]
    model.graph.output.extend(outputs[name] for name in names)
    _prune(model)
    return model


def behind_network(model: Any) -> Any:
    """Extracts the head and the rule of a graph, with unchanged nodes: from `INSIDE` to `OUTPUTS`."""
    model = _copied(model)
    outputs = {output.name: output for output in model.graph.output}
    del model.graph.input[:]
    model.graph.input.extend(outputs[name] for name in INSIDE)
    kept = [output for name, output in outputs.items() if name not in INSIDE]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    _prune(model)
    return model


def rule_nodes(model: Any) -> list[str]:
    """Returns the names of the node that computes `z` and of all nodes that depend on it; they are not quantized."""
    after, names = {REAL_SCORES}, []
    for node in model.graph.node:  # in topological order
        if after & set(node.input):
            after |= set(node.output)
            names.append(node.name)
        elif REAL_SCORES in node.output:
            names.append(node.name)
    return names


def _prune(model: Any) -> None:
    """Removes nodes and constants that no output needs."""
    graph = model.graph
    given = {value.name for value in graph.input}
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        made = set(node.output) - given
        if made & needed:
            needed |= set(node.input)
            kept.append(node)
    kept.reverse()
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    made = {name for node in kept for name in node.output}
    values = [value for value in graph.value_info if value.name in made]
    for field, items in ((graph.node, kept), (graph.initializer, constants), (graph.value_info, values)):
        items = [_copied(item) for item in items]
        del field[:]
        field.extend(items)


def _copied(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
