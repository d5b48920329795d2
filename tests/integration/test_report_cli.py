"""`bagcert evaluate --out` to `bagcert report`, and `bagcert certify --explain`, on the digits."""

from pathlib import Path

import pytest
from PIL import Image

from tests.command import check_mistake, run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "digits.json"
    done = run("evaluate", "digits", "--data", "digits", "--limit", "60", "--patch", "1", "--out", path)
    assert done.code == 0, done
    return path


def test_results_become_a_page(results: Path, tmp_path: Path) -> None:
    assert results.with_suffix(".gallery.npz").exists()
    done = run("report", results, "-o", tmp_path / "r.html", "--title", "a <b> title")
    assert (done.code, done.err) == (0, "")
    assert str(tmp_path / "r.html") in done.out
    text = (tmp_path / "r.html").read_text()
    assert "a &lt;b&gt; title" in text
    assert text.count("data:image/png;base64,") == 32
    assert "60 images" in text


def test_what_report_refuses(results: Path, tmp_path: Path) -> None:
    check_mistake(run("report", tmp_path / "missing.json", "-o", tmp_path / "r.html"), 5, "missing.json")
    check_mistake(run("report", results, "-o", tmp_path / "r.txt"), 2, "must be a .html file")
    check_mistake(run("report", tmp_path, "-o", tmp_path / "r.html"), 2, "no run or model folder")
    assert not list(tmp_path.iterdir())


def test_certify_explains_one_photo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    photo, out = tmp_path / "a.png", tmp_path / "out.png"
    Image.new("RGB", (12, 10), (200, 30, 30)).save(photo)
    done = run("certify", photo, "--model", "digits", "--patch", "1", "--explain", out)
    assert done.code == 0, done
    with Image.open(out) as drawn:
        assert min(drawn.size) > 400
    check_mistake(run("certify", photo, photo, "--explain", out), 2, "--explain draws exactly one photo")
