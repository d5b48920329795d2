"""What a certificate says of an image file it says of the pixels stored there, in every format and orientation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bagcert
from bagcert.bulk.files import certify_files
from bagcert.data import from_torch, load_dataset
from tests.properties.photo_files import FORMATS, as_stored, count
from tests.unit.data.test_parquet import _write as write_parquet
from tests.unit.data.test_webdataset import write as write_tar

GAVE_WAY = ("broken_certificates", "misreported")


def test_no_file_breaks_its_certificate() -> None:
    found = count(2 * len(FORMATS), seed=1, attacks=10)
    assert {name: found[name] for name in GAVE_WAY} == dict.fromkeys(GAVE_WAY, 0)
    assert found["refused"] <= 2
    assert found["certified"] >= 5
    assert found["attacks"] > 40


def test_a_turned_tiff_is_certified_as_it_is_stored(tmp_path: Path) -> None:
    """Patches in the upper half of the stored pixels of a half-turned file, all black or white."""
    model, random = bagcert.load("digits"), np.random.default_rng(0)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")

    def ask(pictures: list[np.ndarray]) -> list:
        paths = [tmp_path / f"{number}.tif" for number in range(len(pictures))]
        for path, stored in zip(paths, pictures, strict=True):
            Image.fromarray(stored).save(path, tiffinfo={0x0112: 3})
        return list(certify_files(model, paths, ["3"], ["double-masking"], placements=tmp_path / "mask.png"))

    stored = [as_stored(digit, 3) for digit in load_dataset("digits", "test", limit=4).array()]
    certified = 0
    for picture, said in zip(stored, ask(stored), strict=True):
        assert said.exif_orientation == 3
        if said.results[0].certified:
            certified += 1
            attacked = [picture.copy() for _ in range(15)]
            for copy in attacked:
                i, j = random.integers(0, (2, 6))
                copy[i : i + 3, j : j + 3] = random.choice([0, 255], (3, 3, 1))
            assert {found.prediction for found in ask(attacked)} == {said.prediction}
    assert certified >= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_reader_keeps_the_stored_pixels_of_a_turned_tiff(orientation: int, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    encoded = FORMATS["tiff"].save(stored, orientation)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "x.tif").write_bytes(encoded)
    write_tar(tmp_path / "x.tar", [("0.tif", encoded), ("0.cls", b"0")])
    write_parquet(tmp_path / "x.parquet", [stored], [0], encode=lambda _: encoded)
    for source in ("folder", "x.tar", "x.parquet"):
        (photo,) = load_dataset(tmp_path / source).read([0])
        assert photo.orientation == orientation
        np.testing.assert_array_equal(photo.pixels, stored)


@pytest.mark.parametrize("name", ["tiff", "png"])
def test_an_image_of_a_torch_dataset_has_the_pixels_that_it_shows(name: str, tmp_path: Path) -> None:
    """Such a dataset yields images, not files: what numpy sees of one is what a patch lies on."""
    stored = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    (tmp_path / "x").write_bytes(FORMATS[name].save(stored, 6))
    item = Image.open(tmp_path / "x")
    (photo,) = from_torch([(item, 0)]).read([0])
    np.testing.assert_array_equal(photo.pixels, np.asarray(item))
    assert photo.orientation == 1
