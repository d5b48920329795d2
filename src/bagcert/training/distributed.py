"""Collectives between the processes of a run that was started by `torchrun` or `accelerate launch`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bagcert.errors import BagcertError

Value = TypeVar("Value")


class ProcessGroup:
    """Collective operations across training processes; no-ops with a single process.

    Create it after the process group. It always uses gloo, so that a collective waits for processes only and never for
    work on a device. Every process must call the same methods in the same order.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.size = dist.get_world_size() if several else 1
        self.index = dist.get_rank() if several else 0
        self._group = dist.new_group(backend="gloo") if several else None

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and shows progress."""
        return self.index == 0

    def any(self, asked: bool) -> bool:
        """Returns whether the value is true on any process."""
        return bool(self._reduced(float(asked), dist.ReduceOp.MAX)) if self.size > 1 else asked

    def sum(self, value: float) -> float:
        """Returns the sum over all processes, bitwise identical on each."""
        return self._reduced(value, dist.ReduceOp.SUM) if self.size > 1 else value

    def mean(self, value: float) -> float:
        """Returns the mean over all processes."""
        return self.sum(value) / self.size

    def from_main(self, make: Callable[[], Value]) -> Value:
        """Calls `make` on the main process only and broadcasts the result.

        Raises:
            BagcertError: `make` raised an error on the main process; all processes raise the same error.
        """
        made: list[Any] = [None]
        with self.together():
            if self.is_main:
                made[0] = make()
        if self.size > 1:
            dist.broadcast_object_list(made, src=0, group=self._group)
        return made[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager that raises an error of one process on all of them, so that none waits forever.

        Raises:
            BagcertError: the error of the lowest rank that has one.
        """
        error = None
        try:
            yield
        except BagcertError as raised:
            error = raised
        if self.any(error is not None) and self.size > 1:
            errors: list[BagcertError | None] = [None] * self.size
            dist.all_gather_object(errors, error, group=self._group)
            error = next(each for each in errors if each is not None)
        if error is not None:
            raise error

    def _reduced(self, value: float, operation: Any) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self._group)
        return tensor.item()


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
