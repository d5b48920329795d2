"""Options that several commands share, with their help texts."""

from typing import Annotated

import typer

MODEL_HELP = "A shipped model, a model folder, or a hub id (owner/name)."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
DATA_HELP = (
    "digits, cifar10 (downloaded from the hub), or a path or URL of class folders, Parquet files, tar shards or the "
    "original CIFAR-10 pickles."
)
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Split = Annotated[
    str,
    typer.Option(help="Dataset split. held-out: the validation split that was held out when this model was trained."),
]
LIMIT_HELP = (
    "Use at most N images: a stratified sample (seed 0) of class folders, the first N of other data. Default: all."
)
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help=LIMIT_HELP)]
OnePatch = Annotated[
    str | None,
    typer.Option(
        "--patch",
        metavar="PATCH",
        help="Size of the attacker's patch in pixels, as for evaluate. Default: the model's patch.",
    ),
]
ExportedRule = Annotated[
    str | None, typer.Option("--rule", metavar="RULE", help="Rule: vote or double-masking. Default: the model's rule.")
]
Patches = Annotated[
    list[str] | None,
    typer.Option(
        "--patch",
        metavar="PATCH",
        help="Size of the attacker's patch in pixels: 5 (5x5), 2x8 (height x width), 2% (of the image area), 5+2x8 "
        "(either shape), area:25 (any rectangle of at most 25 px), 2*5 (two 5x5 patches). Repeat for several patches. "
        "Default: the model's patch.",
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="RULE",
        help="Rule: vote, levine-feizi, double-masking, robust-masking or detection. Repeat for several rules. "
        "Default: the model's rule.",
    ),
]
MasksPerAxis = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Merge neighboring masks so that at most K remain per axis: faster, but certifies fewer images. Default: "
        "as deployed, mostly all windows of the patch.",
    ),
]
Placements = Annotated[
    str | None,
    typer.Option(
        metavar="MASK.png", help="Mask image: patches may only cover its white pixels. Default: patches anywhere."
    ),
]
Fit = Annotated[
    str, typer.Option(help="Resizing mode for images of other sizes: squash (ignore the aspect ratio) or center-crop.")
]
Resize = Annotated[
    bool,
    typer.Option(
        "--resize",
        help="First apply the EXIF orientation and resize every image to the network's input size. Patch sizes then "
        "refer to the resized image. Attacks need this option for images of other sizes.",
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str, typer.Option(help="Data type of the network's arithmetic: float32 or bfloat16. The rules are exact in both.")
]
Backend = Annotated[
    str, typer.Option(help="Runtime of the forward pass: torch, onnxruntime, or auto (the faster one on this machine).")
]
Portable = Annotated[
    bool,
    typer.Option(
        "--portable",
        help="Also guard against rounding differences between batch sizes and thread counts, so that certificates "
        "hold for deployments that use others.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
FailUnder = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Exit with code 3 if the certified accuracy of any row is below this fraction (0 to 1)."
    ),
]
