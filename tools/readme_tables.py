"""Writes README's result tables from `results/`. With --check, only says whether they are up to date.

python tools/readme_tables.py
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmark_tables import benchmark_tables, published_table

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def accuracy_table() -> list[str]:
    lines = [
        "CIFAR-10, all 10,000 test images, native 32x32, trained from scratch, one forward pass per image. Certified",
        "accuracy is the share of images answered rightly *and* proved, with its 95 % interval. Each row:",
        "`bagcert evaluate default --data data/cifar10 --patch PATCH --rule double-masking`, with CIFAR-10's",
        "Parquet files in `data/cifar10`; its JSON is under `results/cifar10/`.",
        "",
        "| patch, px | model | rule | clean | certified |",
        "|---|---|---|---|---|",
    ]
    runs = [load(path) for path in sorted((ROOT / "results" / "cifar10").glob("*/*.json"))]
    rows = [(row, run) for run in runs for row in run["results"]]
    for row, run in sorted(rows, key=lambda item: (_area(item[0]), item[0]["threat"], -item[0]["certified_accuracy"])):
        low, high = row["interval95"]["certified_accuracy"]
        lines.append(
            f"| {row['threat']} | `{run['model']}` | {row['rule']} | {row['clean_accuracy']:.1%} | "
            f"**{row['certified_accuracy']:.1%}** ({low:.1%} to {high:.1%}) |"
        )
    return lines


def speed_lines() -> list[str]:
    path = ROOT / "results" / "speed" / "evaluate-cifar10.json"
    if not path.exists():
        return []
    run = load(path)
    forward = run["seconds"]["forward"]
    rules = ", ".join(
        f"{row['rule']} {row['seconds']:.2f} s ({row['seconds'] / forward:+.1%})"
        for row in run["results"]
        if row["patch"] == [5, 5]
    )
    whole = run["seconds"]["load"] + forward + max(row["seconds"] for row in run["results"])
    return [
        "",
        f"On {run['threads']} CPU cores ({run['dtype']}, medians of {run['repeat']} runs): loading "
        f"{run['seconds']['load']:.1f} s, forward pass for {run['images']:,} images {forward:.1f} s, "
        f"certificates at 5x5: {rules}; {whole:.1f} s together. "
        "The paper reports 39.0 to 48.5 s on a V100.",
    ]


def backend_table() -> list[str]:
    path = ROOT / "results" / "speed" / "backends.json"
    if not path.exists():
        return []
    run = load(path)
    lines = [
        "",
        f"`--backend` and `--dtype` on {run['threads']} CPU cores, all in one run ({run['rule']}, {run['patch']} px; "
        "`python benchmarks/backends.py`):",
        "",
        "| backend | dtype | images/s | forward, s | certificates, s | clean | certified "
        "| other certificates than torch's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        lines.append(
            f"| {row['backend']} | {row['dtype']} | {row['images_per_second']:,.0f} | {row['forward_seconds']:.1f} "
            f"| {row['rule_seconds']:.2f} | {row['clean_accuracy']:.1%} | {row['certified_accuracy']:.1%} "
            f"| {row['other_certificates']} |"
        )
    lines += [f"| {row['backend']} | {row['dtype']} | refused: not local | | | | | |" for row in run["refused"]]
    return lines


def cost_table() -> list[str]:
    path = ROOT / "results" / "speed" / "rule-cost.json"
    if not path.exists():
        return []
    run = load(path)
    lines = [
        "",
        "How the rules' cost grows, in milliseconds per image and as a share of the forward pass",
        f"({run['threads']} CPU cores, float32; synthetic score maps; `python benchmarks/rule_cost.py`):",
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
    """One line: how often rules, certificates, running commands and loaders were tried, and what gave way."""
    path = ROOT / "results" / "soundness.json"
    parts = {name: part["result"] for name, part in load(path)["parts"].items()} if path.exists() else {}
    said = []
    if run := parts.get("agreement"):
        said.append(
            f"rules against brute force on {run['cases']:,} tiny cases ({run['ties']:,} with ties): "
            f"{run['disagreements']} disagreements, {run['attacked_certificates']:,} certificates attacked with all or "
            f"extreme contents, {run['broken_certificates']} broken"
        )
    attacks = [parts[name] for name in ("attack-2x2", "attack-5x5") if name in parts]
    if attacks:
        each = ", ".join(
            f"{row['threat']} px: {row['certified_accuracy']:.1%} certified, {row['attacked_accuracy']:.1%} under "
            f"attack, {row['clean_accuracy']:.1%} clean"
            for run in attacks
            for row in run["results"]
        )
        tried = sum(row["certified_attempts"] for run in attacks for row in run["results"])
        broken = sum(row["broken_certificates"] for run in attacks for row in run["results"])
        said.append(
            f"`cifar10-cpu` attacked on {attacks[0]['images']:,} test images ({each}): {tried:,} attempts on certified "
            f"images, {broken} broken"
        )
    undefended = ROOT / "results" / "attacks" / "undefended.json"
    if undefended.exists():
        run = load(undefended)
        said.append(
            f"the same attack takes an undefended network from {run['clean_accuracy']:.1%} to "
            f"{run['attacked_accuracy']:.1%} at 5x5"
        )
    if run := parts.get("mutants"):
        said.append(f"{run['killed']} of {run['mutants']} planted mistakes caught by the tests")
    if run := parts.get("faults"):
        gave_way = run["incomplete"] + run["differing"] + run["half_written_accepted"]
        kills = sum(run["kills"].values())
        said.append(f"{kills} runs killed at random moments and resumed, {gave_way} incomplete or different")
    if run := parts.get("fuzz"):
        said.append(f"{run['executions']:,} hostile inputs to the loaders, crashes: {run['crashes']}")
    if run := parts.get("fuzz-again"):
        names = " and ".join(each["target"] for each in run["targets"])
        said.append(f"after mending, {run['executions']:,} more to those of {names}, crashes: {run['crashes']}")
    return ["", f"Soundness, by `tools/soundness.py`: {'; '.join(said)}."] if said else []


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


def render(readme: str) -> str:
    parts = [
        accuracy_table(),
        speed_lines(),
        backend_table(),
        soundness_lines(),
        benchmark_tables(ROOT / "results"),
        published_table(ROOT / "results"),
        cost_table(),
        ablation_table(),
    ]
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:start] + "\n" + "\n".join(line for part in parts for line in part) + "\n" + readme[end:]


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print("README's tables do not match results/: run python tools/readme_tables.py")
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
