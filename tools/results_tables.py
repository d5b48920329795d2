"""Generates the result tables of README.md and docs/results.md, and the plot, from `results/`.

With --check nothing is written; the exit code is 1 if a file is out of date.

python tools/results_tables.py
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark_plot import benchmark_plot
from benchmark_tables import benchmark_tables, published_rows, published_table

from bagcert.defenses.bagcert import load as load_model
from bagcert.defenses.bagcert import shipped_models
from bagcert.nets.runtimes import BACKENDS
from bagcert.records import wilson_interval
from bagcert.threat import PatchThreatModel

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
PATCH = "5"  # of the headline
README_PATCHES = ("2", "5")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def measured() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, run) of every evaluation on CIFAR-10: small patches first, then the best certified accuracy first."""
    runs = [load(path) for path in sorted((ROOT / "results" / "cifar10").glob("*/*.json"))]
    rows = [(row, run) for run in runs for row in run["results"]]
    return sorted(rows, key=lambda item: (_area(item[0]), item[0]["threat"], -item[0]["certified_accuracy"]))


def best(threat: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row, run) with the highest certified accuracy against a patch."""
    return next((row, run) for row, run in measured() if row["threat"] == threat)


def headline() -> list[str]:
    row, run = best(PATCH)
    lines = [
        f"**CIFAR-10, any {PATCH}x{PATCH} px patch: {row['clean_accuracy']:.1%} clean, "
        f"{row['certified_accuracy']:.1%} certified accuracy**, on all {run['images']:,} test images, trained from "
        "scratch at 32x32 px."
    ]
    path = ROOT / "results" / "speed" / "evaluate-cifar10.json"
    if path.exists() and (speed := load(path))["weights_sha256"] == run["weights_sha256"]:
        rule = next(
            each["seconds"] for each in speed["results"] if each["threat"] == PATCH and each["rule"] == row["rule"]
        )
        forward = speed["seconds"]["forward"]
        lines.append(
            f"{speed['images']:,} images with proof take {forward + rule:.1f} s on {speed['threads']} CPU cores: "
            f"{forward:.1f} s network, {rule:.1f} s proof."
        )
    return lines


def summary_table() -> list[str]:
    """Own and published figures on CIFAR-10 in one setting: 32x32 px, no pre-training."""
    lines = ["| defense | patch, px | clean | certified | source |", "|---|---|---|---|---|"]
    published = [
        row
        for row in published_rows(ROOT / "results")
        if (row["data"], row["image_px"], row["pretraining"]) == ("CIFAR-10", 32, "none")
    ]
    for patch in README_PATCHES:
        row, run = best(patch)
        lines.append(
            f"| **bagcert, `{run['model']}`, {row['rule']}** | {patch} | {row['clean_accuracy']:.1%} "
            f"| **{row['certified_accuracy']:.1%}** | measured |"
        )
        lines += [
            f"| {row['defense']} | {patch} | {row['clean_accuracy']:.1%} | {row['certified_accuracy']:.1%} "
            f"| {row['source']} |"
            for row in published
            if str(row["patch"]) == patch
        ]
    return lines


class Reach:
    """Number of regions that a patch affects in the shipped models."""

    def __init__(self) -> None:
        self._grids: dict[str, Any] = {}

    def __call__(self, model: str, threat: str) -> str:
        """Size of the largest windows and of the map, rows x columns; empty for a model that is not shipped."""
        if model not in shipped_models():
            return ""
        if model not in self._grids:
            self._grids[model] = load_model(model, checked=False).scorer.grid()
        grid = self._grids[model]
        blocks = grid.windows(PatchThreatModel.parse(threat, grid.image_size))
        largest = dict.fromkeys(f"{block.rows.sum(1).max()}x{block.cols.sum(1).max()}" for block in blocks)
        rows, cols = grid.map_size
        shown = "; ".join(largest) if len(largest) <= 2 else f"{len(largest)} shapes"
        return f"{shown} of {rows}x{cols}"


def accuracy_table() -> list[str]:
    reach = Reach()
    lines = [
        "| patch, px | regions reached | model | rule | clean | certified (95% interval) |",
        "|---|---|---|---|---|---|",
    ]
    for row, run in measured():
        low, high = row["interval95"]["certified_accuracy"]
        lines.append(
            f"| {row['threat']} | {reach(run['model'], row['threat'])} | `{run['model']}` | {row['rule']} "
            f"| {row['clean_accuracy']:.1%} | **{row['certified_accuracy']:.1%}** ({low:.1%} to {high:.1%}) |"
        )
    for run in (load(path) for path in sorted((ROOT / "results" / "averaged").glob("*.json"))):
        row = run["rows"]["flip-averaged"]
        low, high = wilson_interval(round(row["certified_accuracy"] * run["images"]), run["images"])
        lines.append(
            f"| {run['patch']} | {reach(run['model'], run['patch'])} | `{run['model']}`, map averaged with that of the "
            f"mirror image: two passes | {run['rule']} | {row['clean_accuracy']:.1%} "
            f"| **{row['certified_accuracy']:.1%}** ({low:.1%} to {high:.1%}) |"
        )
    return lines


def speed_lines() -> list[str]:
    path = ROOT / "results" / "speed" / "evaluate-cifar10.json"
    if not path.exists():
        return []
    run = load(path)
    forward = run["seconds"]["forward"]
    rows = [row for row in run["results"] if row["patch"] == [5, 5]]
    rules = ", ".join(f"{row['rule']} {row['seconds']:.2f} s ({row['seconds'] / forward:+.1%})" for row in rows)
    whole = run["seconds"]["load"] + forward + max(row["seconds"] for row in rows)
    return [
        f"`{run['model']}` on {run['threads']} CPU cores ({run['dtype']}, medians of {run['repeat']} runs): loading "
        f"{run['seconds']['load']:.1f} s, forward pass for {run['images']:,} images {forward:.1f} s, "
        f"certificates at 5x5: {rules}; {whole:.1f} s together. "
        "The BagCert paper reports 39.0 to 48.5 s on a V100.",
    ]


def masks_table() -> list[str]:
    """Accuracy and cost of double masking with merged masks, on held-out training images."""
    runs = [load(path) for path in sorted((ROOT / "results" / "masks").glob("*.json"))]
    lines = ["| masks per axis | clean | certified | rule, ms per image |", "|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: run.get("masks_per_axis", math.inf)):
        (row,) = run["results"]
        lines.append(
            f"| {run.get('masks_per_axis', 'all')} | {row['clean_accuracy']:.1%} | {row['certified_accuracy']:.1%} "
            f"| {1000 * row['seconds'] / run['images']:.2f} |"
        )
    return [
        f"`{runs[0]['model']}` against {PATCH}x{PATCH} px on {runs[0]['images']:,} held-out training images, with "
        "neighboring masks merged (`bagcert evaluate cifar10 --data data/cifar10 --split held-out --masks-per-axis K "
        "--json`):",
        "",
        *lines,
    ]


def mixed_sizes_table() -> list[str]:
    """CPU time of photos of mixed sizes, compared with the same photos at one size."""
    lines = ["| model | command | mixed, s | one size, s | ratio |", "|---|---|---|---|---|"]
    runs = [load(path) for path in sorted((ROOT / "results" / "speed").glob("mixed_sizes*.json"))]
    for run in runs:
        for command, seconds in run["cpu_seconds"].items():
            lines.append(
                f"| `{run['model']}` | `{command}` | {seconds['mixed']:.1f} | {seconds['one']:.1f} "
                f"| {run['ratio'][command]:.2f} |"
            )
    first = runs[0]
    return [
        f"CPU time for {first['images']:,} photos of {first['distinct_sizes']} different sizes and "
        f"{len(first['patches'])} patch sizes, compared with the same photos at the size of the network's input "
        f"(`python benchmarks/mixed_sizes.py`). Of {sum(run['photos_compared_with_one_at_a_time'] for run in runs)} "
        f"photos compared with one photo at a time, {sum(run['photos_that_differ'] for run in runs)} differ.",
        "",
        *lines,
    ]


def backend_table() -> list[str]:
    path = ROOT / "results" / "speed" / "backends.json"
    if not path.exists():
        return []
    run = load(path)
    lines = [
        f"`python benchmarks/backends.py` ({run['rule']}, {run['patch']} px, {run['threads']} CPU cores):",
        "",
        "| backend | dtype | images/s | forward, s | certificates, s | clean | certified "
        "| certificates that differ from torch's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured, refused = ([row for row in run[key] if row["backend"] in BACKENDS] for key in ("results", "refused"))
    for row in measured:
        lines.append(
            f"| {row['backend']} | {row['dtype']} | {row['images_per_second']:,.0f} | {row['forward_seconds']:.1f} "
            f"| {row['rule_seconds']:.2f} | {row['clean_accuracy']:.1%} | {row['certified_accuracy']:.1%} "
            f"| {row['other_certificates']} |"
        )
    lines += [f"| {row['backend']} | {row['dtype']} | refused: not local | | | | | |" for row in refused]
    return lines


def cost_table() -> list[str]:
    path = ROOT / "results" / "speed" / "rule-cost.json"
    if not path.exists():
        return []
    run = load(path)
    lines = [
        "",
        "Milliseconds per image, and in parentheses the share of the forward pass "
        f"({run['threads']} CPU cores, float32, synthetic score maps; `python benchmarks/rule_cost.py`):",
        "",
        "| image, px | network | regions | classes | patch | forward | vote | double masking |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        ms, share = row["ms_per_image"], row["share_of_forward"]
        costs = [f"{ms[rule]:.3f} ({share[rule]:.1%})" for rule in ("vote", "double-masking")]
        regions = "x".join(map(str, row["regions"]))
        of_recipe = f" of `{row['recipe']}`" if row.get("recipe") else ""
        lines.append(
            f"| {row['image_px']} | {row['architecture']}{of_recipe} | {regions} | {row['classes']:,} | {row['patch']} "
            f"| {ms['forward']:.2f} | {costs[0]} | {costs[1]} |"
        )
    return lines


def soundness_lines() -> list[str]:
    """A list: how often rules, certificates, running commands and loaders were tested, and what failed."""
    path = ROOT / "results" / "soundness.json"
    parts = {name: part["result"] for name, part in load(path)["parts"].items()} if path.exists() else {}
    said = []
    if run := parts.get("agreement"):
        said.append(
            f"rules against brute force on {run['cases']:,} tiny cases ({run['ties']:,} with ties): "
            f"{run['disagreements']} disagreements, {run['attacked_certificates']:,} certificates attacked with all or "
            f"extreme contents, {run['broken_certificates']} broken"
        )
    if run := parts.get("masks"):
        said.append(
            f"random patch notations under random masks of allowed placements on {run['cases']:,} cases: "
            f"{run['attacked_certificates']:,} certificates attacked with any promised rectangle, "
            f"{run['broken_certificates']} broken"
        )
    if run := parts.get("pooling"):
        said.append(
            f"attention pooling against integers of any size on {run['cases']:,} cases: {run['disagreements']} "
            f"disagreements, {run['attacked_maps']:,} attacked maps, {run['broken_certificates']} certificates broken"
        )
    if run := parts.get("photo-files"):
        said.append(
            f"photo files of {len(run['certified_by_format'])} formats and orientations on {run['cases']:,} cases: "
            f"{run['attacks']:,} attacks on the stored file, {run['broken_certificates']} certificates broken"
        )
    if run := parts.get("networks"):
        said.append(
            f"random networks given to `RegionScorer.from_module`: {run['cases']:,}, accepted {run['accepted']:,}, of "
            f"which {run['leaks']} see further than derived"
        )
    if run := parts.get("records"):
        said.append(
            f"altered and hostile certificate records given to `verify`: {run['cases']:,}, wrongly accepted: "
            f"{run['wrongly_accepted']}"
        )
    if run := parts.get("model-folders"):
        said.append(f"altered model folders: {run['cases']:,}, certificates broken: {run['broken']}")
    for run in (parts[name] for name in ("attack-2x2", "attack-5x5") if name in parts):
        said += [
            f"`{run['model']}` attacked with {row['threat']} px on {run['images']:,} test images: "
            f"{row['clean_accuracy']:.1%} clean, {row['attacked_accuracy']:.1%} under attack, "
            f"{row['certified_accuracy']:.1%} certified; {row['certified_attempts']:,} attempts on certified images, "
            f"{row['broken_certificates']} broken"
            for row in run["results"]
        ]
    undefended = ROOT / "results" / "attacks" / "undefended.json"
    if undefended.exists():
        run = load(undefended)
        said.append(
            f"a gradient attack takes an undefended network from {run['clean_accuracy']:.1%} to "
            f"{run['attacked_accuracy']:.1%} at 5x5"
        )
    if run := parts.get("mutants"):
        said.append(f"{run['killed']} of {run['mutants']} planted mistakes noticed by the tests")
    if run := parts.get("faults"):
        gave_way = run["incomplete"] + run["differing"] + run["half_written_accepted"]
        kills = sum(run["kills"].values())
        said.append(f"{kills} runs killed at random moments and resumed: {gave_way} incomplete or different")
    if run := parts.get("fuzz"):
        said.append(f"{run['executions']:,} hostile inputs to the loaders, crashes: {run['crashes']}")
    if run := parts.get("fuzz-again"):
        names = " and ".join(each["target"] for each in run["targets"])
        said.append(f"after the fix, {run['executions']:,} more to those for {names}, crashes: {run['crashes']}")
    return [f"- {line[0].upper() + line[1:] if not line.startswith('`') else line}." for line in said]


def ablation_table() -> list[str]:
    lines: list[str] = []
    for path in sorted((ROOT / "results" / "ablations").glob("*.json")):
        run = load(path)
        shared = f" with `{' '.join(run['shared'])}`" if run["shared"] else ""
        lines += [
            "",
            f"One change against the recipe `{run['recipe']}`{shared} at a time, {run['epochs']} epochs each, seed 0, "
            f"on {run['results'][0]['images']:,} held-out training images:",
            f"`{run['command']}`",
            "",
            "| change | million multiply-adds | clean | certified | by vote |",
            "|---|---|---|---|---|",
        ]
        for row in run["results"]:
            masking, vote = row["rules"]["double-masking"], row["rules"].get("vote")
            by_vote = f"{vote['clean_accuracy']:.1%} / {vote['certified_accuracy']:.1%}" if vote else ""
            lines.append(
                f"| {row['name']} | {row['multiply_adds'] / 1e6:.0f} | {masking['clean_accuracy']:.1%} "
                f"| {masking['certified_accuracy']:.1%} | {by_vote} |"
            )
    return lines


def _area(row: dict[str, Any]) -> float:
    return row["patch"][0] * row["patch"][1] if row["patch"] else float("inf")


def sections() -> dict[str, dict[str, list[str]]]:
    """By file and by name of a section: its lines."""
    results = ROOT / "results"
    return {
        "README.md": {"headline": headline(), "results": summary_table()},
        "docs/results.md": {
            "accuracy": accuracy_table(),
            "speed": speed_lines(),
            "masks": masks_table(),
            "mixed-sizes": mixed_sizes_table(),
            "backends": backend_table(),
            "soundness": soundness_lines(),
            "benchmark": benchmark_tables(results),
            "published": published_table(results),
            "cost": cost_table(),
            "ablations": ablation_table(),
        },
    }


def render(text: str, parts: dict[str, list[str]]) -> str:
    """The text with each of its sections replaced.

    Raises:
        ValueError: a section is missing.
    """
    for name, lines in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        start, stop = text.index(begin) + len(begin), text.index(end)
        text = text[:start] + "\n" + "\n".join(lines).strip("\n") + "\n" + text[stop:]
    return text


def rendered() -> Iterator[tuple[Path, str]]:
    """Every file with the content it should have."""
    for name, parts in sections().items():
        path = ROOT / name
        yield path, render(path.read_text(encoding="utf-8"), parts)
    yield ROOT / "docs" / "images" / "certified-speed.svg", benchmark_plot(ROOT / "results", PATCH)


def main() -> int:
    stale = [(path, text) for path, text in rendered() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path, _ in stale:
            print(f"{path.relative_to(ROOT)} does not match results/: run python tools/results_tables.py")
        return int(bool(stale))
    for path, text in stale:
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
