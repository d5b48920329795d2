"""The tables of defenses: measured by `bagcert benchmark`, and published elsewhere."""

import json
from pathlib import Path
from typing import Any

GUARANTEES = {
    "recovery": "recovery (no patch changes the answer)",
    "detection": "detection (a patch that changes the answer raises an alert)",
    "none": "no guarantee",
}


def benchmark_tables(results: Path) -> list[str]:
    """Per patch the rows of `results/benchmark`, then the speed ratios that follow from them."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "benchmark").glob("*.json"))]
    if not rows:
        return []
    first = rows[0]
    lines = [
        f"One run on {first['threads']} CPU cores. Every network is trained from scratch for {first['epochs']} epochs, "
        "with equal multiply-adds per training step, once, against the largest patch. CIFAR-10 test images; where "
        f"fewer than 10,000 are listed they are a random sample (seed {first['seed']}).",
        "",
        "`bagcert benchmark --data data/cifar10 --defenses all --patch 2 --patch 5 --epochs 6 --multiply-adds 6000000 "
        "--out DIR`",
    ]
    conditions = results / "benchmark" / "conditions.md"
    if conditions.exists():
        lines += ["", *conditions.read_text(encoding="utf-8").splitlines()]
    for patch in dict.fromkeys(row["patch"] for row in rows):
        for guarantee, title in GUARANTEES.items():
            some = [row for row in rows if row["patch"] == patch and row["guarantee"] == guarantee]
            if some:
                lines += ["", f"**{patch}x{patch} px, {title}:**", "", *_table(some)]
    return lines + _ratios({(row["defense"], row["patch"]): row for row in rows})


def _table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| defense | clean | certified | images | passes to predict / certify | images/s to predict | to certify "
        "| million multiply-adds | parameters | MiB | training, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, sorted(rows, key=lambda row: -row["certified_accuracy"])),
    ]


def _line(row: dict[str, Any]) -> str:
    passes, speed = row["forward_passes"], row["images_per_second"]
    return (
        f"| {row['defense']} | {row['clean_accuracy']:.1%} | **{row['certified_accuracy']:.1%}** "
        f"| {row['images']:,} | {passes['predict']:,} / {passes['certify']:,} | {_speed(speed['predict'])} "
        f"| {_speed(speed['certify'])} | {row['multiply_adds'] / 1e6:.1f} | {row['parameters']:,} "
        f"| {row['peak_memory_mib']:,} | {row['training_seconds']:,.0f} |"
    )


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _ratios(rows: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Returns the ratios of BagCert's certified images per second to those of other defenses."""
    patch = max((patch for _, patch in rows), key=int)

    def ratio(ours: str, theirs: str, what: str) -> str:
        mine, other = rows[ours, patch]["images_per_second"], rows[theirs, patch]["images_per_second"]
        return f"{mine['certify'] / other[what]:,.0f} times"

    try:
        said = [
            f"{name}: {ratio(ours, 'column-smoothing', 'certify')} as many as column smoothing, "
            f"{ratio(ours, 'patchcleanser', 'certify')} as many as PatchCleanser certifies and "
            f"{ratio(ours, 'patchcleanser', 'predict')} as many as it predicts"
            for ours, name in (("bagcert-vote", "vote"), ("bagcert-double-masking", "double masking"))
        ]
    except KeyError:
        return []
    sentences = ". ".join(each[0].upper() + each[1:] for each in said)
    return ["", f"Images certified per second against {patch}x{patch} px. {sentences}."]


def published_rows(results: Path) -> list[dict[str, Any]]:
    """Returns the published results of other defenses."""
    return json.loads((results / "published.json").read_text(encoding="utf-8"))["results"]


def published_table(results: Path) -> list[str]:
    """Returns a table of published results of other defenses, with their settings."""
    lines = [
        "| data | image, px | pre-training | patch | patch pasted | defense | clean | certified | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in published_rows(results):
        lines.append(
            f"| {row['data']} | {row['image_px']} | {row['pretraining']} | {row['patch']} | {row['pasted']} "
            f"| {row['defense']} | {row['clean_accuracy']:.1%} | {row['certified_accuracy']:.1%} | {row['source']} |"
        )
    return lines
