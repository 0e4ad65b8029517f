"""Several processes of one command, as `torchrun` and `accelerate launch` start them: who does what, and what happens when one fails.

Every process loads the whole model on its own device and reads its share of the documents; what they find is summed. Sums travel in main
memory over gloo: they are small (a moments file per compilation), and one path serves GPUs and CPUs alike. They are added in one order
everywhere, so that all processes go on with the same bits.

A process that ends, for whatever reason, closes its connections; whoever waits for it then fails at once instead of for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import RotateKError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
MEETING = timedelta(minutes=3)  # processes of one launch start together; who is missing then never started
WORKING = timedelta(hours=2)  # between two sums nobody is behind by more than one share of the work
FAILED = "rotatek/failed"  # how many processes have failed, in the launcher's store

_store: Any = None


def launched() -> tuple[int, int]:
    """This process's rank and how many there are, as the launcher's environment says; (0, 1) without a launcher.

    Raises:
        UsageError: RANK and WORLD_SIZE make no sense together.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return 0, 1
    try:
        found = int(rank), int(size)
    except ValueError:
        found = -1, 0
    if not 0 <= found[0] < found[1]:
        raise UsageError(f"RANK={rank} and WORLD_SIZE={size} in the environment make no sense; start with torchrun or accelerate launch")
    return found


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    try:
        return launched()[0] == 0
    except UsageError:
        return True  # somebody has to say so


def local_device(name: str | None) -> str | None:
    """`--device` for this process: with several processes of one machine each has a GPU of its own.

    Raises:
        UsageError: `auto`, which spreads one model over all GPUs.
        RotateKError: there are more processes than GPUs.
    """
    import torch

    if launched()[1] == 1:
        return name
    if name == "auto":
        raise UsageError("--device auto spreads one model over all GPUs, but here every process has a whole one; start a single process")
    if name not in (None, "cuda") or not torch.cuda.is_available():
        return name
    local, there = int(os.environ.get("LOCAL_RANK", launched()[0])), torch.cuda.device_count()
    if local >= there:
        raise RotateKError(f"process {local} of this machine has no GPU: there are {there}; start {there} processes, or use --device cpu")
    return f"cuda:{local}"


class Processes:
    """The processes of one command.

    Args:
        rank, size: this one's number and how many there are.
        group: their torch.distributed group; None for a single process, to which nothing here costs anything.

    Raises:
        RotateKError: by every method that waits for the others, when one of them has ended or hangs.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th item, from this process's number on: shares differ by one item at most."""
        return items if self.size == 1 else items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """A small value of every process, in order of rank, known to all."""
        if self.size == 1:
            return [value]
        from torch import distributed

        out: list[Any] = [None] * self.size
        with _waiting():
            distributed.all_gather_object(out, value, group=self.group)
        return out

    def broadcast(self, value: T | None) -> T:
        """The main process's value."""
        box: list[Any] = [value]
        if self.size > 1:
            from torch import distributed

            with _waiting():
                distributed.broadcast_object_list(box, group=self.group, group_src=0)
        found: T = box[0]
        return found

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of a small tensor of equal shape everywhere, fp64 on the CPU, added in order of rank."""
        import torch

        parts = self.gather(value.double().cpu())
        return torch.stack(list(parts)).sum(0)

    def sum_named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums by name, fp64 on the CPU, where a process may lack names that others have."""
        if self.size == 1:
            return dict(tensors)
        import torch
        from torch import distributed

        shapes: dict[str, torch.Size] = {}
        for part in self.gather({name: value.shape for name, value in tensors.items()}):
            for name, shape in part.items():
                if shapes.setdefault(name, shape) != shape:
                    raise RotateKError(
                        f"processes disagree on {name}: {list(shape)} and {list(shapes[name])}; they must run the same model"
                    )
        names = sorted(shapes)
        flat = torch.cat(
            [tensors[n].double().cpu().reshape(-1) if n in tensors else torch.zeros(shapes[n].numel()).double() for n in names]
        )
        with _waiting():
            # gloo sums every piece in one process and hands it on: all get the same bits
            distributed.all_reduce(flat, group=self.group)
        pieces = flat.split([shapes[name].numel() for name in names])
        return {name: piece.reshape(shapes[name]).clone() for name, piece in zip(names, pieces, strict=True)}


@contextmanager
def processes() -> Iterator[Processes]:
    """All processes of this launch, met; a single one without a launcher.

    A group that the caller has made already (a training script that compiles) is used and left as it is.

    Raises:
        RotateKError: some of them never came.
    """
    global _store
    rank, size = launched()
    if size == 1:
        yield Processes()
        return
    from torch import distributed

    ours = not distributed.is_initialized()
    try:
        if ours:
            distributed.init_process_group("gloo", timeout=MEETING)
        _store = distributed.distributed_c10d._get_default_store()
        group = distributed.new_group(backend="gloo", timeout=WORKING)
    except Exception as error:  # torch has a type of its own for each way in which a meeting fails
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise RotateKError(f"the {size} processes of this run did not meet ({reason}); start all of them with torchrun") from error
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        if ours:
            _store = _store if _failing() else None
            distributed.destroy_process_group()


def speaks_for_failure() -> bool:
    """Whether this process is the one that says what went wrong: the first that failed, for the others fail because of it."""
    if _store is None:
        return is_main()
    try:
        return int(_store.add(FAILED, 1)) == 1
    except Exception:  # the process that kept the store is gone
        return launched()[0] == 1


def _failing() -> bool:
    import sys

    return sys.exc_info()[0] is not None


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RotateKError(
            "another process of this run ended or hangs, so this one stops too; "
            "see what that one printed, then run the same command with --resume"
        ) from error
