"""Damaged and hostile files: a loader takes a file, or says in one sentence why not."""

import io
import json
import tomllib
from struct import error as struct_error

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.targets import TARGETS, attempt

# The same examples in every run, and as many as a few seconds allow; `python -m tests.fuzz.run` searches on.
FEW = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of what decoders say about broken files

INTERESTING = [b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00" * 8, b"\xff" * 8, b"[" * 2000, b"{" * 2000, b"\n"]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with a few bytes changed, put in, repeated or left out."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        length = draw(st.integers(0, 16))
        how = draw(st.sampled_from(["change", "insert", "repeat", "drop", "cut"]))
        if how == "change":
            new = draw(st.binary(min_size=length, max_size=length) | st.sampled_from(INTERESTING))
            changed[at : at + len(new)] = new
        elif how == "insert":
            changed[at:at] = draw(st.binary(max_size=16) | st.sampled_from(INTERESTING))
        elif how == "repeat":
            changed[at:at] = changed[max(0, at - 64) : at] * draw(st.integers(1, 8))
        elif how == "drop":
            del changed[at : at + length]
        else:
            del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_taken(name: str) -> None:
    for seed in TARGETS[name].seeds():
        assert attempt(TARGETS[name], seed)


@pytest.mark.parametrize("name", TARGETS)
@FEW
@given(data=st.data())
def test_damage_is_told_in_one_sentence(name: str, data: st.DataObject) -> None:
    seeds = TARGETS[name].seeds()
    attempt(TARGETS[name], data.draw(damaged(seeds[data.draw(st.integers(0, len(seeds) - 1))])))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "\x1b[2J", "../..", "\ud800", 10**18, -1, 0, 1e308, [], {}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


def _places(value: object, path: tuple = ()) -> list[tuple]:
    """The way to every value inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inside for place in _places(each, (*path, key)))]


def _replaced(value: object, path: tuple, new: object) -> object:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = _replaced(copied[path[0]], path[1:], new)
    return copied


@FEW
@given(data=st.data())
def test_any_value_at_any_place_of_a_config(data: st.DataObject) -> None:
    config = json.loads(TARGETS["config"].seeds()[0])
    place = data.draw(st.sampled_from(_places(config)))
    changed = json.dumps(_replaced(config, place, data.draw(VALUES)))
    attempt(TARGETS["config"], changed.encode())


@pytest.mark.parametrize("name", ["records", "log"])
@FEW
@given(data=st.data())
def test_any_value_at_any_place_of_lines(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(TARGETS[name].seeds()))
    lines = [json.loads(line) for line in seed.splitlines()]  # of some records, a readout comes first
    place = data.draw(st.sampled_from(_places(lines)[1:]))
    changed = _replaced(lines, place, data.draw(VALUES))
    attempt(TARGETS[name], b"".join(json.dumps(line).encode() + b"\n" for line in changed))


ODD = [
    "1", "-1", "0", "1e999", "nan", "[]", "{}", "{a.b.c=1}", "true", "10000000000", "[8,8]", "[0,0]",
    "[1000000000,1000000000]", "1979-05-27",
]  # fmt: skip
TOML = st.sampled_from([*ODD, "9" * 5000, '"x"', '"\\u001b[2J"', "[" * 3000, '"area:99999999"', f'"{"a" * 60_000}"'])


@FEW
@given(data=st.data())
def test_any_value_for_any_key_of_a_recipe(data: st.DataObject) -> None:
    recipe = tomllib.loads(TARGETS["recipe"].seeds()[0].decode())
    sections = [key for key, value in recipe.items() if isinstance(value, dict)]
    section = data.draw(st.sampled_from(sections))
    key = data.draw(st.sampled_from([*recipe[section], "name", "width", "image_size", ".".join("a" * 5000)]))
    text = f'name = "x"\n[{section}]\n{key} = {data.draw(TOML)}\n'
    attempt(TARGETS["recipe"], text.encode())


OTHERS = [None, -1, 10**12, 1e400, float("nan"), "text", [], {}, {"a": 1}, True, torch.zeros(3), torch.zeros(())]
OTHERS += [torch.zeros(1).expand(1 << 40), torch.zeros(2, dtype=torch.int8), torch.full((3,), torch.nan), ["x"] * 3]


@FEW
@given(data=st.data())
def test_any_value_at_any_place_of_a_checkpoint(data: st.DataObject) -> None:
    state = torch.load(io.BytesIO(TARGETS["checkpoint"].seeds()[0]), weights_only=True)
    place = data.draw(st.sampled_from(_places(state)))
    file = io.BytesIO()
    torch.save(_replaced(state, place, data.draw(st.sampled_from(OTHERS))), file)
    attempt(TARGETS["checkpoint"], file.getvalue())


COLUMNS = [
    pa.array([0, 1, 2]),
    pa.array([0, None, 1]),
    pa.array([0, 1 << 62, 1]),
    pa.array([0, 1, (1 << 64) - 1], pa.uint64()),
    pa.array([-1, 0, 1]),
    pa.array([True, False, True]),
    pa.array(["a", "b", "c"]),
    pa.array([b"", b"\x89PNG", None]),
    pa.array([{"bytes": b"x"}, {"bytes": None}, None]),
    pa.array([{"bytes": "text"}] * 3),
    pa.array([{"path": "x"}] * 3),
    pa.array([[b"x"], [], None]),
    pa.array([b"x", b"y", b"x"]).dictionary_encode(),
    pa.array([0, 1, 0], pa.int64()).dictionary_encode(),
    pa.array([None, None, None]),
]
NAMES = [None, [], ["a", "b", "c"], ["a"], "abc", {"a": 1}, [1, 2, 3], ["\x1b", "b", "c"], ["a"] * 200_000]


@FEW
@given(
    image=st.sampled_from(COLUMNS),
    label=st.sampled_from(COLUMNS),
    names=st.sampled_from(["image", "img", "label", "b\nytes", "x" * 5000]),
    classes=st.sampled_from(NAMES),
    groups=st.integers(1, 3),
)
def test_any_column_for_any_other_of_a_shard(
    image: pa.Array, label: pa.Array, names: str, classes: object, groups: int
) -> None:
    table = pa.table([image, label], [names, "label"])
    features = {"info": {"features": {"label": {"names": classes}}}}
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), file, row_group_size=groups)
    attempt(TARGETS["parquet"], file.getvalue())


@FEW
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    mode=st.sampled_from(["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F"]),
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF"]),
    transparency=st.none() | st.integers(0, 300) | st.binary(max_size=300),
    orientation=st.none() | st.integers(-1, 70_000),
)
def test_any_mode_in_any_format(
    size: tuple[int, int], mode: str, kind: str, transparency: int | bytes | None, orientation: int | None
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    file = io.BytesIO()
    try:
        Image.new(mode, size).save(file, kind, transparency=transparency, exif=exif)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, struct_error, AttributeError):
        return  # there is no such file
    attempt(TARGETS["image"], file.getvalue())
