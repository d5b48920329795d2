"""The original pickles of CIFAR-10, honest and hostile, and the hub."""

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.data import cifar10, load_dataset
from bagcert.data.cifar10 import CLASS_NAMES, load_cifar10, load_pickles
from bagcert.errors import UnreadableError, UsageError

# A batch of one black image as Python 2 wrote the originals: protocol 2, byte strings, numpy.core.multiarray.
_PYTHON2 = (
    b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03K\x06aU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\n"
    b"ndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\t"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + bytes(3072) + b"tbu."
)


def _batch(count: int = 4, seed: int = 0) -> dict[str, object]:
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": data, "labels": [int(label) for label in random.integers(0, 10, count)], "batch_label": "batch"}


def _write(folder: Path, batches: dict[str, dict[str, object]], protocol: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    batch = _batch()
    if protocol == 5:  # protocol 5 writes contiguous arrays in another way than others
        assert b"_frombuffer" in pickle.dumps(batch, protocol)
    images = load_pickles(_write(tmp_path, {"test_batch": batch}, protocol))
    np.testing.assert_array_equal(images.labels, batch["labels"])
    expected = np.asarray(batch["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(images.array(), expected)
    assert images.class_names == CLASS_NAMES


def test_byte_keys_and_fortran_order(tmp_path: Path) -> None:
    batch = {key.encode(): value for key, value in _batch().items()}
    batch[b"data"] = np.asfortranarray(batch[b"data"])
    images = load_pickles(_write(tmp_path, {"test_batch": batch}))
    assert images.array()[1, 2, 3, 1] == batch[b"data"][1, 1024 + 2 * 32 + 3]


def test_a_python_2_pickle(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(_PYTHON2)
    images = load_pickles(tmp_path)
    assert images.labels.tolist() == [6]
    assert not images.array().any()


def test_train_is_five_batches_in_order(tmp_path: Path) -> None:
    batches = {f"data_batch_{number}": _batch(3, number) for number in range(1, 6)}
    _write(tmp_path / "cifar-10-batches-py", {**batches, "test_batch": _batch()})
    images = load_dataset(tmp_path, "train")
    assert len(images) == 15
    assert images.labels.tolist() == [label for batch in batches.values() for label in batch["labels"]]
    assert len(load_dataset(str(tmp_path), "test", limit=2)) == 2
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UnreadableError, match=r"there is no file .*data_batch_4"):
        load_dataset(tmp_path, "train")
    with pytest.raises(UsageError, match="no split 'validation'; it has train and test"):
        load_dataset(tmp_path, "validation")


def _refused(tmp_path: Path, content: bytes, reason: str | None) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UnreadableError, match=reason) as caught:
        load_pickles(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


class _Runs:
    """Unpickled carelessly, this calls a function."""

    def __init__(self, command: object, *arguments: object) -> None:
        self.call = (command, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for attack in (
        pickle.dumps({"data": _Runs(os.system, f"touch {proof}")}),
        pickle.dumps({"data": _Runs(eval, f"open({str(proof)!r}, 'w')")}),
        pickle.dumps({"data": _Runs(__import__, "os")}),
        f"cos\nsystem\n(S'touch {proof}'\ntR.".encode(),
        f"(S'touch {proof}'\nios\nsystem\n.".encode(),
        f"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR(S'{proof}'\ntR.".encode(),
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        pickle.dumps({"data": np.array([object], dtype=object)}),
        pickle.dumps({"data": np.datetime64("2020-01-01")}),
    ):
        _refused(tmp_path, attack, "test_batch")
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        _PYTHON2[:500],
        pickle.dumps([1, 2]),
        pickle.dumps({}),
        pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1 << 80]}),
    ],
)
def test_other_content_is_refused(content: bytes, tmp_path: Path) -> None:
    _refused(tmp_path, content, None)


def _hub(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    fake = types.ModuleType("datasets")
    fake.load_dataset = load
    fake.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand a long story")

    _hub(monkeypatch, fail)
    with pytest.raises(UnreadableError, match=r"cannot be fetched from the hub \(uoft-cs/cifar10\): no route to host;"):
        load_cifar10("test")


def test_images_of_the_hub_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    columns = {"img": [Image.fromarray(each) for each in pixels], "label": [3, 8, 0]}
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {"uoft-cs/cifar10/test": table}[f"{name}/{split}"]
    )
    images = load_dataset("cifar10")
    np.testing.assert_array_equal(images.array(), pixels)
    assert images.labels.tolist() == [3, 8, 0]
    assert images.class_names == CLASS_NAMES


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'pip install "bagcert\[hub\]"'):
        load_dataset("cifar10")
    with pytest.raises(UsageError, match="no split 'val'"):
        load_dataset("cifar10", "val")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory has other units elsewhere")
def test_a_number_in_a_pickle_takes_no_memory(tmp_path: Path) -> None:
    """The C unpickler makes a table as long as the largest number under which something is remembered.

    Python's makes an array of bytes as long as the file says before it looks whether the file has them.
    """
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(tmp_path, b"\x80\x02}r\x00\x00\x00\x02.", "no `data` of uint8")
    for opcode in (b"\x96", b"\x8e", b"\x8d"):
        _refused(tmp_path, b"\x80\x05" + opcode + (1 << 31).to_bytes(8, "little") + b"x.", "cannot be read")
    for opcode in (b"B", b"X", b"T", b"\x8b"):
        _refused(tmp_path, b"\x80\x05" + opcode + (0x7FFFFFFF).to_bytes(4, "little") + b"x.", "cannot be read")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.timeout(20)
def test_a_key_whose_hash_takes_years_is_refused(tmp_path: Path) -> None:
    nested = b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(99))
    for content in (b"}" + nested + b"Ns.", b"}(" + nested + b"Nu.", b"(" + nested + b"Nd."):
        _refused(tmp_path, b"\x80\x02" + content, "a key is neither text nor a number")


def test_a_text_in_a_pickle_is_not_multiplied(tmp_path: Path) -> None:
    text = b"X\x00\x10\x00\x00" + b"a" * 4096 + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    once = b"c_codecs\nencode\nh\x00h\x01\x86R"
    _refused(tmp_path, b"\x80\x02(" + text + once * 1000 + b"t.", "it uses the same text again and again")


def test_what_a_pickle_may_name_cannot_be_changed_by_it(tmp_path: Path) -> None:
    change = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}X\x01\x00\x00\x00aNsb."
    _refused(tmp_path, change, "it gives a state to what has none")
    assert not hasattr(cifar10._reconstruct, "a")


@pytest.mark.parametrize("opcode", [b"\x8f", b"\x82\x01", b"Pname\n", b"(ios\nsystem\n", b")\x81", b"\x97"])
def test_a_pickle_has_no_sets_extensions_or_objects(opcode: bytes, tmp_path: Path) -> None:
    _refused(tmp_path, b"\x80\x04" + opcode + b".", "cannot be read as a CIFAR-10 batch")


def test_large_files_and_pipes_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(b"x")
    os.truncate(path, cifar10.MAX_FILE_BYTES + 1)
    with pytest.raises(UnreadableError, match="more than the limit of 268,435,456"):
        load_pickles(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadableError, match="not a regular file"):
        load_pickles(tmp_path)
