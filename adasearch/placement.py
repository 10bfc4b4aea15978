"""How many workers, threads and GPUs: facts about machines and the need of a trial -> where trials run. Pure.

What a study leaves open is decided here; what it states is kept, and `Placement.warnings` says where that hurts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from adasearch.documents import Count, Index, NonNegative, Positive, value
from adasearch.footprint import Training, footprint, logit_bytes, parameters_of
from adasearch.sections import ClusterConfig

if TYPE_CHECKING:
    from adasearch.pruning.structure import ModelShape

GIB = 2**30
TRIALS_PER_WORKER = 4
"""Least trials for each worker: a proposal does not know the trials that run, so many workers make a search blind."""
MOST_PER_GPU = 4
"""Trials that share a GPU at most; its kernels run one after the other, sharing fills the gaps between them."""
GPU_RESERVE = 0.05
"""Share of a GPU that shared workers leave alone: the contexts and libraries that PyTorch does not count."""

# Measured on SmolLM2-135M (`benchmarks/memory.py steps`): libraries and tokenizer of a worker, without and with CUDA.
_HEAP, _CUDA_HEAP, _CUDA_CONTEXT = 450 * 2**20, 3 * GIB, 700 * 2**20
# Elements of a training step's activations for each token and layer, in hidden and intermediate sizes; the logits are
# made 256 lines at a time, in the number format and in float32 with their gradient.
_HIDDEN_COPIES, _INTERMEDIATE_COPIES = 16, 8
# Covariances are float32 and written to the cache as a copy.
_COVARIANCE_BYTES = 4 * 2


@value
class Machine:
    """What a machine offers.

    Args:
        cores: that this process may use.
        memory: bytes that are free for it.
        gpus: bytes of each GPU, 0 where they are not known.
    """

    cores: Count
    memory: Index
    gpus: tuple[Index, ...] = ()


@value
class Need:
    """What a worker needs while it runs a trial: bytes of its own, bytes once per machine, bytes of its GPU."""

    memory: Count
    shared: Index = 0
    gpu: Index = 0


@value
class Placement:
    """Where trials run.

    Args:
        workers: trials at the same time.
        threads: of each worker.
        gpus: GPUs of each worker, a fraction where they share one; 0 for the CPU.
        gpu_memory: share of its GPU's memory that a worker may take; None does not limit it.
        machines: what there is.
        need: what a trial needs.
    """

    workers: Count
    threads: Count
    gpus: NonNegative
    gpu_memory: Positive | None
    machines: tuple[Machine, ...]
    need: Need

    @property
    def summary(self) -> str:
        """Return the decision and its grounds in one line."""
        if self.gpus:
            share = f"{self.gpus:g} of a GPU each" if self.gpus < 1 else f"{self.gpus:g} GPU each"
        else:
            share = "no GPU"
        gpus = [size for machine in self.machines for size in machine.gpus]
        there = [f"{len(self.machines)} machines"] if len(self.machines) > 1 else []
        there += [_count(self._cores, "core"), f"{_gib(self._memory)} free"]
        there += [_count(len(gpus), "GPU") + (f" of {_gib(min(gpus))}" if min(gpus) else "")] if gpus else []
        need = f"each needs about {_gib(self.need.memory)}"
        need += f" and {_gib(self.need.gpu)} of GPU memory" if self.gpus else ""
        who = f"{_count(self.workers, 'worker')} x {_count(self.threads, 'thread')}"
        return f"{who}, {share} ({', '.join(there)}; {need})"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what the decision asks too much of, with the numbers; empty where all of it fits."""
        found = []
        threads = self.workers * self.threads
        if threads > self._cores:
            who = f"{_count(self.workers, 'worker')} x {_count(self.threads, 'thread')}"
            given = f"{who} are {threads} threads on {_count(self._cores, 'core')}"
            found.append(f"{given}: they slow each other down")
        memory = self.workers * self.need.memory + len(self.machines) * self.need.shared
        if memory > self._memory:
            given = f"{_count(self.workers, 'worker')} may need {_gib(memory)} of memory, {_gib(self._memory)} are free"
            found.append(f"{given}: trials may be killed")
        known = [size for machine in self.machines for size in machine.gpus if size]
        share = min(1.0, self.gpus) if self.gpu_memory is None else self.gpu_memory
        if self.gpus and known and self.need.gpu > share * min(known):
            given = f"each may need {_gib(self.need.gpu)} of GPU memory, its share is {_gib(share * min(known))}"
            found.append(f"{given}: it may fail for want of memory")
        return tuple(found)

    @property
    def _cores(self) -> int:
        return sum(machine.cores for machine in self.machines)

    @property
    def _memory(self) -> int:
        return sum(machine.memory for machine in self.machines)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def trial_need(shape: ModelShape, weight_bytes: int, step_tokens: int, *, gpu: bool) -> Need:
    """Return what a worker needs for trials of a model: an upper estimate from sizes alone.

    The cut model, and beside it the larger of the covariances (L x (I² + A²) numbers, A = heads x head size) and the
    activations of a training step. Base weights are mapped and lie in memory once per machine; a GPU holds its own.

    Args:
        shape: of the dense model.
        weight_bytes: of one weight.
        step_tokens: tokens of a training step, 0 for no training.
        gpu: trials run on a GPU.
    """
    weights = parameters_of(shape) * weight_bytes
    attention = shape.heads * shape.head_dim
    covariances = _COVARIANCE_BYTES * shape.layers * (shape.intermediate**2 + attention**2)
    work = max(covariances, _step_bytes(shape, weight_bytes, step_tokens))
    if gpu:
        return Need(memory=_CUDA_HEAP + weights + covariances, shared=weights, gpu=_CUDA_CONTEXT + 2 * weights + work)
    return Need(memory=_HEAP + weights + work, shared=weights)


def final_need(shape: ModelShape, weight_bytes: int, training: Training, *, gpu: bool) -> Need:
    """Return what a worker needs to train a model at the end of a run: see `trial_need` and `footprint`."""
    trial = trial_need(shape, weight_bytes, training.tokens, gpu=gpu)
    found = footprint(shape, weight_bytes, training)
    if gpu:
        memory = trial.memory + found.best
        return dataclasses.replace(trial, memory=memory, gpu=max(trial.gpu, _CUDA_CONTEXT + found.total))
    return dataclasses.replace(trial, memory=max(trial.memory, _HEAP + found.total + found.best))


def _step_bytes(shape: ModelShape, weight_bytes: int, tokens: int) -> int:
    if not tokens:
        return 0
    elements = _HIDDEN_COPIES * shape.hidden + _INTERMEDIATE_COPIES * shape.intermediate
    return weight_bytes * tokens * shape.layers * elements + logit_bytes(shape, tokens)


def most_workers(trials: int) -> int:
    """Return how many workers a search of `trials` trials can use without being blind for most of them."""
    return max(1, trials // TRIALS_PER_WORKER)


def decide(cluster: ClusterConfig, machines: tuple[Machine, ...], need: Need, most: int) -> Placement:
    """Return where trials run: what `cluster` states is kept, the rest follows from machines and need.

    Workers: on GPUs as many as their memory holds, at most `MOST_PER_GPU` to each; on CPUs one to each core. Never more
    than `most`, than there are cores, or than memory holds, and at least one. Threads: the cores shared evenly.

    Args:
        cluster: the study's; its address `in_process` means one worker.
        machines: at least one.
        need: of one worker.
        most: workers that are of use.
    """
    offered = [machine for machine in machines if machine.gpus] if cluster.gpus_per_worker != 0 else []
    used = tuple(offered) or tuple(dataclasses.replace(machine, gpus=()) for machine in machines)
    num_gpus = sum(len(machine.gpus) for machine in used)
    open_number = max(1, min(most, sum(_room(machine, cluster, need) for machine in used)))
    stated = 1 if cluster.address == "in_process" else cluster.workers
    workers = stated if isinstance(stated, int) else open_number
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = _fraction(math.ceil(workers / num_gpus)) if num_gpus else 0.0
    cores = [machine.cores for machine in used]
    return Placement(
        workers=workers,
        threads=cluster.threads or max(1, min(sum(cores) // workers, *cores)),
        gpus=gpus,
        gpu_memory=cluster.gpu_memory or (gpus * (1 - GPU_RESERVE) if 0 < gpus < 1 else None),
        machines=used,
        need=need,
    )


def _room(machine: Machine, cluster: ClusterConfig, need: Need) -> int:
    """Return how many workers a machine has room for."""
    room: list[float] = [machine.cores // (cluster.threads or 1), (machine.memory - need.shared) // need.memory]
    if machine.gpus:
        room.append(sum(_sharing(size, cluster, need) for size in machine.gpus))
    return max(0, math.floor(min(room)))


def _sharing(size: int, cluster: ClusterConfig, need: Need) -> float:
    """Return how many workers a GPU of `size` bytes takes; below one where each wants several."""
    if cluster.gpus_per_worker:
        given = cluster.gpus_per_worker
        return math.floor(1 / given + 1e-9) if given <= 1 else 1 / given
    return max(1, min(MOST_PER_GPU, int(size * (1 - GPU_RESERVE)) // max(1, need.gpu))) if size else 1


def _fraction(sharing: int) -> float:
    """Return the part of a GPU that each of `sharing` workers gets, in the ten-thousandths that Ray counts in."""
    return math.floor(10_000 / sharing) / 10_000
