"""`bagcert evaluate`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli import options
from bagcert.cli.attack import alarm
from bagcert.cli.console import check_output, fail, print_json, print_results, progress, say, warn
from bagcert.errors import BagcertError, UsageError
from bagcert.records import ATTACK_FIGURES, spread

if TYPE_CHECKING:
    from bagcert.attacks.evaluate import Bracket
    from bagcert.data.image_set import ImageSet
    from bagcert.defenses.bagcert import BagCert
    from bagcert.evaluation.evaluate import Evaluation


def evaluate(
    model: options.Model,
    data: options.Data,
    split: options.Split = "test",
    patch: options.Patches = None,
    rule: options.Rules = None,
    placements: options.Placements = None,
    masks_per_axis: options.MasksPerAxis = None,
    fit: options.Fit = "squash",
    limit: options.Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 250,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    backend: options.Backend = "torch",
    portable: options.Portable = False,
    repeat: Annotated[
        int, typer.Option(min=1, help="Number of passes over the data; the reported seconds are medians.")
    ] = 1,
    json: options.Json = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write the results as JSON to this file, as a table to FILE.csv, and one line per image to "
            "FILE.records.jsonl.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume an interrupted run with the same --out after its last complete batch."),
    ] = False,
    attack: Annotated[
        bool,
        typer.Option(
            "--attack",
            help="Also attack every image with the default settings of bagcert attack and report the accuracy under "
            "attack. Takes about a second per image and row.",
        ),
    ] = False,
    resize: options.Resize = False,
    largest: Annotated[
        bool,
        typer.Option(
            "--largest",
            help="Also find the largest square patch for each image that a double-masking defense built for this "
            "patch certifies, and print the distribution of the sizes.",
        ),
    ] = False,
    fail_under_certified: options.FailUnder = None,
) -> None:
    """Measure the clean and certified accuracy of a model on a data set, for all rules and patches in one pass.

    With --attack, also measures the accuracy under attack. The true robust accuracy lies between the certified
    accuracy and the accuracy under attack.
    """
    started = time.perf_counter()
    from bagcert.data.preprocess import Preprocessing
    from bagcert.defenses.bagcert import load
    from bagcert.evaluation.evaluate import evaluate as run
    from bagcert.evaluation.evaluate import log_path, write_evaluation
    from bagcert.evaluation.selection import select_images

    if out is not None:
        check_output(out)
    elif resume:
        raise UsageError("--resume needs the --out FILE.json of the run to resume")
    log = None if out is None else log_path(out)
    with progress("loading"):
        loaded = load(model, device, dtype=dtype, portable=portable, backend=backend, masks_per_axis=masks_per_axis)
    images = select_images(loaded.config, data, split, limit, Preprocessing(loaded.image_size, fit) if resize else None)
    model_seconds = time.perf_counter() - started
    try:
        with progress("evaluating") as report:
            evaluation = run(
                loaded,
                images,
                patches=patch or (),
                rules=rule or (),
                split=split,
                limit=limit,
                batch_size=batch_size,
                placements=placements,
                fit=fit,
                repeat=repeat,
                model_seconds=model_seconds,
                on_progress=report,
                log=log,
                resume=resume,
                gallery=out is not None,
                largest=largest,
            )
    except KeyboardInterrupt:
        if log is None or not log.exists():
            raise
        raise BagcertError(f"interrupted; add --resume to continue from {log}") from None
    if out is not None:  # also before the attack, which takes long and may be interrupted
        write_evaluation(evaluation, out)
    found = None
    if attack:
        evaluation, found = _attacked(evaluation, loaded, images, patch or (), rule or (), placements)
        if out is not None:
            write_evaluation(evaluation, out)
    if json:
        print_json(evaluation.info.to_dict())
    else:
        print_results(evaluation.info)
        if largest:
            say(spread(evaluation.records, evaluation.info.pixels))
    for error in evaluation.errors:
        warn(error)
    if found is not None:
        alarm(found)
    if evaluation.errors:
        fail(f"{len(evaluation.errors)} images could not be read and are not part of the results", 5)
    if fail_under_certified is not None:
        for row in evaluation.info.results:
            if row.certified_accuracy < fail_under_certified:
                fail(
                    f"certified accuracy {row.certified_accuracy:.4f} for patch {row.threat} and rule {row.rule} is "
                    f"below the threshold of {fail_under_certified}",
                    3,
                )


def _attacked(
    evaluation: "Evaluation",
    model: "BagCert",
    images: "ImageSet",
    patches: Sequence[str],
    rules: Sequence[str],
    placements: str | None,
) -> "tuple[Evaluation, Bracket]":
    """Attacks the images that could be read and adds the results to the rows of the evaluation."""
    from bagcert.attacks.evaluate import attack_choices, attack_dataset, upright_batches
    from bagcert.attacks.settings import Settings
    from bagcert.evaluation.evaluate import labels_for

    settings, batch_size, info = Settings(), 64, evaluation.info
    numbers, total = [record.index for record in evaluation.records], info.images * len(info.results)
    clock = time.perf_counter()
    with progress("attacking") as report:
        found = attack_dataset(
            model,
            upright_batches(images, labels_for(model, images), model.image_size, batch_size, numbers),
            patches or (str(model.patch),),
            rules or (model.rule,),
            settings=settings,
            allowed=placements,
            about={"model": info.model, "weights_sha256": info.weights_sha256, "data": info.data, "split": info.split},
            on_progress=lambda done, broken: report(int(done), total, f"{broken} broken"),
        )
    elapsed = time.perf_counter() - clock
    info = replace(info, seconds={**info.seconds, "total": round(info.seconds["total"] + elapsed, 3)})
    rows = [
        replace(row, **{name: getattr(figures, name) for name in ATTACK_FIGURES})
        for row, figures in zip(info.results, found.rows, strict=True)
    ]
    about = {**attack_choices((), settings, batch_size), "seed": settings.seed}
    return replace(evaluation, info=replace(info, results=rows, attack=about)), found
