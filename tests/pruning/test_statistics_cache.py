"""Statistics are read back, extended, shared by processes that die at any time, and bounded in size."""

import fcntl
import itertools
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.errors import StorageError
from adasearch.pruning import calibration, statistics, statistics_cache
from adasearch.pruning.statistics import FAMILIES, Statistics
from adasearch.pruning.statistics_cache import Cache
from tests.pruning.sample import sample, tokens

MOMENTS = frozenset({"moments"})
GRADIENT = frozenset({"gradient"})


class Made:
    """An origin of whole numbers, so that sums over any split are exact; notes what was asked of it."""

    def __init__(self, size=100, value=1.0, seconds=0.0):
        self.size, self.value, self.seconds = size, value, seconds
        self.asked = []

    def accumulate(self, first, stop, families):
        self.asked.append((first, stop, families))
        time.sleep(self.seconds)
        count = stop - first
        filled = {
            name: torch.full((self.size,), self.value * sum(range(first, stop)), dtype=torch.float64)
            for name in ("total", "squares", "gram", "token", "sequence")
        }
        filled |= {
            name: torch.full((self.size,), self.value, dtype=torch.float64) for name in ("mean", "cosine", "angle")
        }
        filled["m2"] = torch.zeros(self.size, dtype=torch.float64)
        parts = {"gradient_sum": ["total"], "square_sum": ["squares"], "moments": ["mean", "m2"]}
        parts |= {"covariance": ["mean", "gram"], "cosine": ["mean"], "inputs": ["mean", "m2"]}
        parts |= {"votes": ["token", "sequence"], "boundaries": ["cosine", "angle"], "spsa_sum": ["total"]}
        tensors = {f"{family}/m/{name}": filled[name].clone() for family in families for name in parts[family]}
        return Statistics(tokens=9 * count, tensors=tensors)

    def read(self, merged, needs, sequences):
        tensors = {k: t for need in needs for k, t in merged.only(need).tensors.items()}
        if "gradient" in needs:
            tensors["gradient/m/x"] = merged.tensors["gradient_sum/m/total"].abs() / sequences
        if "fisher" in needs:
            tensors["fisher/m/x"] = merged.tensors["gradient_sum/m/total"] + merged.tensors["square_sum/m/squares"]
        return Statistics(tokens=merged.tokens, tensors=tensors)


class Never:
    def accumulate(self, first, stop, families):
        raise AssertionError(f"computed {families} although it is on disk")

    read = accumulate


class Real:
    """The statistics of a tiny model."""

    def __init__(self, case, batch):
        self.case, self.batch, self.asked = case, batch, []

    def accumulate(self, first, stop, families):
        self.asked.append((first, stop))
        return calibration.accumulate(self.case.model, self.case.structure, self.batch[first:stop], families)

    def read(self, merged, needs, sequences):
        return calibration.read(merged, needs, self.case.structure, self.case.weights, sequences)


def _files(folder):
    return sorted(f.name.removesuffix(".safetensors") for f in folder.iterdir() if f.suffix == ".safetensors")


class TestObtain:
    def test_computes_what_is_missing_only(self, tmp_path):
        cache, made = Cache(folder=tmp_path), Made()
        cache.obtain("key", 4, MOMENTS, made)
        both = cache.obtain("key", 4, frozenset({"moments", "covariance"}), made)
        assert made.asked == [(0, 4, {"moments"}), (0, 4, {"covariance"})]
        assert both.families == {"moments", "covariance"}
        again = cache.obtain("key", 4, frozenset({"moments", "covariance"}), Never())
        assert torch.equal(again.tensors["moments/m/mean"], both.tensors["moments/m/mean"])
        cache.obtain("other", 4, MOMENTS, made)
        assert len(made.asked) == 3

    def test_no_need_is_no_work(self, tmp_path):
        assert Cache(folder=tmp_path / "none").obtain("key", 4, frozenset(), Never()).tensors == {}
        assert not (tmp_path / "none").exists()

    def test_cached_is_fresh(self, tmp_path):
        case = sample(dtype=torch.float32)
        fresh = calibration.collect(case.model, case.structure, case.tokens, FAMILIES)
        cache = Cache(folder=tmp_path)
        first = cache.obtain("key", 5, FAMILIES, Real(case, case.tokens))
        for found in (first, cache.obtain("key", 5, FAMILIES, Never())):
            assert found.tokens == fresh.tokens
            assert found.tensors.keys() == fresh.tensors.keys()
            for name, tensor in fresh.tensors.items():
                assert torch.equal(found.tensors[name], tensor), name

    @pytest.mark.parametrize("content", [b"", b"x" * 40, None])
    def test_a_damaged_file_counts_as_absent(self, tmp_path, content):
        cache = Cache(folder=tmp_path)
        cache.obtain("key", 4, MOMENTS, Made())
        file = tmp_path / "key-4.moments.safetensors"
        file.write_bytes(file.read_bytes()[:-3] if content is None else content)
        cache.obtain("key", 4, MOMENTS, Made(value=2.0))
        again = cache.obtain("key", 4, MOMENTS, Never())
        assert float(again.tensors["moments/m/mean"][0]) == 2.0

    def test_the_folder_may_go_at_any_time(self, tmp_path):
        folder = tmp_path / "cache"
        cache = Cache(folder=folder)
        found = cache.obtain("key", 4, MOMENTS, Made())
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        assert float(found.tensors["moments/m/mean"].sum()) == 100
        assert float(cache.obtain("key", 4, MOMENTS, Made(value=3.0)).tensors["moments/m/mean"][0]) == 3.0

    def test_a_folder_that_cannot_be_written_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError, match="must be writable"):
            Cache(folder=tmp_path / "file").obtain("key", 4, MOMENTS, Made())


class TestExtending:
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    def test_equals_a_fresh_computation_exactly_for_whole_numbers(self, tmp_path_factory, sizes):
        cache = Cache(folder=tmp_path_factory.mktemp("cache"))
        for size in sizes:
            found = cache.obtain("key", size, FAMILIES, Made())
            fresh = Made().read(Made().accumulate(0, size, frozenset(statistics.ACCUMULATORS)), FAMILIES, size)
            assert found.tokens == fresh.tokens
            assert {n: t.tolist() for n, t in found.tensors.items()} == {
                n: t.tolist() for n, t in fresh.tensors.items()
            }

    def test_computes_the_new_sequences_only(self, tmp_path):
        cache, made = Cache(folder=tmp_path), Made()
        for size in (4, 8, 6, 20):
            cache.obtain("key", size, MOMENTS, made)
        assert [asked[:2] for asked in made.asked] == [(0, 4), (4, 8), (4, 6), (8, 20)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_a_fresh_computation_on_a_model(self, tmp_path, dtype):
        case, batch = sample(dtype=dtype), tokens(6)
        cache, origin = Cache(folder=tmp_path), Real(case, batch)
        for size in (2, 3, 6):
            found = cache.obtain("key", size, FAMILIES, origin)
            fresh = calibration.collect(case.model, case.structure, batch[:size], FAMILIES)
            for name, tensor in fresh.tensors.items():
                scale = float(tensor.abs().max())
                # In bfloat16 the model itself rounds differently where other sequences lie beside one in a batch.
                close = 1e-6 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(found.tensors[name], tensor, rtol=close, atol=close * scale)
        assert origin.asked == [(0, 2), (2, 3), (3, 6)]

    def test_gradients_are_extended_from_their_sums(self, tmp_path):
        cache, made = Cache(folder=tmp_path), Made()
        cache.obtain("key", 4, GRADIENT, made)
        cache.obtain("key", 6, frozenset({"gradient", "fisher"}), made)
        asked = {(first, stop): families for first, stop, families in made.asked}
        assert asked[0, 4] == asked[4, 6] == {"gradient_sum"}
        assert asked[0, 6] == {"gradient_sum", "square_sum"}

    def test_sums_that_are_too_large_are_not_kept(self, tmp_path):
        cache, made = Cache(folder=tmp_path, max_bytes=3000), Made()
        cache.obtain("key", 4, GRADIENT, made)
        assert _files(tmp_path) == ["key-4.gradient"]
        cache.obtain("key", 6, GRADIENT, made)
        assert [asked[:2] for asked in made.asked] == [(0, 4), (0, 6)]

    def test_a_damaged_smaller_sample_is_not_used(self, tmp_path):
        cache = Cache(folder=tmp_path)
        cache.obtain("key", 4, MOMENTS, Made())
        (tmp_path / "key-4.moments.safetensors").write_bytes(b"half")
        made = Made()
        cache.obtain("key", 6, MOMENTS, made)
        assert made.asked == [(0, 6, {"moments"})]


class TestBound:
    def test_the_longest_unused_go_first(self, tmp_path):
        for i in range(3):
            Cache(folder=tmp_path).obtain(f"k{i}", 1, MOMENTS, Made())
            os.utime(tmp_path / f"k{i}-1.moments.safetensors", (1000 + i, 1000))
        size = (tmp_path / "k0-1.moments.safetensors").stat().st_size
        small = Cache(folder=tmp_path, max_bytes=2 * size)
        small.obtain("k0", 1, MOMENTS, Never())
        small.obtain("k3", 1, MOMENTS, Made())
        assert _files(tmp_path) == ["k0-1.moments", "k3-1.moments"]

    def test_sums_go_before_anything_else(self, tmp_path):
        Cache(folder=tmp_path).obtain("k0", 1, MOMENTS, Made())
        os.utime(tmp_path / "k0-1.moments.safetensors", (1000, 1000))
        Cache(folder=tmp_path).obtain("k1", 1, GRADIENT, Made())
        assert _files(tmp_path) == ["k0-1.moments", "k1-1.gradient", "k1-1.gradient_sum"]
        total = sum(f.stat().st_size for f in tmp_path.iterdir())
        Cache(folder=tmp_path, max_bytes=total).obtain("k2", 1, MOMENTS, Made(size=1))
        assert _files(tmp_path) == ["k0-1.moments", "k1-1.gradient", "k2-1.moments"]

    def test_what_does_not_fit_is_given_and_not_kept(self, tmp_path):
        found = Cache(folder=tmp_path, max_bytes=10).obtain("key", 4, MOMENTS, Made())
        assert found.families == {"moments"}
        assert _files(tmp_path) == []

    def test_eviction_leaves_foreign_files_and_sweeps_what_killed_processes_left(self, tmp_path):
        foreign = tmp_path / "model.safetensors"
        foreign.write_bytes(b"z" * 10_000)
        old = [tmp_path / "k-1.moments.safetensors.0.part", tmp_path / "k-1.moments.lock"]
        young = tmp_path / "k-1.moments.safetensors.1.part"
        for file in (*old, young):
            file.write_bytes(b"half")
        for file in old:
            os.utime(file, (1000, 1000))
        Cache(folder=tmp_path, max_bytes=10).obtain("key", 4, MOMENTS, Made())
        assert {f.name for f in tmp_path.iterdir()} == {foreign.name, young.name, "key-4.moments.lock"}


@contextmanager
def _processes(target, arguments):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=target, args=args) for args in arguments]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.join(60)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _sleepless_writer(folder):
    cache = Cache(folder=folder, max_bytes=4_000_000)
    for i in itertools.count():
        cache.obtain(f"k{i % 5}", 1 + i % 3, MOMENTS, Made(size=100_000))


def _count_reads(folder, rounds, queue):
    for i in range(rounds):
        found = Cache(folder=folder, max_bytes=2500).obtain(f"k{i % 3}", 1 + i % 2, MOMENTS, Made())
        queue.put(float(found.tensors["moments/m/mean"].sum()))


def _slow(folder, queue):
    made = Made(seconds=1.0)
    found = Cache(folder=folder).obtain("key", 3, MOMENTS, made)
    queue.put((len(made.asked), float(found.tensors["moments/m/mean"].sum())))


def _forever(folder):
    Cache(folder=folder).obtain("key", 3, MOMENTS, Made(seconds=1000.0))


class TestProcesses:
    def test_a_killed_writer_leaves_no_file_that_reads_wrong(self, tmp_path):
        for _ in range(3):
            with _processes(_sleepless_writer, [(tmp_path,)]) as (writer,):
                time.sleep(0.3)
                os.kill(writer.pid, signal.SIGKILL)
            for file in tmp_path.glob("*.safetensors"):
                assert float(statistics.load(file).tensors["moments/m/mean"].sum()) == 100_000
            found = Cache(folder=tmp_path).obtain("k0", 1, MOMENTS, Made(size=100_000))
            assert float(found.tensors["moments/m/mean"].sum()) == 100_000

    def test_many_processes_share_a_folder_that_is_too_small(self, tmp_path):
        queue = multiprocessing.get_context("fork").Queue()
        with _processes(_count_reads, [(tmp_path, 40, queue)] * 3) as workers:
            sums = [queue.get(timeout=60) for _ in range(120)]
        assert set(sums) == {100.0}
        assert [worker.exitcode for worker in workers] == [0, 0, 0]

    def test_one_computes_what_several_want(self, tmp_path):
        queue = multiprocessing.get_context("fork").Queue()
        with _processes(_slow, [(tmp_path, queue)] * 3):
            found = sorted(queue.get(timeout=60) for _ in range(3))
        assert found == [(0, 100.0), (0, 100.0), (1, 100.0)]

    def test_a_holder_that_is_killed_makes_nobody_wait(self, tmp_path):
        with _processes(_forever, [(tmp_path,)]) as (holder,):
            while not (tmp_path / "key-3.moments.lock").exists():
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(holder.pid, signal.SIGKILL)
            start = time.monotonic()
            found = Cache(folder=tmp_path).obtain("key", 3, MOMENTS, Made())
        assert found.families == {"moments"}
        assert time.monotonic() - start < 30

    def test_a_stuck_holder_is_not_waited_for_for_ever(self, tmp_path, monkeypatch):
        monkeypatch.setattr(statistics_cache, "_PATIENCE", 0.1)
        with (tmp_path / "key-3.moments.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert Cache(folder=tmp_path).obtain("key", 3, MOMENTS, Made()).families == {"moments"}

    def test_a_file_system_without_locks_computes_all_the_same(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", refuse)
        assert Cache(folder=tmp_path).obtain("key", 3, MOMENTS, Made()).families == {"moments"}
