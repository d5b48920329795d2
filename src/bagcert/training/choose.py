"""Selection of the recipe and the run folder for `bagcert train`, from a recipe, a folder of images or a run folder."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bagcert.data.remote import is_address
from bagcert.errors import UsageError, nearest
from bagcert.training.checkpoint import RECIPE
from bagcert.training.recipe import Recipe, load_recipe, shipped_recipes

PHOTOS, PHOTOS_64, LARGE_PX = "photos", "photos64", 48
_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def choose_recipe(
    what: str | None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    size: str | None = None,
    resume: bool = False,
) -> tuple[Recipe, Path]:
    """Returns the recipe and the folder of a run.

    Args:
        what: a shipped recipe, a TOML file, images (a path or URL), or, to resume, a run folder; None to resume the run
            in `out`. Images use the recipe `photos`, or `photos64` if `size` is 48 px or more; the run is named after
            `out`, or else after their folder, or its parent if the folder is called train. A resumed run keeps its
            recipe.
        out: the run folder; by default `runs/NAME`.
        overrides: recipe values, as `section.key=value`.
        size: size of the network's images, as `HxW` or the side of a square.
    """
    pixels = None if size is None else _parsed(size)
    changes = [*overrides] if pixels is None else [f"model.image_size={list(pixels)}", *overrides]
    if what is None:
        if not resume or out is None:
            raise UsageError("training needs a recipe, or a folder of images; --resume needs a run folder")
        what = str(out)
    path = Path(what)
    if what not in shipped_recipes() and (path / RECIPE).is_file():
        if not resume:
            raise UsageError(f"{what} is a run folder; --resume goes on with it")
        if out is not None and out.resolve() != path.resolve():
            raise UsageError(f"a run is resumed in its own folder {what}, not in {out}")
        return load_recipe(str(path / RECIPE), changes), path
    if what == str(out) and resume:
        raise UsageError(f"{what} holds no unfinished run to resume")
    if what in shipped_recipes() or path.suffix == ".toml" or not _is_images(what):
        if what not in shipped_recipes() and path.suffix != ".toml":
            raise UsageError(f"there is no recipe, file or folder {what!r}{nearest(what, shipped_recipes(), 0.5)}")
        recipe = load_recipe(what, changes)
        return recipe, out or Path("runs") / recipe.name
    name = _valid(out.absolute().name) if out else _name_of(path)
    folder = out or Path("runs") / name
    if resume and (folder / RECIPE).is_file():
        recipe = load_recipe(str(folder / RECIPE), changes)
    else:
        recipe = load_recipe(PHOTOS_64 if pixels and min(pixels) >= LARGE_PX else PHOTOS, [f"name={name}", *changes])
    return recipe.changed(data={"name": what}), folder


def _is_images(what: str) -> bool:
    return is_address(what) or os.path.exists(what) or bool(glob.has_magic(what) and glob.glob(what))


def _parsed(size: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(size.strip())
    if found is None:
        raise UsageError(f"a size is a side in px, such as 32, or HEIGHTxWIDTH; got {size!r}")
    return int(found[1]), int(found[2] or found[1])


def _name_of(images: Path) -> str:
    """Returns the name of a run on the images of a folder.

    >>> _name_of(Path("data/my signs/train")), _name_of(Path("photos"))
    ('my-signs', 'photos')
    """
    folder = images.absolute()
    return _valid(folder.parent.name if folder.name == "train" else folder.name)


def _valid(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("*"))[:100].lstrip("._-") or PHOTOS
