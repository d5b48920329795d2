"""The tables of defences side by side: measured by `bagcert benchmark`, and published elsewhere, clearly apart."""

import json
from pathlib import Path
from typing import Any


def benchmark_tables(results: Path) -> list[str]:
    """Per patch the rows of `results/benchmark`, then the speed ratios that follow from them."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "benchmark").glob("*.json"))]
    if not rows:
        return []
    first = rows[0]
    lines = [
        "",
        f"Defences side by side, in one run on {first['threads']} CPU cores: every network from scratch, "
        f"{first['epochs']} epochs, as many multiply-adds per training step, trained once against the largest patch. "
        f"CIFAR-10 test images; fewer than 10,000 are drawn at random (seed {first['seed']}):",
        "`bagcert benchmark --data data/cifar10 --defenses all --patch 2 --patch 5 --epochs 6 --multiply-adds 6000000 "
        "--out DIR`",
    ]
    conditions = results / "benchmark" / "conditions.md"
    if conditions.exists():
        lines += ["", *conditions.read_text(encoding="utf-8").splitlines()]
    for patch in dict.fromkeys(row["patch"] for row in rows):
        lines += [
            "",
            f"Against {patch}x{patch} px:",
            "",
            "| defence | guarantee | clean | certified | images | passes to predict / certify "
            "| images/s to predict | to certify | million multiply-adds | parameters | MiB | training, s |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        some = [row for row in rows if row["patch"] == patch]
        lines += map(_line, sorted(some, key=lambda row: -row["certified_accuracy"]))
    return lines + _ratios({(row["defense"], row["patch"]): row for row in rows})


def _line(row: dict[str, Any]) -> str:
    passes, speed = row["forward_passes"], row["images_per_second"]
    return (
        f"| {row['defense']} | {row['guarantee']} | {row['clean_accuracy']:.1%} | **{row['certified_accuracy']:.1%}** "
        f"| {row['images']:,} | {passes['predict']:,} / {passes['certify']:,} | {_speed(speed['predict'])} "
        f"| {_speed(speed['certify'])} | {row['multiply_adds'] / 1e6:.1f} | {row['parameters']:,} "
        f"| {row['peak_memory_mib']:,} | {row['training_seconds']:,.0f} |"
    )


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _ratios(rows: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """How many times as many images per second BagCert certifies."""
    patch = max((patch for _, patch in rows), key=int)

    def ratio(ours: str, theirs: str, what: str) -> str:
        mine, other = rows[ours, patch]["images_per_second"], rows[theirs, patch]["images_per_second"]
        return f"{mine['certify'] / other[what]:,.0f}"

    try:
        said = [
            f"{ratio(ours, 'column-smoothing', 'certify')} times as many images per second as column smoothing, "
            f"{ratio(ours, 'patchcleanser', 'predict')} times PatchCleanser's prediction and "
            f"{ratio(ours, 'patchcleanser', 'certify')} times its certificate ({name})"
            for ours, name in (("bagcert-vote", "vote"), ("bagcert-double-masking", "double masking"))
        ]
    except KeyError:
        return []
    return ["", f"Against {patch}x{patch} px BagCert certifies {'; '.join(said)}."]


def published_table(results: Path) -> list[str]:
    """What others report, in their settings."""
    rows = json.loads((results / "published.json").read_text(encoding="utf-8"))["results"]
    lines = [
        "",
        "*Published* figures, not measured here and not comparable across settings:",
        "",
        "| data | image, px | pre-training | patch | patch pasted | defence | clean | certified | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['data']} | {row['image_px']} | {row['pretraining']} | {row['patch']} | {row['pasted']} "
            f"| {row['defense']} | {row['clean_accuracy']:.1%} | {row['certified_accuracy']:.1%} | {row['source']} |"
        )
    return lines
