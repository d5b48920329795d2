"""Records docs/images/playground.gif: a patch is dragged over a picture on the page of `bagcert page`.

Needs Chromium and the extra `onnx`. Every frame is a screenshot of the page, on which the exported model runs.

PYTHONPATH=. python tools/playground_picture.py --model cifar10 --data data/cifar10
"""

import argparse
import io
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagcert.defenses.bagcert import load
from bagcert.playground.server import PageServer
from bagcert.playground.site import build_site
from tests.browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images" / "playground.gif"
WINDOW = (640, 900)
COLORS, CHANGES, TRANSPARENT = 130, 120, 255
ACCENTS = ((255, 210, 63), (37, 128, 74))  # of the page: the frame of the patch, a certificate
STEP_PX = 3
MILLISECONDS = 200
READY = (
    "document.readyState === 'complete' && document.getElementById('main').getAttribute('aria-busy') === 'false' && "
    "document.querySelector('#attacked .verdict dd') !== null"
)
UNCERTIFIED = "document.querySelector('#clean .verdict .yes') === null"
SHOWN = ("#sentence", ".panels")
# The certificate of the attacked picture speaks of a further patch, which the recording does not show.
HIDDEN = (
    "header, main > section, .controls, #attacked dt:nth-of-type(2), #attacked dd:nth-of-type(2), "
    "#attacked dt:nth-of-type(3), #attacked dd:nth-of-type(3)"
)


def path(size: tuple[int, int], patch: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(top, left) of the patch in each frame: from side to side in four rows."""
    bottom, right = size[0] - patch[0], size[1] - patch[1]
    for row in range(4):
        top = row * bottom // 3
        lefts = [*range(0, right, STEP_PX), right]
        for left in lefts if row % 2 == 0 else reversed(lefts):
            yield top, left


def prepare(page: Browser, sample: int) -> None:
    """Chooses a picture."""
    page.click(f"#samples button:nth-child({sample + 1})")
    page.wait(f"document.querySelectorAll('#samples button')[{sample}].getAttribute('aria-pressed') === 'true'")
    page.wait(READY)
    if page.value(UNCERTIFIED):
        sys.exit(f"picture {sample} has no certificate; choose another with --sample")


def move(page: Browser, top: int, left: int) -> None:
    """Moves the patch and waits for the model."""
    for name, value in (("top", top), ("left", left)):
        page.value(
            f"(() => {{ const e = document.getElementById('{name}'); e.value = '{value}'; "
            "e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
    page.wait(READY)


def frame(page: Browser, folder: Path) -> Image.Image:
    """The sentence and the two panels, as they are now."""
    page.value(f"for (const e of document.querySelectorAll('{HIDDEN}')) e.style.display = 'none'")
    file = folder / "page.png"
    page.screenshot(file)
    boxes = [page.box(selector) for selector in SHOWN]
    left, top = boxes[0][0], boxes[0][1]
    right, bottom = boxes[1][0] + boxes[1][2], boxes[1][1] + boxes[1][3]
    return Image.open(io.BytesIO(file.read_bytes())).convert("RGB").crop((int(left), int(top), int(right), int(bottom)))


def record(model_name: str, data: str, sample: int) -> list[Image.Image]:
    """All frames.

    Raises:
        SystemExit: the picture has no certificate, or a frame breaks it.
    """
    model = load(model_name, device="cpu", checked=False)
    frames = []
    with PageServer(build_site(model, data=data)) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = Browser(Path(folder))
        try:
            page.open(server.url, WINDOW)
            page.wait(READY)
            prepare(page, sample)
            height, width = (
                int(page.value(f"document.getElementById('{name}').value")) for name in ("height", "width")
            )
            for top, left in path(model.image_size, (height, width)):
                move(page, top, left)
                sentence = page.value("document.getElementById('sentence').textContent")
                if not sentence.startswith("The certificate held"):
                    sys.exit(f"the patch at {top}, {left} changed the page to: {sentence}")
                frames.append(frame(page, Path(folder)))
        finally:
            page.close()
            server.shutdown()
    return frames


def palette_of(frames: list[Image.Image]) -> Image.Image:
    """One palette for all frames: the best for the first, and one for the colors that a change brings."""
    pixels = np.stack([np.asarray(each) for each in frames])
    brought = np.unique(pixels[1:][(pixels[1:] != pixels[0]).any(3)], axis=0)
    changes = Image.fromarray(brought[None]).quantize(CHANGES, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    colors = (frames[0].quantize(COLORS).getpalette() or [])[: 3 * COLORS] + changes[: 3 * CHANGES]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors + [channel for color in ACCENTS for channel in color])
    return palette


def save(frames: list[Image.Image], out: Path) -> None:
    """A GIF that stores for each frame only the pixels that differ from the last one."""
    palette = palette_of(frames)
    indices = [np.asarray(each.quantize(palette=palette, dither=Image.Dither.NONE)) for each in frames]
    steps = [indices[0]]
    steps += [np.where(now == before, np.uint8(TRANSPARENT), now) for before, now in pairwise(indices)]
    images = []
    for step in steps:
        image = Image.fromarray(step, "P")
        image.putpalette(palette.getpalette() or [])
        images.append(image)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"save_all": True, "duration": MILLISECONDS, "loop": 0, "optimize": False}
    images[0].save(out, append_images=images[1:], transparency=TRANSPARENT, disposal=1, **settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cifar10", help="must be exportable")
    parser.add_argument("--data", default=str(ROOT / "data" / "cifar10"), help="where pictures come from")
    parser.add_argument("--sample", type=int, default=7, help="which of the page's pictures, from 0")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("there is no Chromium on this machine; install it, for example by `apt-get install chromium`")
    frames = record(arguments.model, arguments.data, arguments.sample)
    save(frames, arguments.out)
    print(f"{arguments.out}: {len(frames)} frames, {arguments.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
