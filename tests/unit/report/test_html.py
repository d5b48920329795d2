"""The page: one file, nothing from outside, everything in it, and text from files escaped."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bagcert.data.photo import Photo
from bagcert.errors import UsageError
from bagcert.evaluation.gallery import make_gallery, photo_picture
from bagcert.evaluation.gallery_file import gallery_bytes
from bagcert.records import ImageRecord, Record
from bagcert.report.explain import MOST_SIDE, sentence, write_explanation
from bagcert.report.html import render
from bagcert.report.plots import write_plots
from bagcert.report.summary import read_inputs
from tests import refused, tiny
from tests.unit.report import made

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The tags of a page in order; fails where they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.5, "clean_accuracy": 0.5, "seconds": 3}\n')
    return render(read_inputs([made.write(tmp_path), tmp_path]))


def test_a_mask_of_placements_is_named_with_its_hash(tmp_path: Path) -> None:
    assert "Placements" not in render(read_inputs([made.write(tmp_path)]))
    found = {"file": "<bonnet>.png", "sha256": "0123456789abcdef" * 4}
    text = render(read_inputs([made.write(tmp_path, placements=found)]))
    assert "Placements" in text
    assert "the white part of &lt;bonnet&gt;.png, SHA-256 0123456789abcdef" in text


def test_nothing_comes_from_outside(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?:|@import|url\(|//", re.sub(r"base64,[^\"]*", "", page))


def test_it_says_what_was_asked_and_found(page: str) -> None:
    for words in ("50.0%", "15.0 to 85.0 %", "colors", "tiny", "abab", "float32", "python 3.11", "total 1.5"):
        assert words in page
    for title in ("against patch size", "Margins", "Accuracy per class", "Confusion", "Pictures", "Training of"):
        assert title in page
    for kind in ("Right and certified", "Right, not certified", "Wrong"):
        assert f"<h4>{kind}</h4>" in page
    assert "3 short of a certificate" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    tags = Page(page).tags
    assert len([1 for tag, _ in tags if tag == "image"]) == 3
    worst = [attributes for _, attributes in tags if attributes.get("class") == "worst"]
    assert [worst[0][name] for name in ("x", "y", "width", "height")] == ["1", "0", "2", "2"]
    (largest, *_) = [attributes for _, attributes in tags if attributes.get("class") == "largest"]
    assert [largest[name] for name in ("x", "y", "width", "height")] == ["0", "2", "2", "2"]


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    evil = made.EVIL
    path = made.write(tmp_path, names=(evil, "b"), model=evil, data=evil, device=evil, versions={evil: evil})
    text = render(read_inputs([path]), title=evil)
    assert evil not in text
    assert text.count("&lt;script&gt;") >= 8
    assert "script" not in {tag for tag, _ in Page(text).tags}


def test_the_gallery_of_an_evaluation_shows_its_images() -> None:
    model, images = tiny.color_model(), tiny.image_set(12)
    certificate = model.certify(images.array())
    records = [ImageRecord(i, int(images.labels[i]), [row]) for i, row in enumerate(Record.each(certificate))]
    gallery = make_gallery(model, images, records)
    assert [picture.index for picture in gallery.pictures] == list(range(12))
    scores = model.score_map(images.array())
    for i, picture in enumerate(gallery.pictures):
        order = np.argsort(-scores.class_sums[i].numpy(), kind="stable")
        assert [picture.prediction, picture.runner_up] == order[:2].tolist()
        assert (picture.votes == scores.scores[i, order[:2].tolist()].numpy()).all()
        assert (picture.pixels == images.array()[i]).all()
        assert (picture.largest_certified_px >= 2) == bool(certificate.certified[i])
        assert picture.row_edges == list(range(9))
    assert gallery_bytes(gallery) == gallery_bytes(make_gallery(model, images, records))


def test_an_explanation_is_a_picture_with_the_margin_in_words(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, photo = tiny.color_model(), Photo(tiny.pixels(np.array([0]), (20, 30))[0], 6, "a$b$.png")
    (verdict,) = Record.each(model.certify_scores(certificate_map(model, photo)))
    picture = photo_picture(model, photo, verdict, most=MOST_SIDE)
    write_explanation(picture, model.class_names, verdict, photo.source, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert f"{abs(verdict.margin):,} score units" in sentence(verdict)


def certificate_map(model: object, photo: Photo) -> object:
    from bagcert.data.preprocess import Preprocessing

    preprocessing = Preprocessing(model.image_size)  # type: ignore[attr-defined]
    scores = model.score_map(preprocessing.apply(photo)[None])  # type: ignore[attr-defined]
    return preprocessing.geometry(photo.stored_size, photo.orientation).score_map(scores)


def test_plots_are_written_as_png_and_pdf(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_plots(read_inputs([made.write(tmp_path)]), tmp_path / "plots")
    names = [f"{name}.{kind}" for name in ("certified-patch", "margins-1") for kind in ("png", "pdf")]
    assert [path.name for path in written] == names
    assert [path.read_bytes()[:4] for path in written] == [b"\x89PNG", b"%PDF"] * 2


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(UsageError, r"bagcert\[report\]", write_plots, read_inputs([made.write(tmp_path)]), tmp_path / "plots")
