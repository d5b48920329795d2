import os

import numpy as np
import pytest
from PIL import Image

from bagcert.errors import UnreadableError, UsageError
from bagcert.threat import PatchThreatModel
from tests import oracle, refused


@pytest.mark.parametrize(
    ("text", "shapes", "patches"),
    [
        ("5", ((5, 5),), 1),
        (5, ((5, 5),), 1),
        ((2, 8), ((2, 8),), 1),
        ("2x8", ((2, 8),), 1),
        (" 2 X 8 ", ((2, 8),), 1),
        ("5+2x8", ((2, 8), (5, 5)), 1),
        ("5+2x2", ((5, 5),), 1),  # inside the larger one
        ("5+2x5", ((5, 5),), 1),  # likewise, though as wide
        ("2*5", ((5, 5),), 2),
        ("3*5+2x8", ((2, 8), (5, 5)), 3),
        ("2.4%", ((5, 5),), 1),
        ("0.39%", ((2, 2),), 1),
        ("area:6", ((1, 6), (2, 3), (3, 2), (6, 1)), 1),
        ("area:12", ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)), 1),
    ],
)
def test_notation(text, shapes, patches):
    threat = PatchThreatModel.parse(text, (32, 32))
    expected = PatchThreatModel((32, 32), shapes, patches)
    assert threat == expected
    assert hash(threat) == hash(expected)
    assert threat.shapes == shapes


@pytest.mark.parametrize(
    ("text", "size", "shapes"),
    [
        ("1%", (224, 224), ((23, 23),)),
        ("2%", (224, 224), ((32, 32),)),
        ("3%", (224, 224), ((39, 39),)),
        ("4%", (100, 100), ((20, 20),)),
        ("1%", (100, 100), ((10, 10),)),
        ("25%", (100, 100), ((50, 50),)),
        ("9%", (100, 100), ((30, 30),)),
        ("1.000000001%", (100, 100), ((11, 11),)),
        ("0.99999999999999999999%", (100, 100), ((10, 10),)),
        ("area:12", (3, 5), ((2, 5), (3, 4))),
    ],
)
def test_notation_relative_to_the_image(text, size, shapes):
    assert PatchThreatModel.parse(text, size) == PatchThreatModel(size, shapes)
    assert PatchThreatModel.parse(text, size).shapes == shapes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "at least 1x1"),
        ("33", "33x33 px does not fit into an image of 32x32"),
        ("2x33", "2x33 px does not fit"),
        ("33x2", "33x2 px does not fit"),
        ("0x3", "at least 1x1"),
        ("3x0", "at least 1x1"),
        ("0*5", "number of patches"),
        ("five", "'five'"),
        ("-3", "'-3'"),
        ("2x", "is written"),
        ("area:0", "no rectangle"),
        ("", "is written"),
        ((1, 2, 3), "pair"),
        ("9" * 400 + "%", "at most 20 digits"),
        ("0." + "3" * 400 + "%", "at most 20 digits"),
        ("9" * 5000, "at most 20 digits"),
        ("2x" + "9" * 5000, "at most 20 digits"),
        ("area:" + "9" * 5000, "at most 20 digits"),
        ("9" * 5000 + "*1", "at most 20 digits"),
        (10**5000, "at most 20 digits"),
        ((1, 10**5000), "at most 20 digits"),
        ("9" * 20, "does not fit into an image of 32x32"),
        ("9" * 20 + "%", "does not fit into an image of 32x32"),
        ("1000000000000*1", "from 1 to 64, got 1000000000000"),
        ("65*1", "from 1 to 64, got 65"),
        ("+".join(["1"] * 257), "at most 256 shapes, got 257"),
        ("x" * 5000, "a patch is written"),
        ("0%", "at least 1x1"),
        ("0.%", "a patch is written"),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) else type(value).__name__,
)
def test_notation_refused(text, message):
    said = refused(UsageError, message, PatchThreatModel.parse, text, (32, 32))
    assert len(said) < 250


def test_the_largest_numbers_that_make_sense():
    assert PatchThreatModel.parse("64*1", (32, 32)).patches == 64
    assert PatchThreatModel.parse("area:" + "9" * 20, (32, 32)).shapes == ((32, 32),)
    assert PatchThreatModel.parse("+".join(["1"] * 256), (32, 32)).shapes == ((1, 1),)


def test_a_threat_model_passes_through():
    threat = PatchThreatModel((32, 32), ((5, 5),))
    assert PatchThreatModel.parse(threat, (32, 32)) is threat
    refused(UsageError, r"32x32 px.*the image has 32x40", PatchThreatModel.parse, threat, (32, 40))


def test_the_last_row_and_column_are_placements():
    threat = PatchThreatModel.parse("2x3", (5, 7))
    assert threat.tops((2, 3)).tolist() == [0, 1, 2, 3]
    assert threat.lefts((2, 3)).tolist() == [0, 1, 2, 3, 4]
    assert threat.placements((2, 3)).shape == (4, 5)
    assert threat.placements((2, 3)).all()
    assert threat.patch == (2, 3)


def test_allowed_placements_by_counting():
    allowed = np.random.default_rng(0).random((9, 8)) < 0.8
    threat = PatchThreatModel((9, 8), ((2, 3), (1, 1)), 1, allowed)
    assert threat.shapes == ((2, 3),)
    assert threat.maximal_shapes == ((1, 3), (2, 1), (2, 2), (2, 3))  # smaller ones fit where the largest does not
    for top in range(8):
        for left in range(6):
            assert threat.placements((2, 3))[top, left] == allowed[top : top + 2, left : left + 3].all()
    assert (threat.placements((1, 1)) == allowed).all()
    assert threat.patch is None
    assert "allowed" in str(threat)
    assert threat != PatchThreatModel((9, 8), ((2, 3), (1, 1)))


@pytest.mark.parametrize("text", ["2x3", "1x1", "3+1x5", "area:6", "9x8"])
def test_maximal_rectangles_are_those_of_the_definition(text):
    random = np.random.default_rng(len(text))
    for density in (0.3, 0.6, 0.9, 1.0):
        allowed = random.random((9, 8)) < density
        threat = PatchThreatModel.parse(text, (9, 8), allowed)
        shapes = [(h, 6 // h) for h in range(1, 7)] if text == "area:6" else threat.shapes
        expected = oracle.maximal(oracle.promised((9, 8), shapes, allowed))
        found = [(shape, *corner) for shape in threat.maximal_shapes for corner in threat.corners(shape).tolist()]
        assert found == expected
        for (h, w), top, left in oracle.promised((9, 8), shapes, allowed)[::7]:
            assert threat.allows(top, left, h, w)


def test_no_rectangle_but_the_promised_ones_is_allowed():
    allowed = np.zeros((6, 7), dtype=bool)
    allowed[1:5, 2:6] = True
    threat = PatchThreatModel((6, 7), ((2, 3),), 1, allowed)
    assert threat.allows(1, 2, 2, 3)
    assert threat.allows(4, 5, 1, 1)
    for other in ((0, 2, 2, 3), (1, 4, 2, 3), (1, 2, 3, 2), (1, 2, 0, 3), (-5, 2, 2, 3), (1, 2, 2, 4), (4, 2, 2, 3)):
        assert not threat.allows(*other)
    assert not PatchThreatModel((6, 7), ((2, 3),)).allows(5, 0, 2, 3)


def test_mask_is_copied():
    allowed = np.zeros((6, 7), dtype=bool)
    allowed[1:3, 2:5] = True
    threat, meant = PatchThreatModel((6, 7), ((2, 2),), 1, allowed), allowed.copy()
    allowed[:] = True
    assert (threat.allowed == meant).all()
    assert threat.corners((2, 2)).tolist() == [[1, 2], [1, 3]]
    assert threat != PatchThreatModel((6, 7), ((2, 2),), 1, allowed)
    with pytest.raises(ValueError, match="read-only"):
        threat.allowed[:] = True


def test_large_masks_are_gone_through_in_parts(monkeypatch):
    allowed = np.random.default_rng(4).random((40, 30)) < 0.8
    whole = PatchThreatModel.parse("area:12", (40, 30), allowed)
    expected = {shape: whole.corners(shape).tolist() for shape in whole.maximal_shapes}
    monkeypatch.setattr("bagcert.threat.MOST_PIXELS", 90)
    parts = PatchThreatModel.parse("area:12", (40, 30), allowed)
    assert {shape: parts.corners(shape).tolist() for shape in parts.maximal_shapes} == expected


def test_a_mask_image(tmp_path):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    threat = PatchThreatModel.parse("2", (8, 8), tmp_path / "mask.png")
    assert threat.placements((2, 2)).sum() == 3 * 7
    assert threat.placements((2, 2))[:3].all()  # the white part
    assert PatchThreatModel.parse("5", (8, 8), tmp_path / "mask.png").maximal_shapes == ((4, 5),)
    Image.fromarray(0 * mask).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match="no patch of 5 fits into the mask of allowed placements"):
        PatchThreatModel.parse("5", (8, 8), tmp_path / "black.png")
    with pytest.raises(UsageError, match="9x9 px like the image, got 8x8"):
        PatchThreatModel.parse("2", (9, 9), str(tmp_path / "mask.png"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_of_16_bits_is_white_from_one_half_on(suffix, tmp_path):
    mask = np.array([[0, 255, 256, 2**15 - 1], [2**15, 2**15 + 1, 2**16 - 1, 300]], dtype=np.uint16)
    Image.fromarray(mask).save(tmp_path / f"mask.{suffix}")
    threat = PatchThreatModel.parse("1", (2, 4), tmp_path / f"mask.{suffix}")
    assert threat.allowed.tolist() == [[False] * 4, [True, True, True, False]]


def test_mask_of_unknown_range_refused(tmp_path):
    for values, message in (
        (np.full((2, 2), 0.7, dtype=np.float32), "floating-point"),
        (np.full((2, 2), 2**16, dtype=np.int32), "more than 16 bits"),
        (np.full((2, 2), -1, dtype=np.int32), "more than 16 bits"),
    ):
        Image.fromarray(values).save(tmp_path / "mask.tif")
        refused(UnreadableError, message, PatchThreatModel.parse, "1", (2, 2), tmp_path / "mask.tif")


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_a_mask_is_in_stored_pixels_or_refused(orientation, tmp_path):
    """Pillow turns a TIFF upright when it loads it, and nothing else."""
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[0, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "jpg", "webp"):
        Image.fromarray(mask).save(tmp_path / f"mask.{suffix}", exif=exif, quality=100)
        assert (PatchThreatModel.parse("1", (4, 4), tmp_path / f"mask.{suffix}").allowed == (mask > 0)).all()
    Image.fromarray(mask).save(tmp_path / "mask.tif", tiffinfo={0x0112: orientation})
    refused(UnreadableError, "TIFF with an orientation tag", PatchThreatModel.parse, "1", (4, 4), tmp_path / "mask.tif")
    Image.fromarray(mask).save(tmp_path / "mask.tif", tiffinfo={0x0112: 1})
    assert (PatchThreatModel.parse("1", (4, 4), tmp_path / "mask.tif").allowed == (mask > 0)).all()


def test_equality_means_the_same_attacks():
    """Geometry is cached per threat: two that are equal by mistake would share their windows."""
    left, right = np.zeros((2, 6, 6), dtype=bool)
    left[:, :3] = right[:, 3:] = True
    threats = [
        PatchThreatModel((6, 6), ((2, 2),)),
        PatchThreatModel((6, 6), ((2, 2),), 2),
        PatchThreatModel((6, 7), ((2, 2),)),
        PatchThreatModel((6, 6), ((2, 3),)),
        PatchThreatModel((6, 6), ((2, 2),), 1, left),
        PatchThreatModel((6, 6), ((2, 2),), 1, right),
    ]
    assert all((a == b) == (a is b) for a in threats for b in threats)
    assert PatchThreatModel((6, 6), ((2, 2),), 1, left) == PatchThreatModel((6, 6), ((2, 2),), 1, left.copy())


def test_unreadable_masks(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "mask.png")
    monkeypatch.setattr("bagcert.threat.MAX_MASK_PIXELS", 63)
    for name, message in (
        ("missing.png", r"the mask image .* does not exist"),
        ("text.png", "cannot be read"),
        ("pipe.png", "it is not a regular file"),
        ("mask.png", "more than 63 pixels"),
    ):
        refused(UnreadableError, message, PatchThreatModel.parse, "2", (8, 8), tmp_path / name)
