"""The model card on the hub: measured results, threat model and limitations."""

from pathlib import Path
from typing import Any

from bagcert.errors import UnreadableError, cleaned, sanitize
from bagcert.evaluation.results_files import RESULTS, read_results
from bagcert.nets.saved_model import ModelConfig
from bagcert.records import Row, RunInfo
from bagcert.rules import get_rule

MAX_RESULTS_BYTES = 1 << 22
MOST_CLASS_NAMES = 50
MOST_CHARACTERS = 200  # of one name

CITATION = """\
@software{bagcert,
  title  = {bagcert: certified defense against adversarial patches},
  author = {{bagcert contributors}},
  version = {0.2.0}
}
@inproceedings{metzen2021efficient,
  title     = {Efficient Certified Defenses Against Patch Attacks on Image Classifiers},
  author    = {Metzen, Jan Hendrik and Yatsura, Maksym},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}
@inproceedings{xiang2022patchcleanser,
  title     = {PatchCleanser: Certifiably Robust Defense against Adversarial Patches for Any Image Classifier},
  author    = {Xiang, Chong and Mahloujifar, Saeed and Mittal, Prateek},
  booktitle = {USENIX Security Symposium},
  year      = {2022}
}"""
"""The content of CITATION.cff as BibTeX; a test compares the two."""

LIMITS = """\
- Images that are not certified. Each image is certified or not; call `certify` to find out.
- Changes of the whole image: blur, noise, lighting, or JPEG compression after the patch was applied.
- Effects of a physical patch on the camera: sizes are in pixels of the image file, after lens, exposure and focus.
- A patch larger than the certified size, or more patches at once.
- Wrong predictions: a certificate states that a patch cannot change the prediction, not that it is correct. "Certified"
  in the table counts only images that are also classified correctly.
- Another defense: other weights, another rule, or masks built for another patch.
- Availability: an attacker can prevent an image from being certified, so plan for images without a certificate."""


def measured_results(folder: Path, weights_sha256: str) -> RunInfo | None:
    """Reads the evaluation next to the weights; None if there is none.

    Raises:
        UnreadableError: the file was not written by `bagcert evaluate --out`, or belongs to other weights.
    """
    path = folder / RESULTS
    if not path.exists():
        return None
    run = read_results(path, MAX_RESULTS_BYTES)
    if run.weights_sha256 != weights_sha256:
        raise UnreadableError(
            f"{path} is an evaluation of other weights ({sanitize(run.weights_sha256, 12)}) than those beside it "
            f"({weights_sha256[:12]}); evaluate this model anew"
        )
    return run


def model_card(config: ModelConfig, weights_sha256: str, results: RunInfo | None, repo_id: str) -> str:
    """Renders the README.md of a hub repository, in Markdown.

    Names come from files and are untrusted: each is put into a code span on one line, where markup has no effect.

    Args:
        results: measured results; with None, the card states that there are none.
        repo_id: `owner/name`, already validated.
    """
    height, width = config.image_size
    rule = get_rule(config.rule)
    promise = (
        "no content of that patch, anywhere, changes the answer"
        if rule.guarantee == "recovery"
        else "no content of that patch, anywhere, changes the answer without an alert"
    )
    parts = [
        "---\nlibrary_name: bagcert\npipeline_tag: image-classification\ntags:\n- adversarial-patch\n"
        "- certified-robustness\n- image-classification\n---",
        f"# {code(config.name)}",
        "An image classifier with a certified defense against adversarial patches. It predicts a class for each image "
        "and certifies, if possible, that no patch can change the prediction. "
        f"{len(config.class_names):,} classes, images of "
        f"{height}x{width} px (others are resized), architecture {code(config.architecture)}, rule "
        f"{code(config.rule)}.{_readout(config)}",
        f"## Measured\n\n{_measured(results, repo_id, config)}",
        "## Threat model\n\n"
        f"The attacker knows the model and replaces all pixels of one patch, {code(config.patch_text)} as this model "
        "is deployed, at any position, with any content. The other pixels do not change. Sizes are in pixels of the "
        "network's input; for an image of another size, give the patch in pixels of that image. A certificate covers "
        "all smaller patches and patches of any shape inside that rectangle. If an image is "
        f"certified, {promise}: {rule.summary}.",
        f"## What no certificate covers\n\n{LIMITS}",
        f"## Training\n\n{_training(config)}",
        "## Use\n\n```python\nimport bagcert\n\n"
        f'model = bagcert.load("{repo_id}")  # safetensors and JSON; no code is executed\n'
        "certificate = model.certify(images)     # uint8 [images, height, width, 3]\n"
        "certificate.prediction, certificate.certified, certificate.margin\n```\n\n"
        f"```sh\nbagcert certify photo.jpg --model {repo_id}\nbagcert doctor {repo_id}\n```\n\n"
        f"`model.safetensors` has the SHA-256 {code(weights_sha256)}.",
        f"## Classes\n\n{_classes(config.class_names)}",
        f"## Cite\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def code(text: object, in_table: bool = False) -> str:
    r"""Formats a text as a Markdown code span, in which markup, links and HTML have no effect.

    >>> print(code("cat"), code("a`b"), code("<b>\n|", in_table=True))
    `cat` `` a`b `` `<b>?\|`
    """
    line = cleaned(text)
    line = line[:MOST_CHARACTERS] + " ..." if len(line) > MOST_CHARACTERS else line
    if not line.strip():
        return "(empty)"
    fence = "`"
    while fence in line:
        fence += "`"
    space = " " if line.startswith("`") or line.endswith("`") or len(fence) > 1 else ""
    span = f"{fence}{space}{line}{space}{fence}"
    return span.replace("|", "\\|") if in_table else span


def _readout(config: ModelConfig) -> str:
    if not config.readout:
        return ""
    return (
        f" Class scores are not sums over regions: {config.attention_heads} attention heads pool {config.values} "
        f"values of every region, and a readout with {config.hidden} hidden units computes class scores from them."
    )


def _measured(results: RunInfo | None, repo_id: str, config: ModelConfig) -> str:
    if results is None or not results.results:
        return (
            "**This model has not been evaluated: it comes without results.** Evaluate it on your own images: "
            f"`bagcert evaluate {repo_id} --data FOLDER`."
        )
    height, width = config.image_size
    lines = [
        "| patch, px of the data | rule | clean | certified | certified, 95 % interval |",
        "|---|---|---|---|---|",
        *map(_line, results.results),
    ]
    limit = "" if results.limit is None else f" (the first {results.limit:,} only)"
    if results.notes:
        limit = f" ({code('; '.join(results.notes))})"
    unreadable = f"; {results.unreadable:,} could not be read" if results.unreadable else ""
    return (
        "\n".join(lines) + "\n\nClean: the share of images classified correctly. Certified: the share of images "
        "classified correctly *and* certified against any patch of that size, anywhere; a lower bound of the accuracy "
        f"under attack. Sizes are in pixels of the dataset's images, before they are resized to {height}x{width} px. "
        f"Intervals are Wilson intervals. Measured on {results.images:,} images{limit} of {code(results.data)}, split "
        f"{code(results.split)}{unreadable}, on {code(results.device)} in {code(results.dtype)}."
    )


def _line(row: Row) -> str:
    low, high = row.interval95["certified_accuracy"]
    return (
        f"| {code(row.threat, True)} | {code(row.rule, True)} | {row.clean_accuracy:.1%} | "
        f"**{row.certified_accuracy:.1%}** | {low:.1%} to {high:.1%} |"
    )


def _training(config: ModelConfig) -> str:
    known: dict[str, Any] = config.provenance
    seconds = known.get("training_seconds")
    facts = {
        "Data": known.get("data"),
        "Images": known.get("training_images"),
        "Hardware": known.get("device"),
        "Threads": known.get("threads"),
        "Processes": known.get("processes"),
        "Seconds": seconds,
        "Versions": _pairs(known.get("versions")),
    }
    lines = [f"- {name}: {code(value)}" for name, value in facts.items() if value not in (None, "")]
    if not lines:
        return "Where and on what this model was trained is not recorded."
    return "\n".join([*lines, "", "The whole recipe is in `config.json`."])


def _pairs(versions: object) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def _classes(names: list[str]) -> str:
    listed = ", ".join(map(code, names[:MOST_CLASS_NAMES]))
    rest = len(names) - MOST_CLASS_NAMES
    return f"{listed} and {rest:,} more, in `config.json`." if rest > 0 else f"{listed}."
