"""Generates the tables of docs/scaling.md from `results/`. With --check, only checks whether they are up to date.

python tools/scaling_tables.py
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"

PRICE = 0.10  # US dollars per hour of a machine of two cores; yours may differ
DEADLINE_HOURS = 24
COUNTS = (10**6, 10**9)
MIB = 2**20


def load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def missing(command: str) -> list[str]:
    return [f"Not measured yet: `python {command}`."]


def growth(results: Path) -> list[str]:
    """A table of points for each series, the lines nearest to them, and an explanation of what is no line."""
    run = load(results / "speed" / "cost-growth.json")
    if run is None:
        return missing("benchmarks/cost_growth.py")
    lines = [
        f"Measured on {run['cores']} CPU cores, load average {run['load_average_before']} before the run, network of "
        f"`{run['recipe']}` with random weights, {run['rule']}: `{run['command']}`.",
    ]
    for name, series in run["series"].items():
        lines += [
            "",
            f"**{name[0].upper() + name[1:]}**",
            "",
            f"| {series['x']} | images | seconds | forward | rule | images per second | peak memory, MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for point in series["points"]:
            lines.append(
                f"| {point['x']:,} | {point['images']:,} | {point['seconds']:.2f} | {point['forward_seconds']:.2f} "
                f"| {point['rule_seconds']:.2f} | {point['images'] / point['seconds']:,.0f} "
                f"| {point['peak_memory_mib']:,} |"
            )
        lines += ["", *_lines(series, run["straight_below"])]
    return lines


def _lines(series: dict[str, Any], straight_below: float) -> list[str]:
    if not series["lines"]:
        return [f"{_speed_up(series['points'])} {series['why']}"]
    named = {
        "seconds": ("time", "s"),
        "forward_seconds": ("forward pass", "s"),
        "rule_seconds": ("rule", "s"),
        "peak_memory_mib": ("memory", "MiB"),
    }
    said, bent = [], []
    for key, fit in series["lines"].items():
        word, unit = named[key]
        said.append(
            f"{word} {fit['intercept']:.3g} {unit} + {fit['slope']:.3g} {unit} each, "
            f"farthest point {fit['largest_deviation']:.0%} away"
        )
        if fit["largest_deviation"] > straight_below:
            bent.append(word)
    verdict = f"Not straight: {', '.join(bent)}." if bent else "All straight."
    return [f"Nearest lines in {series['x']}: {'; '.join(said)}. {verdict} {series['why']}"]


def _speed_up(points: list[dict[str, Any]]) -> str:
    first, last = points[0], points[-1]
    return f"From {first['x']} to {last['x']}: {first['seconds'] / last['seconds']:.2f} times as fast."


def projection(results: Path) -> list[str]:
    """Machine-hours, machines and cost of a million and a billion images."""
    rates: list[tuple[str, float]] = []
    run = load(results / "speed" / "cost-growth.json")
    if run is not None:
        rates.append((f"32 px, 10 classes, `{run['recipe']}`", run["series"]["images"]["lines"]["seconds"]["slope"]))
    costs = load(results / "speed" / "rule-cost.json")
    for side in (64, 224):
        rows = [row for row in (costs or {"results": []})["results"] if row["image_px"] == side]
        rows = [row for row in rows if row["classes"] == 1000 and row["patch"] == "2%"]
        if rows:  # those of a recipe's own network come last
            row = rows[-1]
            ms = row["ms_per_image"]["forward"] + row["ms_per_image"]["double-masking"]
            rates.append((f"{side} px, 1,000 classes, {row.get('recipe') or row['architecture']}", ms / 1e3))
    if not rates:
        return missing("benchmarks/cost_growth.py")
    lines = [
        f"Price: {PRICE:.2f} US dollars per hour of a machine of two cores. Machines: as many as finish in "
        f"{DEADLINE_HOURS} hours.",
        "",
        "| network | ms per image, *measured* | images | machine-hours, *extrapolated* | machines | US dollars |",
        "|---|---|---|---|---|---|",
    ]
    for what, seconds in rates:
        for count in COUNTS:
            hours = seconds * count / 3600
            machines = math.ceil(hours / DEADLINE_HOURS)
            lines.append(
                f"| {what} | {seconds * 1e3:.2f} | {count:,} | {_number(hours)} | {machines:,} "
                f"| {_number(hours * PRICE)} |"
            )
    if run is not None:
        each = max(point["record_bytes_per_image"] for point in run["series"]["images"]["points"])
        lines += [
            "",
            f"A record has {each:.0f} bytes per image and patch as JSON: {each * COUNTS[0] / 1e9:.2f} GB for a million "
            f"images, {each * COUNTS[1] / 1e9:,.0f} GB for a billion.",
        ]
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rehearsals(results: Path) -> list[str]:
    """Renders the cost of training from a recipe: measured here, and estimated for several accelerators."""
    runs = [run for path in sorted((results / "rehearsals").glob("*.json")) if (run := load(path)) is not None]
    if not runs:
        return missing("benchmarks/rehearse.py")
    lines = [
        "| recipe | classes | multiply-adds per image | images per second, *measured* "
        "| MiB per image of a batch, *measured* | hours here, *extrapolated* | accelerators "
        "| hours on them, *extrapolated* |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        measured, assumed, beyond = run["measured"], run["assumed"], run["extrapolated"]
        fastest = max(each["images_per_second"] for each in measured["runs"])
        lines.append(
            f"| `{run['recipe']}` | {run['classes']:,} | {measured['multiply_adds_per_image'] / 1e9:.2f} billion "
            f"| {fastest:.2f} | {beyond.get('mib_per_image_of_a_batch', '')} | {_number(beyond['hours_here'])} "
            f"| {assumed['accelerators']} | {_number(beyond['hours_on_accelerators'])} |"
        )
    lines.append("")
    for run in runs:
        assumed = run["assumed"]
        lines.append(
            f"- `{run['recipe']}`: {assumed['training_images']:,} images, {assumed['epochs']} epochs. Measured on "
            f"{run['device']} ({run['threads']} threads, {run['precision']}), load average "
            f"{run['load_average_before']} before the run. Speed of the accelerators: from "
            f"{run['extrapolated']['accelerator_speed_from']} ({assumed['tflops_per_accelerator']:g} TFLOP/s each; "
            f"{assumed['scaling_efficiency']:.0%} of it together)."
        )
    return lines


def limit(results: Path) -> list[str]:
    """Renders forward pass and rule relative to the limits of the machine, and the speed of each implementation."""
    run = load(results / "speed" / "limit.json")
    if run is None:
        return missing("benchmarks/speed_limit.py")
    lines = [
        f"Measured on {run['device']} ({run['processor']}, {run['threads']} threads), load average "
        f"{run['load_average_before']} before the run, `{run['model']}`, {run['multiply_adds_per_image'] / 1e6:.1f} "
        f"million multiply-adds per image: `{run['command']}`.",
        "",
        "| dtype | multiply-adds per second, *measured* | fastest product | copy, GB/s |",
        "|---|---|---|---|",
    ]
    for dtype, rate in run["rates"].items():
        lines.append(
            f"| {dtype} | {rate['multiply_adds_per_second'] / 1e9:.1f} billion | {rate['product']} "
            f"| {rate['bytes_per_second'] / 1e9:.1f} |"
        )
    together = run["forward_and_rule"]
    lines += [
        "",
        f"**Forward pass and {run['rule']}** against {run['patch']} px, {together[0]['images']:,} images",
        "",
        "| backend | dtype | images per second | seconds over the arithmetic bound |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['backend']} | {row['dtype']} | {_speed(row)} |" for row in together]
    lines += [
        "",
        f"**Forward pass alone**, {run['ways'][0]['images']} images",
        "",
        "| way | dtype | images per second | over the arithmetic bound |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['way']} | {row['dtype']} | {_speed(row)} |" for row in run["ways"]]
    lines += ["", "| images at once | images per second | over the arithmetic bound |", "|---|---|---|"]
    lines += [f"| {row['images_at_once']} | {_speed(row)} |" for row in run["images_at_once"]]
    layers = run["layers"]["rows"]
    convolutions = [row for row in layers if row["multiply_adds"]]
    others = [row for row in layers if not row["multiply_adds"]]
    lines += [
        "",
        f"Layer by layer in float32, {run['layers']['images']} images: {_over(convolutions)} in {len(convolutions)} "
        f"convolutions; {_over(others)} in {len(others)} other layers.",
        "",
        f"On the way from files to records, seconds for {run['stages']['images']:,} images: "
        + ", ".join(f"{what} {seconds:.3f}" for what, seconds in run["stages"]["seconds"].items())
        + ".",
    ]
    return lines


def _speed(row: dict[str, Any]) -> str:
    return f"{row['images_per_second']:,.0f} | {row['over_bound']:.2f}"


def many(results: Path) -> list[str]:
    """Renders the results of a run over very many images in which a worker was killed."""
    run = load(results / "speed" / "many_images.json")
    if run is None:
        return missing("benchmarks/many_images.py")
    same = "equal" if run["rows_equal_to_local"] else "**not equal**"
    return [
        f"Measured: {run['images']:,} images of CIFAR-10, from {run['source']}, {run['cores']} CPU cores, patch "
        f"{run['patch']}. On Ray with {run['ray']['workers']} workers, {run['workers_killed']} of them killed after "
        f"{run['killed_after_share'][0]:.0%}: {run['lost']} lost, {run['doubled']} doubled, rows {same} to those of "
        f"the local engine; {run['ray']['seconds']:.0f} s ({run['ray']['images_per_second']:.0f} images per second), "
        f"the local engine {run['local']['seconds']:.0f} s ({run['local']['images_per_second']:.0f}), with listing, "
        f"fetching, decoding and writing: `{run['command']}`."
    ]


def _over(layers: list[dict[str, Any]]) -> str:
    seconds, bound = (sum(row[key] for row in layers) for key in ("seconds", "bound_seconds"))
    return f"{seconds * 1e3:.0f} ms over a bound of {bound * 1e3:.0f} ms"


PARTS = {"growth": growth, "projection": projection, "rehearsals": rehearsals, "limit": limit, "many": many}


def render(page: str, results: Path) -> str:
    """Returns the page with the generated part between each pair of markers replaced."""
    for name, part in PARTS.items():
        begin, end = BEGIN.format(name), END.format(name)
        start, stop = page.index(begin) + len(begin), page.index(end)
        page = page[:start] + "\n" + "\n".join(part(results)) + "\n" + page[stop:]
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    arguments = parser.parse_args()
    before = arguments.page.read_text(encoding="utf-8")
    after = render(before, arguments.results)
    if arguments.check:
        if before != after:
            print(f"the tables of {arguments.page.name} do not match results/: run python tools/scaling_tables.py")
        return int(before != after)
    arguments.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
