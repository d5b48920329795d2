"""`bagcert attack`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.console import check_output, fail, print_json, print_table, progress, say, say_notes, styled
from bagcert.cli.options import (
    Data,
    Device,
    Dtype,
    Json,
    Limit,
    MasksPerAxis,
    Model,
    Patches,
    Placements,
    Resize,
    Rules,
    Split,
)
from bagcert.errors import UsageError
from bagcert.io.files import require_writable, write_atomically
from bagcert.records import in_unit

if TYPE_CHECKING:
    from bagcert.attacks.evaluate import AttackInfo, Bracket


def attack(
    model: Model,
    data: Data,
    split: Split = "test",
    patch: Patches = None,
    rule: Rules = None,
    placements: Placements = None,
    masks_per_axis: MasksPerAxis = None,
    limit: Limit = None,
    resize: Resize = False,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ATTACK", help="Attack: random, gradient, score-map or transfer. Repeat for several. Default: all."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps of each gradient attack.")] = 40,
    restarts: Annotated[int, typer.Option(min=1, help="Restarts of the gradient attack at each placement.")] = 2,
    attacked_placements: Annotated[
        str,
        typer.Option(
            metavar="K", help="Number of placements to attack per image, the most promising first, or all of them."
        ),
    ] = "8",
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked together.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the JSON here.")] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Write one JSON record per image, with the attack and placement that succeeded."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the successful adversarial images here, as PNG.")
    ] = None,
) -> None:
    """Attack a model with patches: measure the accuracy under attack and test that no certificate breaks.

    The attacks know the defense. If an attack breaks a certified image, the image and its patch are saved and the exit
    code is 4.
    """
    started = time.perf_counter()
    import torch

    from bagcert.attacks import get_attack
    from bagcert.attacks.evaluate import AttackInfo, attack_choices, attack_dataset, upright_batches
    from bagcert.attacks.settings import Settings
    from bagcert.data.preprocess import Preprocessing
    from bagcert.defenses.bagcert import load
    from bagcert.devices import device_name, dtype_name
    from bagcert.evaluation.evaluate import labels_for, versions
    from bagcert.evaluation.selection import select_images
    from bagcert.rules import get_rule

    settings = Settings(steps, restarts, _count(attacked_placements), seed)
    for path, suffix in ((out, ".json"), (records, ".jsonl")):
        if path is not None:
            check_output(path, suffix)
    _check_folder(save)
    for name in attack or ():
        get_attack(name)
    for name in rule or ():
        get_rule(name)
    with progress("loading"):
        loaded = load(model, device, dtype=dtype, masks_per_axis=masks_per_axis)
    images = select_images(loaded.config, data, split, limit, Preprocessing(loaded.image_size) if resize else None)
    labels = labels_for(loaded, images)
    rules = sorted(dict.fromkeys(rule or (loaded.rule,)), key=lambda name: name != loaded.rule)
    patches = list(dict.fromkeys(patch or (str(loaded.patch),)))
    load_seconds = time.perf_counter() - started
    total = len(images) * len(rules) * len(patches)
    about = {"model": loaded.name, "weights_sha256": loaded.weights_sha256, "data": images.name, "split": images.split}
    sources: dict[int, str] = {}
    with progress("attacking") as report:
        found = attack_dataset(
            loaded,
            upright_batches(images, labels, loaded.image_size, batch_size, sources=sources),
            patches,
            rules,
            attacks=attack or (),
            settings=settings,
            allowed=placements,
            save=save,
            about=about,
            on_progress=lambda done, broken: report(int(done), total, f"{broken} broken"),
        )
    info = AttackInfo(
        model=loaded.name,
        weights_sha256=loaded.weights_sha256,
        data=images.name,
        split=images.split,
        images=len(found.records),
        limit=limit,
        device=device_name(loaded.scorer.device),
        dtype=dtype_name(loaded.scorer.autocast_dtype),
        threads=torch.get_num_threads(),
        versions=versions(),
        seconds={"load": round(load_seconds, 3), "total": round(time.perf_counter() - started, 3)},
        seed=seed,
        attack=attack_choices(attack or (), settings, batch_size),
        results=found.rows,
        notes=list(images.notes),
        pixels=f"at {loaded.image_size[0]}x{loaded.image_size[1]}",
    )
    _write(info, [replace(record, source=sources[record.index]) for record in found.records], out, records)
    if json:
        print_json(info.to_dict())
    else:
        _print(info)
    alarm(found)


def alarm(found: "Bracket") -> None:
    """Ends with exit code 4 if a certificate is broken."""
    if found.broken_certificates:
        fail(
            f"{found.broken_certificates} certificates are broken: an attack changed the prediction on images "
            f"certified against it; images, patches and verdicts are in {found.alarm_folder}",
            4,
        )


def _count(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--attacked-placements must be a number of at least 1, or all; got {text!r}")
    return int(text)


def _check_folder(path: Path | None) -> None:
    if path is not None:
        if path.exists() and not path.is_dir():
            raise UsageError(f"--save needs a folder, but {path} is a file")
        require_writable(path / "image.png")


def _write(info: "AttackInfo", images: list, out: Path | None, records: Path | None) -> None:
    import json

    if records is not None:
        write_atomically(records, "".join(image.to_json() + "\n" for image in images).encode())
    if out is not None:
        write_atomically(out, (json.dumps(info.to_dict(), indent=2) + "\n").encode())


def _print(info: "AttackInfo") -> None:
    rows = []
    for row in info.results:
        broken = row.broken_certificates
        rows.append(
            (
                in_unit(row.threat, info.pixels),
                row.rule,
                f"{row.clean_accuracy:.1%}",
                f"{row.attacked_accuracy:.1%}",
                f"{row.certified_accuracy:.1%}",
                f"{row.attempts:,}",
                styled(broken, "red" if broken else ""),
            )
        )
    say(f"{info.model} on {info.data} ({info.split}, {info.images:,} images)")
    say_notes(info.notes)
    print_table(rows, ("patch", "rule"), ("clean", "attacked", "certified", "attempts", "broken certificates"))
    say(
        f"{', '.join(info.attack['attacks'])}; {info.seconds['total']:.1f} s in total "
        f"({info.device}, {info.dtype}, {info.threads} threads)"
    )
