"""Snapshot, comparison and restoration of the state that a network keeps between calls.

The state includes everything reachable from its modules: attributes, buffers and weights, class attributes, lists, sets
and dicts, closures of functions, and random number generators. State elsewhere, such as global variables, is not
detected.
"""

from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from random import Random
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEEPEST = 8
_LONGEST = 10_000  # the items of longer containers are not visited
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class _Kept:
    name: str
    content: Any
    read: Callable[[], Any]
    write: Callable[[Any], object]


class ModuleState:
    """Snapshot of the state of a network.

    >>> net = nn.BatchNorm2d(2)
    >>> state = ModuleState(net)
    >>> _ = net(torch.rand(1, 2, 3, 3))
    >>> state.changed()
    'running_mean'
    >>> state.restore()
    >>> net.running_mean.tolist(), state.changed()
    ([0.0, 0.0], None)
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[_Kept] = []
        self._seen: dict[int, object] = {}  # keeps the objects alive, so that ids are not reused
        with torch._C.DisableTorchFunction():  # the state may contain tracked tensors
            self._walk("", module, 0)

    def changed(self) -> str | None:
        """Name of the first object that changed since the snapshot, or None."""
        with torch._C.DisableTorchFunction():
            for kept in self._kept:
                now = kept.read()
                if not _same(kept.content, now):
                    return ".".join(name for name in (kept.name, _changed_key(kept.content, now)) if name)
        return None

    def restore(self) -> None:
        """Restore everything that changed since the snapshot."""
        with torch._C.DisableTorchFunction():
            for kept in self._kept:
                if not _same(kept.content, kept.read()):
                    kept.write(kept.content)

    def _walk(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _SIMPLE) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen[id(value)] = value
        if access := _access(value):
            self._kept.append(_Kept(name, access[0](), *access))
        for part, held in _parts(value):
            deeper = 0 if isinstance(held, nn.Module) else depth + 1
            self._walk(".".join(word for word in (name, part) if word), held, deeper)


def _access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """Functions that copy and restore the content of an object; None if it has no mutable content."""
    if isinstance(value, Tensor):
        return lambda: value.detach().clone(), lambda old: _write_tensor(value, old)
    if isinstance(value, np.ndarray):
        return value.copy, lambda old: np.copyto(value, old)
    if isinstance(value, dict):
        return lambda: dict(value), lambda old: _refill(value, old)
    if isinstance(value, set):
        return lambda: set(value), lambda old: _refill(value, old)
    if isinstance(value, list | deque | bytearray):
        return lambda: list(value), lambda old: _refill(value, old)
    if isinstance(value, CellType):
        return lambda: _enclosed(value), lambda old: setattr(value, "cell_contents", old)
    if isinstance(value, type):
        return lambda: dict(vars(value)), lambda old: _write_class(value, old)
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.BitGenerator):
        return lambda: deepcopy(value.state), lambda old: setattr(value, "state", old)
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of an object with their names; "" for parts without a name."""
    if isinstance(value, dict):
        for key, held in list(value.items())[:_LONGEST]:
            yield key if isinstance(key, str) and key not in ("_buffers", "_parameters", "_modules") else "", held
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from (("", held) for held in list(value)[:_LONGEST])
    elif isinstance(value, CellType):
        yield "", _enclosed(value)
    elif isinstance(value, type):
        yield from vars(value).items()
    elif isinstance(value, FunctionType):
        yield "", (value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__)
    elif isinstance(value, MethodType):
        yield "", (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield "", (value.func, value.args, value.keywords)
    elif isinstance(value, np.random.Generator):
        yield "", value.bit_generator
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, ModuleType | Tensor):
        yield "", value.__dict__
        if isinstance(value, nn.Module):
            own = [kind for kind in type(value).__mro__ if kind.__module__.split(".")[0] not in ("torch", "builtins")]
            yield from ((kind.__name__, kind) for kind in own)


def _changed_key(old: Any, new: Any) -> str:
    """The first changed key of a dict; "" for other objects."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    keys = [*old, *(key for key in new if key not in old)]
    return next((str(key) for key in keys if key not in old or key not in new or not _same(old[key], new[key])), "")


def _enclosed(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _write_tensor(value: Tensor, old: Tensor) -> None:
    with torch.no_grad():
        if value.shape == old.shape and value.dtype == old.dtype:
            value.copy_(old)
        else:
            value.data = old


def _refill(container: Any, old: Any) -> None:
    container.clear()
    if isinstance(container, dict | set):
        container.update(old)
    else:
        container.extend(old)


def _write_class(kind: type, old: dict[str, Any]) -> None:
    for name in vars(kind).keys() - old.keys():
        delattr(kind, name)
    for name, value in old.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _same(old: Any, new: Any) -> bool:
    """Whether contents are equal: tensors, arrays and simple values by value, everything else by identity."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, Tensor):
        if old.dtype != new.dtype or old.shape != new.shape or old.device != new.device:
            return False
        return torch.equal(old, new) or bool(((old == new) | ((old != old) & (new != new))).all())
    if isinstance(old, np.ndarray):
        return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
    if isinstance(old, dict):
        return list(old) == list(new) and all(_same(held, new[key]) for key, held in old.items())
    if isinstance(old, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, set):
        return old == new
    return isinstance(old, _SIMPLE) and bool(old == new or (old != old and new != new))


def is_told_by_text(module: nn.Module) -> bool:
    """Whether a network is fully determined by its text and weights, so that caches can compare networks by them.

    This holds for layers of torch and of this package. It does not hold for custom layers, for traced and scripted
    networks, whose text does not contain their code, or for layers with hooks or a replaced `forward`.

    >>> is_told_by_text(nn.Conv2d(3, 8, 3)), is_told_by_text(torch.fx.symbolic_trace(nn.Conv2d(3, 8, 3)))
    (True, False)
    """
    return all(
        type(part).__module__.partition(".")[0] in ("torch", "bagcert")
        and not isinstance(part, torch.fx.GraphModule | torch.jit.ScriptModule)
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        for part in module.modules()
    )
