"""CIFAR-10 from the Hugging Face hub, or from its original pickles (Krizhevsky 2009), read without executing them."""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.data.photo import Photo, read_image
from bagcert.errors import UnreadableError, UsageError, reason_of, sanitize
from bagcert.io.files import read_regular
from bagcert.io.optional import require

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB_ID = "uoft-cs/cifar10"
_FILES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_INNER_FOLDER = "cifar-10-batches-py"
MAX_FILE_BYTES = 1 << 28  # a batch has 31 MB; larger files are refused before they are read


def load_cifar10(split: str = "test") -> ImageSet:
    """Loads CIFAR-10 from the hub, 50,000 images in `train` and 10,000 in `test`. Downloads are cached.

    Raises:
        UsageError: another split, or `datasets` is not installed.
        UnreadableError: the hub cannot be reached and the set is not in the cache.
    """
    _check_split("cifar10", split)
    what = "cifar10 by that name (a folder with its Parquet files or its original pickles does without)"
    datasets = require("datasets", "hub", what)
    try:
        table = datasets.load_dataset(HUB_ID, split=split).cast_column("img", datasets.Image(decode=False))
        labels = np.asarray(table["label"], dtype=np.int64)
    except Exception as error:  # the hub's clients raise many kinds, none of them common to all
        raise UnreadableError(
            f"CIFAR-10 cannot be fetched from the hub ({HUB_ID}): {sanitize(reason_of(error))}; "
            "check the network, or give a folder with its Parquet files or its original pickles"
        ) from error

    def read(row: int) -> Photo:
        return read_image(table[row]["img"]["bytes"], f"cifar10 {split} image {row}")

    return ImageSet("cifar10", split, labels, CLASS_NAMES, read)


def is_pickles(path: Path) -> bool:
    """Returns whether a folder holds the original batches, directly or in the subfolder of the original archive."""
    return any((_batches(path) / file).is_file() for files in _FILES.values() for file in files)


def load_pickles(path: Path, split: str = "test") -> ImageSet:
    """Loads CIFAR-10 from `data_batch_1` to `data_batch_5` and `test_batch`, in `path` or `path/cifar-10-batches-py`.

    Raises:
        UsageError: a split other than train and test.
        UnreadableError: a file is missing, truncated, of another format, or refers to code to execute.
    """
    _check_split(str(path), split)
    pixels, labels = zip(*(_read_batch(_batches(path) / file) for file in _FILES[split]), strict=True)
    return ImageSet(
        str(path), split, np.concatenate(labels), CLASS_NAMES, ArraySource(np.concatenate(pixels), f"{path} {split}")
    )


def _batches(path: Path) -> Path:
    return path / _INNER_FOLDER if (path / _INNER_FOLDER).is_dir() else path


def _check_split(name: str, split: str) -> None:
    if split not in _FILES:
        raise UsageError(f"{name} has no split {split!r}; it has train and test")


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _RestrictedUnpickler(read_regular(path, MAX_FILE_BYTES)).load()
    except FileNotFoundError:
        raise UnreadableError(f"there is no file {path}") from None
    except Exception as error:  # a broken pickle can fail in any way
        raise UnreadableError(f"{path} cannot be read as a CIFAR-10 batch: {sanitize(reason_of(error))}") from None
    batch = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    data, labels = batch.get("data"), batch.get("labels")
    pixels = data.array if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise UnreadableError(f"{path} is not a CIFAR-10 batch: it has no `data` of uint8 [images, 3072]")
    classes = range(len(CLASS_NAMES))
    if not isinstance(labels, list) or not all(type(label) is int and label in classes for label in labels):
        raise UnreadableError(f"{path} is not a CIFAR-10 batch: it has no list `labels` of integers from 0 to 9")
    if len(labels) != len(pixels):
        raise UnreadableError(f"{path} is not a CIFAR-10 batch: it has {len(pixels)} images and {len(labels)} labels")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)


def _text(key: object) -> object:
    return key.decode("latin1") if isinstance(key, bytes) else key


class _DType:
    """Stand-in for numpy.dtype that stores the name."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        """Ignores byte order and alignment, which do not matter for bytes."""


class _Array:
    """Stand-in for numpy.ndarray that accepts only uint8 and validates the content before numpy reads it."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _DType) or dtype.name not in ("u1", "uint8") or not isinstance(raw, bytes | bytearray):
            raise pickle.UnpicklingError("its array is not of uint8")
        self.array = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(raw: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}

_OPCODES = """
    PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    BYTEARRAY8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""
"""What plain data need. Without sets, objects of classes, extensions and names outside the file."""


class _RestrictedUnpickler(pickle._Unpickler):
    """Unpickler for arrays, bytes, text, numbers, lists and dicts that never calls a function named by the file.

    Allowed names resolve to stand-ins of this module; any other name is an error. This is the Python unpickler and not
    the C one, which allocates up to 64 GiB of memory if ten bytes of a file request it.
    """

    stack: list  # pickle's own, which its type stubs leave out

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.size = self.room = len(data)

    def find_class(self, module: str, name: str) -> Callable:
        """Returns the stand-in for an allowed name."""
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {sanitize(module)}.{sanitize(name)}, which is not run")
        return _ALLOWED[module, name]

    def encode(self, text: object, encoding: object) -> bytes:
        """Encodes text that stands for bytes in older protocols. The total is limited to the size of the file."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("it encodes text in another way than bytes are written")
        self.room -= len(text)
        if self.room < 0:
            raise pickle.UnpicklingError("it uses the same text again and again")
        return text.encode("latin1")


def _build(unpickler: Any) -> None:
    """Sets the state of a stand-in. Setting the state of any other object is refused: it could modify this module."""
    if not isinstance(unpickler.stack[-2], _Array | _DType):
        raise pickle.UnpicklingError("it gives a state to what has none")
    _LOADERS[pickle.BUILD[0]](unpickler)


def _byte_array(unpickler: Any) -> None:
    """Reads a bytearray. Unlike Python's own opcode, it checks the length against the file before allocating memory."""
    (length,) = struct.unpack("<Q", unpickler.read(8))
    if length > unpickler.size:
        raise pickle.UnpicklingError("it is cut short")
    unpickler.append(bytearray(unpickler.read(length)))


def _with_checked_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """Refuses tuples as keys of a dict: a few bytes can nest them so deeply that hashing takes years."""

    def load(unpickler: Any) -> None:
        if not all(isinstance(key, str | bytes | int) for key in unpickler.stack[keys]):
            raise pickle.UnpicklingError("a key is neither text nor a number")
        _LOADERS[opcode[0]](unpickler)

    return load


_LOADERS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
_RestrictedUnpickler.dispatch = {
    code: _LOADERS[code] for code in (getattr(pickle, name)[0] for name in _OPCODES.split())
}
_RestrictedUnpickler.dispatch |= {
    pickle.BUILD[0]: _build,
    pickle.BYTEARRAY8[0]: _byte_array,
    pickle.SETITEM[0]: _with_checked_keys(pickle.SETITEM, slice(-2, -1)),
    pickle.SETITEMS[0]: _with_checked_keys(pickle.SETITEMS, slice(None, None, 2)),
    pickle.DICT[0]: _with_checked_keys(pickle.DICT, slice(None, None, 2)),
}
