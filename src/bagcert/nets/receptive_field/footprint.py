"""Footprints of tensors, and calls of torch functions with tracked tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from bagcert.nets.receptive_field.passes import Pass

ROW, COL = 1, 2  # positions in Footprint.dims

_ENDS = ("adaptive_avg_pool2d", "mean", "flatten", "view", "reshape", "linear")
_CURE = "; where a classifier ends so, bagcert.regionalize(module) makes a region scorer of it"


@dataclass(frozen=True, eq=False)
class Footprint:
    """The image rows and columns on which a tensor depends.

    Attributes:
        dims: dimensions of the tensor that are the batch, the rows and the columns.
        rows: boolean [tensor rows, image height].
        cols: boolean [tensor columns, image width].
    """

    dims: tuple[int, int, int]
    rows: np.ndarray
    cols: np.ndarray

    def map(self, dim: int, change: Callable[[np.ndarray], np.ndarray]) -> "Footprint":
        """Apply `change` to the table of dimension `dim`; other dimensions are ignored."""
        if dim == self.dims[ROW]:
            return replace(self, rows=change(self.rows))
        if dim == self.dims[COL]:
            return replace(self, cols=change(self.cols))
        return self

    def moved(self, to: Callable[[int], int]) -> "Footprint":
        """Move dimension `d` of the tensor to `to(d)`; the tables are unchanged."""
        batch, row, col = self.dims
        return replace(self, dims=(to(batch), to(row), to(col)))

    def same(self, other: "Footprint") -> bool:
        """Whether dimensions and tables are equal."""
        return (
            self.dims == other.dims and np.array_equal(self.rows, other.rows) and np.array_equal(self.cols, other.cols)
        )


@dataclass(frozen=True)
class Layer:
    """Description of a layer for messages, and whether it is a layer of torch."""

    text: str
    of_torch: bool

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "Layer":
        """Describe the layer with the given name in the network; "" is the network itself."""
        kind = type(module)
        text = f"layer {name!r} ({kind.__name__})" if name else f"the network ({kind.__name__})"
        return cls(text, kind.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential))


class Tracked(Tensor):
    """Tensor with a footprint: the image or a tensor computed from it."""

    footprint: Footprint
    run: "Pass"  # the forward pass to which it belongs
    number: int  # number of the tensor within the pass
    aliased: bool  # whether other tensors may share its memory


class Call:
    """One call of a torch function with tracked arguments, in the forward pass `run`."""

    def __init__(self, run: "Pass", func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.run, self.func, self.args, self.kwargs = run, func, args, kwargs
        tensors = list(tensors_in((args, kwargs)))
        self.tracked = [tensor for tensor in tensors if isinstance(tensor, Tracked)]
        self.plain = [tensor for tensor in tensors if not isinstance(tensor, Tracked)]
        name = getattr(func, "__name__", str(func))
        self.name = getattr(func.__self__, "__name__", name) if name == "__get__" else name

    @cached_property
    def out(self) -> Any:
        """The result of the function, computed on first access, after the checks of the handler."""
        return self.func(*self.args, **self.kwargs)

    def print_of(self, value: Any) -> Footprint:
        """The footprint of an argument, which must be the only argument computed from the image."""
        if not isinstance(value, Tracked) or len(self.tracked) > 1:
            self.unsupported("takes weights, statistics or sizes from the image")
        return value.footprint

    def plain_print_of(self, value: Any) -> Footprint:
        """As `print_of`, for an argument in the layout [batch, channels, rows, columns]."""
        footprint = self.print_of(value)
        if value.ndim != 4 or footprint.dims != (0, 2, 3):
            self.unsupported("works on a map that is not [batch, channels, rows, columns]")
        return footprint

    def refuse(self, reason: str) -> NoReturn:
        """Refuse the operation because it is not local."""
        self.run.refuse(self.name, reason + (_CURE if self.name in _ENDS else ""))

    def unsupported(self, reason: str) -> NoReturn:
        """Refuse the operation because it is not supported, although it may be local."""
        self.run.unsupported(self.name, reason)

    @property
    def in_place(self) -> bool:
        """Whether the function works in place, by torch's naming conventions (`add_`, `__iadd__`)."""
        if self.name.startswith("__"):
            return self.name == "__setitem__" or (self.name[2] == "i" and hasattr(Tensor, f"__{self.name[3:]}"))
        return self.name.endswith("_")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
