"""What a tensor depends on, and one call of a torch function with such tensors."""

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
    """What a tensor depends on.

    Attributes:
        dims: which dimensions of the tensor are the batch, the rows and the columns.
        rows: boolean [tensor rows, image height].
        cols: boolean [tensor columns, image width].
    """

    dims: tuple[int, int, int]
    rows: np.ndarray
    cols: np.ndarray

    def map(self, dim: int, change: Callable[[np.ndarray], np.ndarray]) -> "Footprint":
        """The footprint after `change` of the table that belongs to dimension `dim`, if one does."""
        if dim == self.dims[ROW]:
            return replace(self, rows=change(self.rows))
        if dim == self.dims[COL]:
            return replace(self, cols=change(self.cols))
        return self

    def moved(self, to: Callable[[int], int]) -> "Footprint":
        """The same tables, with dimension `d` of the tensor at `to(d)`."""
        batch, row, col = self.dims
        return replace(self, dims=(to(batch), to(row), to(col)))

    def same(self, other: "Footprint") -> bool:
        """Equal in every table."""
        return (
            self.dims == other.dims and np.array_equal(self.rows, other.rows) and np.array_equal(self.cols, other.cols)
        )


@dataclass(frozen=True)
class Layer:
    """How messages name a layer, and whether it is one of torch's own, whose name says all."""

    text: str
    of_torch: bool

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "Layer":
        """The layer that the network holds under `name`, "" for the network itself."""
        kind = type(module)
        text = f"layer {name!r} ({kind.__name__})" if name else f"the network ({kind.__name__})"
        return cls(text, kind.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential))


class Tracked(Tensor):
    """A tensor with a footprint, from the image or computed from it."""

    footprint: Footprint
    run: "Pass"  # the forward pass that it belongs to
    number: int  # of the operation in that pass that it comes from
    aliased: bool  # other tensors may share its memory


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
        """The real result; computed once, after the handler has made sure that it may be."""
        return self.func(*self.args, **self.kwargs)

    def print_of(self, value: Any) -> Footprint:
        """The footprint of an argument that has to be the only one that comes from the image."""
        if not isinstance(value, Tracked) or len(self.tracked) > 1:
            self.unsupported("takes weights, statistics or sizes from the image")
        return value.footprint

    def plain_print_of(self, value: Any) -> Footprint:
        """Likewise, in the layout [batch, channels, rows, columns]."""
        footprint = self.print_of(value)
        if value.ndim != 4 or footprint.dims != (0, 2, 3):
            self.unsupported("works on a map that is not [batch, channels, rows, columns]")
        return footprint

    def refuse(self, reason: str) -> NoReturn:
        """The operation reaches across the map."""
        self.run.refuse(self.name, reason + (_CURE if self.name in _ENDS else ""))

    def unsupported(self, reason: str) -> NoReturn:
        """The operation may be local, but cannot be derived."""
        self.run.unsupported(self.name, reason)

    @property
    def in_place(self) -> bool:
        """By torch's naming: `add_`, `__iadd__`."""
        if self.name.startswith("__"):
            return self.name == "__setitem__" or (self.name[2] == "i" and hasattr(Tensor, f"__{self.name[3:]}"))
        return self.name.endswith("_")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
