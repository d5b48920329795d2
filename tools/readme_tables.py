"""Writes README's result tables from `results/`. With --check, only says whether they are up to date.

python tools/readme_tables.py
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# Published figures: CIFAR-10 at 32x32, trained from scratch, 5x5 patch. Copied from the papers, not measured here.
PUBLISHED = [
    ("BagCert, V100 (Metzen & Yatsura 2021)", "vote", 0.86, 0.60),
    ("De-randomized smoothing, column (Levine & Feizi 2020)", "Levine-Feizi", 0.838, 0.576),
    ("Interval bounds (Chiang et al. 2020)", "IBP", 0.478, 0.303),
]


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
    for name, rule, clean, certified in PUBLISHED:
        lines.append(f"| 5 | *published:* {name} | {rule} | {clean:.1%} | {certified:.1%} |")
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
        lines.append(
            f"| {row['image_px']} | {row['architecture']} | {regions} | {row['classes']:,} | {row['patch']} "
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
    if run := parts.get("mutants"):
        said.append(f"{run['killed']} of {run['mutants']} planted mistakes caught by the tests")
    if run := parts.get("faults"):
        gave_way = run["incomplete"] + run["differing"] + run["half_written_accepted"]
        kills = sum(run["kills"].values())
        said.append(f"{kills} runs killed at random moments and resumed, {gave_way} incomplete or different")
    if run := parts.get("fuzz"):
        said.append(f"{run['executions']:,} hostile inputs to the loaders, {run['crashes']} crashes")
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
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return (
        readme[:start]
        + "\n"
        + "\n".join([*accuracy_table(), *speed_lines(), *soundness_lines(), *cost_table(), *ablation_table()])
        + "\n"
        + readme[end:]
    )


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
