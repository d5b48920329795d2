"""Description of a model: geometry, size, cost, provenance, and measured results."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from bagcert.defenses.bagcert import model_folder
from bagcert.hub.card import measured_results
from bagcert.nets.cost import multiply_adds
from bagcert.nets.saved_model import WEIGHTS, read_model, weights_sha256


def describe(name: str) -> dict[str, Any]:
    """Describes a model as a JSON-serializable dictionary.

    `multiply_adds` are the MACs for one image of the model's size. `results` are the rows of the evaluation next to the
    weights.
    """
    folder = model_folder(name)
    scorer, config = read_model(folder)
    grid = scorer.grid()
    middle = len(grid.rows_seen) // 2
    stride = int(grid.rows_seen[middle].argmax() - grid.rows_seen[middle - 1].argmax())
    return {
        "name": config.name,
        "architecture": config.architecture,
        "width": config.width,
        "depth": config.depth,
        "image_size_px": list(scorer.image_size),
        "receptive_field_px": list(grid.receptive_field),
        "stride_px": stride,
        "region_grid": list(grid.map_size),
        "classes": len(scorer.class_names),
        "class_names": list(scorer.class_names),
        "parameters": sum(parameter.numel() for parameter in scorer.parameters()),
        "multiply_adds": multiply_adds(lambda: deepcopy(scorer).to("meta"), scorer.channels, scorer.image_size),
        "head": config.head,
        **config.readout,
        "rule": config.rule,
        "patch": config.patch,
        **({} if config.masks_per_axis is None else {"masks_per_axis": config.masks_per_axis}),
        "weights_sha256": weights_sha256(folder),
        "weights_bytes": (folder / WEIGHTS).stat().st_size,
        "provenance": config.provenance,
        "recipe": config.recipe,
        "results": _results(folder),
    }


def _results(folder: Path) -> list[dict[str, Any]]:
    run = measured_results(folder, weights_sha256(folder))
    if run is None:
        return []
    return [{**row, "data": run.data, "split": run.split, "images": run.images} for row in run.to_dict()["results"]]
