"""Options that several commands share, with the one help text of each."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A shipped model, a model folder, or a hub id (owner/name).")]
DATA_HELP = (
    "digits, cifar10 (from the hub), or a path or URL: class folders, Parquet files, tar shards, CIFAR-10's pickles."
)
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Split = Annotated[
    str,
    typer.Option(help="Which part of the data; held-out: what was held out of the part that the model was trained on."),
]
LIMIT_HELP = (
    "At most N images: of class folders a sample in proportion to the classes, drawn with seed 0; of other data the "
    "first N."
)
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help=LIMIT_HELP)]
OnePatch = Annotated[
    str | None,
    typer.Option(
        "--patch", metavar="PATCH", help="The attacker's patch, in pixels, as for evaluate. Default: the model's own."
    ),
]
ExportedRule = Annotated[
    str | None, typer.Option("--rule", metavar="RULE", help="vote or double-masking. Default: the model's own.")
]
Patches = Annotated[
    list[str] | None,
    typer.Option(
        "--patch",
        metavar="PATCH",
        help="The attacker's patch, in pixels: 5, 2x8 (height x width), 2%, 5+2x8 (either), area:25 (any rectangle of "
        "at most 25 px), 2*5 (two patches). Repeat for several rows. Default: the model's own.",
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="RULE",
        help="vote, levine-feizi, double-masking, robust-masking or detection. Repeat for several rows. Default: the "
        "model's own.",
    ),
]
Placements = Annotated[
    str | None,
    typer.Option(metavar="MASK.png", help="An image whose white part is where patches may lie. Default: anywhere."),
]
Fit = Annotated[str, typer.Option(help="How images of another size reach the network: squash or center-crop.")]
Resize = Annotated[
    bool,
    typer.Option(
        "--resize",
        help="Bring every image upright and to the network's size first; patches are then in pixels of that size. "
        "Attacks need it where images are of other sizes.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16 arithmetic in the network; rules are exact in both.")]
Backend = Annotated[
    str,
    typer.Option(help="What computes the forward pass: torch, onnxruntime, or auto, the faster here."),
]
Portable = Annotated[
    bool,
    typer.Option(
        "--portable",
        help="Certificates hold as well where attacked images come in other batch sizes or with other thread counts.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
FailUnder = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Exit with 3 if the certified accuracy of any row is below this fraction."),
]
