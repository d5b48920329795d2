"""The page in a browser: what it says is what the package says of the same pixels."""

import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from bagcert.data import load_dataset
from bagcert.data.photo import read_image
from bagcert.defenses.bagcert import load
from bagcert.playground.server import PageServer
from bagcert.playground.site import build_site
from tests import tiny
from tests.browser import CHROMIUM, Browser, until

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; try apt-get install chromium")

READY = (
    "document.readyState === 'complete' && document.getElementById('main').getAttribute('aria-busy') === 'false' && "
    "document.querySelector('#attacked .verdict dd') !== null"
)


@pytest.fixture(scope="module")
def model():
    return load("digits", device="cpu", checked=False)


@pytest.fixture(scope="module")
def url(model):
    with PageServer(build_site(model)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def page(browser, url):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(url, (1200, 900))
    browser.wait(READY)
    yield browser
    assert not browser.errors
    assert browser.requests
    assert all(asked.startswith((url, f"blob:{url}")) for asked in browser.requests)


def settled(page):
    # The run begins in the task of the event itself, so idle now is idle after it.
    page.wait(READY)


def verdict(page, panel):
    answer, certificate, margin, _ = page.value(
        f"[...document.querySelectorAll('#{panel} .verdict dd')].map((each) => each.textContent)"
    )
    return answer, certificate == "yes", int(margin.replace(",", ""))


def said(page):
    return page.value("document.getElementById('sentence').textContent")


def patch_of(page):
    return tuple(
        int(page.value(f"document.getElementById('{name}').value")) for name in ("top", "left", "height", "width")
    )


def download(page):
    """The attacked pixels, as the page gives them out."""
    for old in page.downloads.glob("*"):
        old.unlink()
    page.click("#download")
    return page.downloaded("attacked.png")


def certified(model, pixels):
    certificate = model.certify(pixels[None])
    return (
        model.class_names[int(certificate.prediction[0])],
        bool(certificate.certified[0]),
        int(certificate.margin[0]),
    )


def picture(tmp_path, index, size=None):
    """A digit as a PNG file."""
    pixels = load_dataset("digits", "test").array()[index]
    image = Image.fromarray(pixels)
    file = tmp_path / f"digit{index}.png"
    (image if size is None else image.resize(size, Image.Resampling.NEAREST)).save(file)
    return file, pixels


def put(page, name, value, event):
    """A value into a field, and the event that says so."""
    page.value(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = '{value}'; "
        f"e.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )
    settled(page)


def paint(page, color):
    put(page, "color", color, "input")


def cell(page):
    """One pixel of the picture on the screen, and the patch's middle."""
    left, top, width, height = page.box("#patch")
    _, _, rows, cols = patch_of(page)
    return (width / cols, height / rows), (left + width / 2, top + height / 2)


@in_browser
@pytest.mark.parametrize("how", ["drop", "choose"])
def test_patch_dragged_onto_a_picture(page, model, tmp_path, how):
    file, pixels = picture(tmp_path, 40)
    page.drop("#stage", file) if how == "drop" else page.choose("#file", file)
    page.wait(f"document.getElementById('source').textContent.startsWith('{file.name}')")
    settled(page)
    assert verdict(page, "clean") == certified(model, pixels)
    start = patch_of(page)
    (wide, high), (x, y) = cell(page)
    page.drag((x - wide / 2, y - high / 2), (x - wide / 2 - 2 * wide, y - high / 2 + high))
    settled(page)
    assert patch_of(page) == (start[0] + 1, start[1] - 2, 2, 2)
    paint(page, "#12ab9f")
    expected = pixels.copy()
    expected[start[0] + 1 : start[0] + 3, start[1] - 2 : start[1]] = (0x12, 0xAB, 0x9F)
    shown = read_image(download(page)).pixels
    np.testing.assert_array_equal(shown, expected)
    assert verdict(page, "attacked") == certified(model, shown)


@in_browser
def test_what_is_painted_on_the_patch_moves_with_it(page, model):
    page.click("input[value=paint]")
    page.click("#certified-size")
    settled(page)
    (wide, high), (x, y) = cell(page)
    paint(page, "#12ab9f")
    page.drag((x - wide / 2, y - high / 2), (x - wide / 2, y + high / 2))  # the left two pixels
    settled(page)
    start = patch_of(page)
    assert start[2:] == (2, 2)
    page.value("document.getElementById('patch').focus()")
    page.press("ArrowRight")
    settled(page)
    top, left, _, _ = patch_of(page)
    assert (top, left) == (start[0], start[1] + 1)
    shown = read_image(download(page)).pixels
    assert (shown[top : top + 2, left] == (0x12, 0xAB, 0x9F)).all()
    assert (shown[top : top + 2, left + 1] == 255).all()
    assert verdict(page, "attacked") == certified(model, shown)
    page.click("#clear")
    settled(page)
    assert (read_image(download(page)).pixels[top : top + 2, left : left + 2] == 255).all()


@in_browser
def test_noise_breaks_no_certificate(page, model):
    held, digits = 0, load_dataset("digits", "test")
    for sample in range(8):
        page.click(f"#samples button:nth-child({sample + 1})")
        page.wait(f"document.querySelectorAll('#samples button')[{sample}].getAttribute('aria-pressed') === 'true'")
        page.click("#reroll")
        settled(page)
        is_certified = verdict(page, "clean")[1]
        same = verdict(page, "clean")[0] == verdict(page, "attacked")[0]
        if is_certified:
            held += 1
            assert same
            assert said(page).startswith("The certificate held")
        else:
            assert said(page).startswith("This picture has no certificate")
        (top, left, height, width), shown = patch_of(page), read_image(download(page)).pixels
        assert verdict(page, "attacked") == certified(model, shown)
        outside = np.ones(shown.shape[:2], dtype=bool)
        outside[top : top + height, left : left + width] = False
        first = int(np.flatnonzero(digits.labels == sample)[0])
        np.testing.assert_array_equal(shown[outside], digits.array()[first][outside])
    assert held >= 1


@in_browser
def test_larger_patch_may_change_the_answer(page, model):
    (wide, high), _ = cell(page)
    left, top, width, height = page.box("#grip")
    middle = (left + width / 2, top + height / 2)
    page.drag(middle, (middle[0] + 3 * wide, middle[1] + 3 * high))
    settled(page)
    assert patch_of(page)[2:] == (5, 5)
    paint(page, "#ffffff")
    shown = read_image(download(page)).pixels
    assert (shown[3:8, 3:8] == 255).all()
    attacked, clean = verdict(page, "attacked"), verdict(page, "clean")
    assert attacked == certified(model, shown)
    assert said(page).startswith("This patch of 5 × 5 pixels is larger than certified")
    assert ("still" in said(page)) == (attacked[0] == clean[0])
    page.click("#certified-size")
    settled(page)
    assert patch_of(page)[2:] == (2, 2)


@in_browser
def test_the_keyboard_moves_and_resizes_within_the_picture(page):
    page.value("document.getElementById('patch').focus()")
    top, left, height, width = patch_of(page)
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
        page.press(key)
    assert patch_of(page) == (top - 1, left + 2, height, width)
    page.press("+", "+")
    assert patch_of(page)[2:] == (height + 1, width + 1)
    for _ in range(9):
        page.press("-", "-")
        page.press("ArrowLeft")
    assert patch_of(page) == (top - 1, 0, 1, 1)
    assert "Patch of 1 × 1 pixels" in page.value("document.getElementById('patch').getAttribute('aria-label')")
    settled(page)
    put(page, "left", 99, "change")
    assert patch_of(page) == (top - 1, 7, 1, 1)


@in_browser
def test_pictures_fitted_or_refused(page, model, tmp_path):
    file, _ = picture(tmp_path, 3, (160, 80))
    for fit in ("squash", "center-crop"):
        put(page, "fit", fit, "change")
        page.choose("#file", file)
        page.wait("document.getElementById('source').textContent.includes('80 × 160 pixels, fitted to 8 × 8')")
        settled(page)
        shown = read_image(download(page)).pixels
        assert shown.shape == (8, 8, 3)
        assert verdict(page, "attacked") == certified(model, shown)
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    page.choose("#file", text)
    page.wait("!document.getElementById('problem').hidden")
    assert "notes.png cannot be read as a picture" in page.value("document.getElementById('problem').textContent")
    settled(page)


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_fits_a_narrow_window_by_day_and_by_night(page, url, dark):
    page.open(url, (400, 800), dark)
    page.wait(READY)
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 24, 31)" if dark else "rgb(255, 255, 255)")
    assert page.value("document.getElementById('sentence').getAttribute('aria-live')") == "polite"


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    import urllib.request

    command = [sys.executable, "-m", "bagcert", "page", "digits", "--patch", "3", "--rule", "vote", "--no-browser"]
    with (tmp_path / "out").open("w+") as out:
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **heard)
        try:
            until(lambda: "Ctrl-C" in (tmp_path / "out").read_text() or process.poll() is not None, 120, "no address")
            address = (tmp_path / "out").read_text().split()[0]
            with urllib.request.urlopen(f"{address}model.json", timeout=10) as answer:
                about = json.load(answer)
            assert (about["rule"], about["patch"], about["threat"]["shapes"]) == ("vote", "3", [[3, 3]])
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in (tmp_path / "out").read_text()


@in_browser
def test_a_model_that_pools_regions_has_no_votes(browser):
    model = tiny.attention_model()
    browser.errors.clear()
    with PageServer(build_site(model)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        browser.open(server.url, (1200, 900))
        browser.wait(READY)
        found = browser.value("[...document.querySelectorAll('#attacked .verdict dd')].map((each) => each.textContent)")
        label = browser.value("document.getElementById('show-votes').parentElement.textContent.trim()")
        pixels = np.asarray(Image.open(download(browser)).convert("RGB"))
        server.shutdown()
        thread.join()
    answer, certificate, margin = found  # and no row of votes
    assert (answer, certificate == "yes", int(margin.replace(",", ""))) == certified(model, pixels)
    assert label == "Show the regions that see the patch"
    assert not browser.errors
