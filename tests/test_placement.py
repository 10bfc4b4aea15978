"""The number of workers, threads and GPUs: what is stated is kept, what is open fits the machines."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch import placement
from adasearch.footprint import Training
from adasearch.placement import GIB, MOST_PER_GPU, Machine, Need, decide
from adasearch.pruning.structure import ModelShape
from adasearch.sections import ClusterConfig

SMALL = Need(memory=GIB, shared=GIB // 4, gpu=4 * GIB)

machine = st.builds(
    Machine,
    cores=st.integers(1, 128),
    memory=st.integers(0, 512 * GIB),
    gpus=st.lists(st.sampled_from([0, 8 * GIB, 24 * GIB, 80 * GIB]), max_size=8).map(tuple),
)
cluster_of = st.lists(machine, min_size=1, max_size=3).map(tuple)
need = st.builds(Need, memory=st.integers(1, 64 * GIB), shared=st.integers(0, 64 * GIB), gpu=st.integers(0, 100 * GIB))


def shape_of(layers: int = 30, hidden: int = 576, intermediate: int = 1536) -> ModelShape:
    matrices = {
        "embedding": (49152, hidden),
        "mlp": (layers * 3, intermediate, hidden),
        "attention": (layers, 2, hidden, hidden),
    }
    return ModelShape(family="llama", layers=layers, hidden=hidden, heads=hidden // 64, kv_heads=3, head_dim=64,
                      intermediate=intermediate, vocabulary=49152, tied=True, shapes=matrices)  # fmt: skip


@given(machines=cluster_of, need=need, most=st.integers(1, 64))
def test_what_is_open_fits_cores_memory_and_gpus(machines, need, most):
    found = decide(ClusterConfig(), machines, need, most)
    assert 1 <= found.workers <= most
    assert found.workers * found.threads <= max(found.workers, sum(m.cores for m in found.machines))
    assert found.threads <= min(m.cores for m in found.machines)
    if found.workers > 1:
        assert found.workers * need.memory <= sum(m.memory for m in found.machines)
        assert not [w for w in found.warnings if "cores" in w]
    gpus = [size for m in found.machines for size in m.gpus]
    assert (found.gpus > 0) == bool(gpus) == any(m.gpus for m in machines)
    if gpus:
        per_gpu = int(1 / found.gpus + 1e-9)
        assert found.gpus <= 1
        assert per_gpu <= MOST_PER_GPU
        assert found.workers <= per_gpu * len(gpus), "Ray must find a place for every worker"
        assert (found.gpu_memory or 1.0) * per_gpu <= 1.0


@given(machines=cluster_of, need=need, most=st.integers(1, 64), more=st.integers(1, 64 * GIB))
def test_more_memory_never_means_fewer_workers(machines, need, most, more):
    larger = tuple(dataclasses.replace(m, memory=m.memory + more) for m in machines)
    assert decide(ClusterConfig(), larger, need, most).workers >= decide(ClusterConfig(), machines, need, most).workers


@given(
    machines=cluster_of,
    workers=st.integers(1, 40),
    threads=st.integers(1, 40),
    gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    share=st.sampled_from([0.2, 0.9]),
)
def test_what_is_stated_is_kept(machines, workers, threads, gpus, share):
    stated = ClusterConfig(workers=workers, threads=threads, gpus_per_worker=gpus, gpu_memory=share)
    found = decide(stated, machines, SMALL, 1)
    assert (found.workers, found.threads, found.gpus, found.gpu_memory) == (workers, threads, gpus, share)
    cores = sum(m.cores for m in found.machines)
    given = f"{workers} worker{'s' * (workers > 1)} x {threads} thread{'s' * (threads > 1)} are "
    told = [w for w in found.warnings if given in w and f" on {cores} core" in w]
    assert bool(told) == (workers * threads > cores)


@pytest.mark.parametrize(
    ("cluster", "machine", "expected"),
    [
        ({}, Machine(cores=2, memory=20 * GIB), (2, 1, 0.0, None)),
        ({}, Machine(cores=2, memory=2 * GIB), (1, 2, 0.0, None)),
        ({}, Machine(cores=64, memory=200 * GIB), (15, 4, 0.0, None)),
        ({"threads": 8}, Machine(cores=64, memory=200 * GIB), (8, 8, 0.0, None)),
        ({"address": "in_process"}, Machine(cores=8, memory=200 * GIB), (1, 8, 0.0, None)),
        ({}, Machine(cores=16, memory=128 * GIB, gpus=(139 * GIB,)), (4, 4, 0.25, 0.2375)),
        ({}, Machine(cores=16, memory=128 * GIB, gpus=(10 * GIB,)), (2, 8, 0.5, 0.475)),
        ({}, Machine(cores=16, memory=128 * GIB, gpus=(2 * GIB,)), (1, 16, 1.0, None)),
        ({}, Machine(cores=64, memory=400 * GIB, gpus=(0,) * 8), (8, 8, 1.0, None)),
        ({"workers": 2}, Machine(cores=64, memory=400 * GIB, gpus=(0,) * 8), (2, 32, 1.0, None)),
        ({"gpus_per_worker": 0.5}, Machine(cores=64, memory=400 * GIB, gpus=(0,) * 2), (4, 16, 0.5, 0.475)),
        ({"gpus_per_worker": 2.0}, Machine(cores=64, memory=400 * GIB, gpus=(0,) * 8), (4, 16, 2.0, None)),
        ({"gpus_per_worker": 0.0}, Machine(cores=2, memory=20 * GIB, gpus=(80 * GIB,)), (2, 1, 0.0, None)),
    ],
)
def test_machines_as_one_meets_them(cluster, machine, expected):
    found = decide(ClusterConfig(**cluster), (machine,), SMALL, placement.most_workers(60))
    assert (found.workers, found.threads, found.gpus, found.gpu_memory) == expected
    assert found.warnings == () or machine.gpus == (2 * GIB,)


def test_a_head_node_without_gpus_is_left_out_where_others_have_some():
    machines = (Machine(cores=4, memory=8 * GIB), Machine(cores=32, memory=256 * GIB, gpus=(0, 0)))
    found = decide(ClusterConfig(address="auto"), machines, SMALL, 15)
    assert (found.workers, found.threads, found.gpus) == (2, 16, 1.0)
    assert "2 GPUs" in found.summary


def test_the_decision_reads_as_one_line():
    found = decide(ClusterConfig(), (Machine(cores=2, memory=20 * GIB),), SMALL, 15)
    assert found.summary == "2 workers x 1 thread, no GPU (2 cores, 20.0 GiB free; each needs about 1.0 GiB)"
    shared = decide(ClusterConfig(), (Machine(cores=8, memory=64 * GIB, gpus=(80 * GIB,)),), SMALL, 2)
    assert shared.summary == (
        "2 workers x 4 threads, 0.5 of a GPU each (8 cores, 64.0 GiB free, 1 GPU of 80.0 GiB; "
        "each needs about 1.0 GiB and 4.0 GiB of GPU memory)"
    )


def test_too_little_memory_is_told_with_the_numbers():
    stated = decide(ClusterConfig(workers=4, threads=1), (Machine(cores=4, memory=2 * GIB),), SMALL, 15)
    assert stated.warnings == ("4 workers may need 4.2 GiB of memory, 2.0 GiB are free: trials may be killed",)
    one = decide(ClusterConfig(), (Machine(cores=4, memory=8 * GIB, gpus=(2 * GIB,)),), SMALL, 15)
    assert one.warnings == (
        "each may need 4.0 GiB of GPU memory, its share is 2.0 GiB: it may fail for want of memory",
    )


def test_needs_grow_with_the_model_and_the_step():
    small, large = shape_of(), shape_of(layers=60)
    for gpu in (False, True):
        a = placement.trial_need(small, 2, 512, gpu=gpu)
        b = placement.trial_need(large, 2, 512, gpu=gpu)
        long = placement.trial_need(small, 2, 4096, gpu=gpu)
        full = placement.final_need(small, 2, Training(batch=2, length=256), gpu=gpu)
        field = "gpu" if gpu else "memory"
        for greater in (b, long, full):
            assert getattr(a, field) < getattr(greater, field)
        assert b.shared > a.shared > 0
    assert placement.trial_need(small, 2, 0, gpu=False).gpu == 0


def test_the_estimate_of_a_small_model_is_near_what_was_measured():
    """SmolLM2-135M in bfloat16 with 512 tokens a step: 1.2 to 1.7 GiB at the peak (`benchmarks/memory.py`)."""
    need = placement.trial_need(shape_of(), 2, 512, gpu=False)
    assert 1.0 * GIB < need.memory < 2.0 * GIB
