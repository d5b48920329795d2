"""The report as one self-contained HTML file. All text from files is escaped."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from bagcert.io.files import write_atomically
from bagcert.records import RunInfo, in_unit, spread
from bagcert.report import svg
from bagcert.report.pictures import gallery
from bagcert.report.summary import (
    KINDS,
    Inputs,
    Run,
    Training,
    confusion,
    largest_patches,
    margins,
    patch_curves,
    patch_title,
    per_class,
)

TITLE = "Certified accuracy against adversarial patches"
KIND_STYLES = ("k0", "k1", "k2")
MOST_CLASSES_IN_MATRIX = 30
MOST_CLASSES_LISTED = 100


def write_report(inputs: Inputs, path: Path, title: str | None = None) -> None:
    """Writes the page atomically."""
    write_atomically(path, render(inputs, title).encode())


def render(inputs: Inputs, title: str | None = None) -> str:
    """Renders the page as text. The same inputs give the same page."""
    template = Template((resources.files("bagcert.report") / "template.html").read_text(encoding="utf-8"))
    sections = [_curves(inputs.runs)] if inputs.runs else []
    sections += [_run(run) for run in inputs.runs]
    sections += [_training(training) for training in inputs.trainings]
    return template.substitute(
        title=escape(title or TITLE), headline=_headline(inputs.runs), sections="\n".join(filter(None, sections))
    )


def _headline(runs: Sequence[Run]) -> str:
    sentences = []
    for run in runs:
        info = run.info
        best = info.results[run.headline]
        low, high = (100 * bound for bound in best.interval95["certified_accuracy"])
        promise = "cannot change the prediction" if best.rule != "detection" else "cannot change it without an alert"
        sentences.append(
            f'<p class="headline"><b>{best.certified_accuracy:.1%}</b> of {info.images:,} images of '
            f"{escape(info.data)} are classified correctly by {escape(info.model)} with a certificate: "
            f"{escape(attacker(best.threat, info.pixels))}, {promise}, whatever it shows "
            f"(rule {escape(best.rule)}, 95 % interval {low:.1f} to {high:.1f} %). "
            f"{best.clean_accuracy:.1%} are classified correctly without an attack.</p>{_notes(info)}"
        )
    return "\n".join(sentences)


def _notes(info: RunInfo) -> str:
    return "".join(f'<p class="note">Note: {escape(note)}.</p>' for note in info.notes or ())


def attacker(threat: str, pixels: str = "") -> str:
    """Describes a threat from a record in words; `pixels` as in `RunInfo`.

    >>> attacker("5"), attacker("2*3 within the allowed placements")
    ('one patch of 5 px, anywhere', '2 patches of 3 px, within the allowed placements')
    >>> attacker("2%")
    'one patch of 2% of the image, anywhere'
    """
    size, _, where = threat.partition(" ")
    count, star, each = size.partition("*")
    patches = f"{count} patches of {in_unit(each, pixels)}" if star else f"one patch of {in_unit(size, pixels)}"
    return f"{patches}, {where or 'anywhere'}"


def _curves(runs: Sequence[Run]) -> str:
    patches, curves = patch_curves(runs)
    place = {patch: i for i, patch in enumerate(patches)}
    ordered = {name: sorted(points.items(), key=lambda item: place[item[0]]) for name, points in curves.items()}
    whose = {run.info.pixels for run in runs if run.info.pixels}
    chart = svg.lines(
        {name: [(float(place[patch]), values[0]) for patch, values in points] for name, points in ordered.items()},
        patch_title(patches) + (f" {whose.pop()}" if len(whose) == 1 and patch_title(patches) != "patch" else ""),
        "certified accuracy, %",
        100.0,
        patches,
        {name: [(low, high) for _, (_, low, high) in points] for name, points in ordered.items()},
    )
    note = '<p class="note">Bars are 95 % intervals (Wilson). Lines only join points of one rule.</p>'
    return _section("Certified accuracy against patch size", chart + svg.legend(list(curves)) + note)


def _run(run: Run) -> str:
    info = run.info
    parts = [f"<h2>{escape(info.model)} on {escape(info.data)}</h2>", _asked(info), _table(info)]
    if run.records is None:
        missing = "Per-class results, margins and pictures need the records file of bagcert evaluate --out."
        return "<section>" + "".join(parts) + f'<p class="note">{missing}</p></section>'
    shown = info.results[run.headline]
    what = f"{escape(shown.rule)}, {escape(attacker(shown.threat, info.pixels))}"
    edges, groups = margins(run, run.headline)
    histogram = svg.histogram(edges, groups, KIND_STYLES, "margin")
    parts += [
        f"<h3>Margins <small>{what}</small></h3>{histogram}{svg.legend(KINDS, KIND_STYLES)}"
        '<p class="note">Worst-case lead of the prediction in score units. Certified if at least 0.</p>',
        f"<h3>Accuracy per class <small>{what}</small></h3>{_per_class(run)}",
        f"<h3>Confusion <small>{what}, no attack</small></h3>{_confusion(run)}",
    ]
    if sides := [record.largest_px for record in run.records if record.largest_px is not None]:
        edges, groups = largest_patches(run)
        parts.append(
            "<h3>Largest certifiable patch</h3>"
            f"{svg.histogram(edges, groups, KIND_STYLES[::2], 'side of a square, px')}"
            f"{svg.legend(list(groups), KIND_STYLES[::2])}"
            f'<p class="note">Of {len(sides):,} images: {escape(spread(run.records, info.pixels))}. It is the largest '
            "square patch for which a double-masking defense built for it certifies the same prediction.</p>"
        )
    if pictures := gallery(run):
        parts.append(
            f"<h3>Pictures <small>{what}</small></h3>"
            '<p class="note">Left: the image, with its largest certified square patch in the lower left corner, '
            "to scale, and the worst-case patch placement outlined (two windows for double masking). "
            "Right: the votes of the regions for <span class='for'>the prediction</span> or "
            f"<span class='against'>the runner-up</span>.</p>{pictures}"
        )
    return f"<section>{''.join(parts)}</section>"


def _asked(info: RunInfo) -> str:
    limit = "" if info.limit is None else f", --limit {info.limit}" if info.notes else f", the first {info.limit:,}"
    unreadable = f", {info.unreadable:,} unreadable left out" if info.unreadable else ""
    seconds = info.seconds
    attackers = dict.fromkeys(attacker(row.threat, info.pixels) for row in info.results)
    facts = {
        "Model": f"{info.model}, weights SHA-256 {info.weights_sha256[:16]}",
        "Data": f"{info.data}, split {info.split}, {info.images:,} images{limit}{unreadable}",
        "Threat": "any content under " + "; or under ".join(attackers),
        "Rules": ", ".join(dict.fromkeys(row.rule for row in info.results)),
        "Hardware": f"{info.device}, {info.threads} threads, {info.backend}, {info.dtype}",
        "Versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
        "Seconds": ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
    }
    if info.placements is not None:
        facts["Placements"] = f"the white part of {info.placements['file']}, SHA-256 {info.placements['sha256'][:16]}"
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{items}</dl>"


def _table(info: RunInfo) -> str:
    rows = info.results
    attacked = any(row.attacked_accuracy is not None for row in rows)
    head = ["patch", "rule", "clean", *(["attacked"] if attacked else []), "certified", "95 % interval", "seconds"]
    body = []
    for row in rows:
        low, high = row.interval95["certified_accuracy"]
        under = ["" if row.attacked_accuracy is None else f"{row.attacked_accuracy:.1%}"] if attacked else []
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        cells = [f"{row.clean_accuracy:.1%}", *under, f"{row.certified_accuracy:.1%}", interval, f"{row.seconds:.2f}"]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        body.append(f"<tr><td>{escape(in_unit(row.threat, info.pixels))}</td><td>{escape(row.rule)}</td>{numbers}</tr>")
    return _tabular(head, body, 2)


def _tabular(head: Sequence[str], body: Sequence[str], texts: int) -> str:
    titles = "".join(f"<th{' class=n' if i >= texts else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _per_class(run: Run) -> str:
    rows = per_class(run, run.headline)
    body = []
    for row in rows[:MOST_CLASSES_LISTED]:
        clean, proved = row["clean"] / row["images"], row["certified"] / row["images"]
        bar = (
            f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="k1" '
            f'width="{100 * clean:.1f}" height="10"/><rect class="k0" width="{100 * proved:.1f}" height="10"/></svg>'
        )
        name = escape(run.class_name(row["label"]))
        body.append(
            f'<tr><td>{name}</td><td class="n">{row["images"]:,}</td><td class="n">{clean:.1%}</td>'
            f'<td class="n">{proved:.1%}</td><td class="bars">{bar}</td></tr>'
        )
    more = f'<p class="note">{len(rows) - len(body):,} more classes.</p>' if len(rows) > len(body) else ""
    return _tabular(["class", "images", "clean", "certified", ""], body, 1) + more


def _confusion(run: Run) -> str:
    """Renders a confusion matrix, or a list of the most frequent confusions if there are many classes."""
    classes, counts = confusion(run, run.headline)
    if len(classes) > MOST_CLASSES_IN_MATRIX:
        wrong = [(int(counts[i, j]), i, j) for i, j in zip(*np.nonzero(counts), strict=True) if i != j]
        body = [
            f"<tr><td>{escape(run.class_name(classes[i]))}</td><td>{escape(run.class_name(classes[j]))}</td>"
            f'<td class="n">{count:,}</td></tr>'
            for count, i, j in sorted(wrong, key=lambda item: (-item[0], item[1:]))[:20]
        ]
        return _tabular(["class", "answered", "images"], body, 2)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [escape(run.class_name(label)) for label in classes]
    body = []
    for i, name in enumerate(names):
        cells = "".join(
            f'<td class="cell {"k0" if i == j else "k2"}" style="--share:{shares[i, j]:.2f}">{counts[i, j] or ""}</td>'
            for j in range(len(classes))
        )
        body.append(f"<tr><th>{name}</th>{cells}</tr>")
    head = "".join(f"<th><span>{name}</span></th>" for name in names)
    return (
        f'<div class="wide"><table class="matrix"><thead><tr><th>is \\ answered</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _training(training: Training) -> str:
    shares = {"clean": training.curve("clean_accuracy", True), "certified": training.curve("certified_accuracy", True)}
    loss = {"loss": training.curve("loss")}
    if not any(shares.values()) and not loss["loss"]:
        return _section(f"Training of {training.name}", '<p class="note">No epoch has been validated yet.</p>')
    shares = {name: points for name, points in shares.items() if points}
    content = ""
    if shares:
        content += svg.lines(shares, "epoch", "validation accuracy, %", 100.0) + svg.legend(list(shares))
    if loss["loss"]:
        content += svg.lines(loss, "epoch", "training loss")
    last = training.points[-1]
    if "seconds" in last:
        content += f'<p class="note">{last["seconds"]:,.0f} seconds of training.</p>'
    return _section(f"Training of {training.name}", content)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"
