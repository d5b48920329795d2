"""Taint tracking of one forward pass: which memory contains values of the image, and which operations use them.

Every torch operation is intercepted at dispatch, regardless of how it is called (functions, methods, `vmap`, scripts,
tensors imported through DLPack). The results and outputs of an operation with image values are tainted as well. All
other operands must be the same for every image (`Steps`). Otherwise image values have bypassed the tracking, or
determine what is computed.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bagcert.errors import BagcertError, UnsoundError, UsageError
from bagcert.nets.receptive_field.footprint import Layer, tensors_in

LOST = "uses values of the image whose origin cannot be traced (or weights that are NaN)"
_DECIDES = "lets values of the image decide what is computed"
OTHERWISE = (
    "is not computed in every pass: the network depends on values of the image, on the number of images or on their "
    "layout in memory, or changes from call to call"
)
_ATEN = torch.ops.aten
_SHAPES_ONLY = {_ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.empty_like, _ATEN.new_zeros, _ATEN.new_ones}
_SHAPES_ONLY |= {_ATEN.new_full, _ATEN.new_empty, _ATEN.new_empty_strided}
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class ImageMemory:
    """Tracks which memory contains values computed from the image."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[StorageWeakRef, int]] = {}  # by start address; with end address

    def add(self, tensor: Tensor) -> None:
        """Mark the memory of a tensor."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._blocks[storage.data_ptr()] = StorageWeakRef(storage), storage.data_ptr() + storage.nbytes()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor overlaps marked memory; True for tensors without memory, such as inside `vmap`."""
        try:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
        except (RuntimeError, NotImplementedError):
            return True
        for begin, (reference, end) in list(self._blocks.items()):
            if reference.expired():  # the memory may have been reused
                del self._blocks[begin]
            elif begin < start + storage.nbytes() and start < end:
                return True
        return False


@dataclass(frozen=True)
class FromImage:
    """Description of an operand computed from the image, as stored by `Steps`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: int  # number of the operation that computed it
    batch_dim: int | None = None  # dimension whose size may differ between passes


@dataclass(frozen=True)
class _Step:
    operation: Any
    operands: tuple[Any, ...]
    batch: int


class Steps:
    """Sequence of operations on image values: recorded in the first pass and compared in all later passes.

    Args:
        constants: ids of weights and buffers, which are not copied.
    """

    def __init__(self, constants: set[int]) -> None:
        self._constants = constants
        self._steps: list[_Step] = []
        self._next: int | None = None  # None: this is the first pass
        self._begun = False

    def begin(self) -> None:
        """Begin a pass."""
        self._next = 0 if self._begun else None
        self._begun = True

    def add(self, operation: Any, operands: list[Any], batch: int, sizes_may_differ: bool = False) -> str | None:
        """Record an operation in the first pass, or compare it with the recorded one in a later pass.

        Args:
            operands: all operands; those computed from the image as `FromImage`.
            sizes_may_differ: whether integers may be the number of images, as in the arguments of `view`.

        Returns:
            A description of the difference, or None if there is none.
        """
        found = _Step(operation, tuple(operands), batch)
        if self._next is None:
            self._steps.append(_Step(operation, tuple(map(self._copied, found.operands)), batch))
            return None
        if self._next >= len(self._steps):
            return OTHERWISE
        first = self._steps[self._next]
        self._next += 1
        if first.operation != operation or len(first.operands) != len(found.operands):
            return OTHERWISE
        for a, b in zip(first.operands, found.operands, strict=True):
            if isinstance(a, FromImage) and isinstance(b, FromImage) and a.source != b.source:
                return OTHERWISE
            if not _equal(a, b, first.batch, batch, sizes_may_differ):
                return LOST if batch == first.batch else "depends on the number of images in the batch"
        return None

    def _copied(self, operand: Any) -> Any:
        return operand.clone() if isinstance(operand, Tensor) and id(operand) not in self._constants else operand


def leaves(value: Any) -> list[Any]:
    """Flatten nested arguments to a list that also contains the length of each level."""
    found: list[Any] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Any]) -> None:
    if isinstance(value, tuple | list):
        found.append(len(value))
        for part in value:
            if isinstance(part, tuple | list | dict | slice):
                _gather(part, found)
            else:
                found.append(part)
    elif isinstance(value, dict):
        if value:
            _gather([*value, *value.values()], found)
    elif isinstance(value, slice):
        _gather((value.start, value.stop, value.step), found)
    else:
        found.append(value)


def _equal(a: Any, b: Any, images: int, other_images: int, sizes_may_differ: bool) -> bool:
    """Whether operands of two passes with `images` and `other_images` images are equal; NaN is not equal to NaN."""
    if type(a) is not type(b) and not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if isinstance(a, FromImage):
        if len(a.shape) != len(b.shape) or (a.dtype, a.batch_dim) != (b.dtype, b.batch_dim):
            return False
        return all(m == n or dim == a.batch_dim for dim, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)))
    if isinstance(a, Tensor):
        return _equal_tensors(a, b, images, other_images)
    if sizes_may_differ and type(a) is int and (a, b) == (images, other_images):
        return True
    return a is b or (isinstance(a, _SIMPLE) and bool(a == b))


def _equal_tensors(a: Tensor, b: Tensor, images: int, other_images: int) -> bool:
    if a.dtype != b.dtype or a.ndim != b.ndim or a.device != b.device:
        return False
    for dim, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)):
        if m != n:
            # One slice per image, such as zeros for padding. It must be the same for all positions in the batch.
            if (m, n) != (images, other_images):
                return False
            first = a.narrow(dim, 0, 1)
            if not torch.equal(first.expand_as(a), a) or not torch.equal(first.expand_as(b), b):
                return False
            a, b = first, b.narrow(dim, 0, 1)
    return torch.equal(a, b)


class Pass(TorchDispatchMode):
    """Intercepts the dispatched operations of one forward pass.

    Args:
        layers: the layers being called, innermost last; updated by the caller.
        steps: recorded operations of earlier passes, or None if dispatched operations are not compared.
    """

    def __init__(self, batch: int, layers: list[Layer], steps: Steps | None) -> None:
        super().__init__()
        self.batch, self.layers, self.steps = batch, layers, steps
        self.memory = ImageMemory()
        self._sources: dict[tuple[Any, ...], int] = {}
        self._count = self._tracked = 0
        self.failure: Exception | None = None
        self.over = False

    def next_number(self) -> int:
        """Next number of a tracked tensor."""
        self._tracked += 1
        return self._tracked

    def subject(self, name: str) -> str:
        """Name of an operation in messages; only the layer if it is a torch layer."""
        if not self.layers:
            return name.strip("_")
        layer = self.layers[-1]
        return layer.text if layer.of_torch else f"{name.strip('_')} in {layer.text}"

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Refuse an operation because it is not local."""
        self.fail(UnsoundError(f"{self.subject(name)} is not local: {reason}"))

    def unsupported(self, name: str, reason: str) -> NoReturn:
        """Refuse an operation because it is not supported, although it may be local."""
        self.fail(UsageError(f"{self.subject(name)} is not supported: it {reason}"))

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error, and store it in case the network catches it."""
        if not isinstance(self.failure, BagcertError):
            self.failure = error
        raise error

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Hook of torch; returning True would import the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.split("::")[-1]
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse(name, "it draws random numbers in eval mode, so the map changes everywhere from run to run")
        operands = self.described((args, kwargs))
        tainted = sum(isinstance(operand, FromImage) for operand in operands)
        if not tainted or (tainted == 1 and func.overloadpacket in _SHAPES_ONLY):
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.unsupported(name, _DECIDES)
        if func.overloadpacket is _ATEN.copy_ and isinstance(operands[2], Tensor):
            operands[2] = FromImage(tuple(operands[2].shape), operands[2].dtype, -1)  # only written
        if self.steps and (wrong := self.steps.add(func, operands, self.batch)):
            self.unsupported(name, wrong)
        out = func(*args, **kwargs)
        if any(isinstance(part, int | float | complex) for part in (out if isinstance(out, tuple | list) else [out])):
            self.unsupported(name, _DECIDES)
        written = [
            args[i] if i < len(args) else kwargs.get(argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._count += 1
        for tensor in tensors_in((out, written)):
            self.memory.add(tensor)
            self._sources[_place(tensor)] = self._count
        return out

    def described(self, value: Any) -> list[Any]:
        """Flatten nested arguments, replacing tensors with image values by `FromImage`."""
        return [
            FromImage(tuple(leaf.shape), leaf.dtype, self._sources.get(_place(leaf), 0))
            if isinstance(leaf, Tensor) and self.memory.holds(leaf)
            else leaf
            for leaf in leaves(value)
        ]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Identify the memory region and layout of a tensor."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
