"""Several processes that train one model together: each takes a share of every batch, gradients are summed up.

Every process draws the whole batch and takes its own sequences of it, so the data needs no sharing, and each part
counts by its tokens, so that the sum over all processes is the gradient of the batch. Steps, checkpoints and the end of
a run are decided by what the first process (rank 0) says.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


class Group(Protocol):
    """The processes of a run."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> None:
        """Put the sum over all processes in the place of each one's tensor."""
        ...


class Alone:
    """A single process."""

    rank, size = 0, 1

    def sum(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""


class Together:
    """A group of torch.distributed, see `joined`."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._device = device

    def sum(self, tensor: Tensor) -> None:
        """Put the sum over all processes in the place of each one's tensor, which may lie on another device."""
        there = tensor.to(self._device)
        torch.distributed.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)


def first_says(group: Group, value: float) -> float:
    """Return the value that the first process has, on all of them."""
    if group.size == 1:
        return value
    shared = torch.tensor([value if group.rank == 0 else 0.0], dtype=torch.float64)
    group.sum(shared)
    return float(shared[0])


@contextlib.contextmanager
def joined(folder: Path, rank: int, size: int, device: str, seconds: float = 1800.0) -> Iterator[Group]:
    """Meet the other processes and leave them at the end.

    They find each other by a file in `folder`, which all of them must see. NCCL carries what lies on GPUs, Gloo the
    rest.

    Args:
        folder: for the file; another one for every attempt.
        rank: of this process, from 0.
        size: number of processes; 1 meets nobody.
        device: on which this process computes.
        seconds: how long to wait for the others, at the beginning and at each step.
    """
    if size == 1:
        yield Alone()
        return
    folder.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    backend = "nccl" if where.type == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(folder / "meeting"), size)  # type: ignore[attr-defined]
    limit = datetime.timedelta(seconds=seconds)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield Together(where)
    finally:
        torch.distributed.destroy_process_group()
