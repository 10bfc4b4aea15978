"""What the machine can do: matrix rate and memory bandwidth, as measured here; and what a run takes of its memory."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from adasearch.documents import value

_LEAST_SECONDS, _DEVICE_SIDE = 0.1, 8192
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_INTERVAL = 0.02
_SAMPLING_SHARE = 0.02
"""Share of the time that looking at the memory may take: the sampler must not slow down what is measured."""


@value
class Machine:
    """What one machine gives at a number of threads.

    Args:
        name: of the processor or the device.
        threads: CPU threads of the measurement; they count for nothing on a device.
        bf16_flops: operations a second of a large bfloat16 product, 2 * m * n * k for m × k times k × n.
        fp32_flops: the same in float32.
        bandwidth: bytes read plus bytes written a second by a large copy.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    threads: int
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    device: str

    def rate(self, dtype: torch.dtype) -> float:
        """Return the matrix rate in a number format (operations a second)."""
        return self.bf16_flops if dtype == torch.bfloat16 else self.fp32_flops


@value
class Peak:
    """Greatest memory of a stage above the start of the measurement, in bytes; `device` is 0 without CUDA."""

    host: int
    device: int


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the least wall time of a call out of `repeats`, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    generator = torch.Generator(device).manual_seed(0)  # zeros would flatter: they take less power
    a = torch.randn(side, side, generator=generator, device=device).to(dtype)
    b = torch.randn(side, side, generator=generator, device=device).to(dtype)
    out = torch.empty_like(a)
    return _best_seconds(lambda: torch.mm(a, b, out=out), device, repeats)


def matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Return 2 n^3 / t of the best n × n product: n = 8192 on CUDA, on a CPU as large as takes a tenth of a second."""
    side = _DEVICE_SIDE
    if device.type == "cpu":
        side = 1024
        while side < _DEVICE_SIDE and _product_seconds(side, dtype, device, repeats=1) < _LEAST_SECONDS:
            side *= 2
    return 2.0 * side**3 / _product_seconds(side, dtype, device, repeats)


def bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Return bytes read plus bytes written a second by the best of several copies far larger than the caches."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.numel() / _best_seconds(lambda: target.copy_(source), device, repeats)


def _processor() -> str:
    """Return the processor's name as Linux tells it, else what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(threads: int, device: torch.device) -> Machine:
    """Measure this machine; sets the number of torch's CPU threads."""
    torch.set_num_threads(threads)
    return Machine(
        name=torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        threads=threads,
        bf16_flops=matrix_rate(torch.bfloat16, device),
        fp32_flops=matrix_rate(torch.float32, device),
        bandwidth=bandwidth(device),
        device=device.type,
    )


def host_memory() -> int:
    """Return the memory of this process in bytes, shared pages by their share (PSS); resident memory where not told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class MemoryTrace:
    """Greatest memory by stage, seen by a thread that looks every 20 ms, less often where looking is slow.

    Args:
        start: host and device bytes that peaks are counted above.
    """

    def __init__(self, start: Peak) -> None:
        self.start = start
        self._host: dict[str, int] = {}
        self._device: dict[str, int] = {}
        self._stage = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def mark(self, stage: str, _progress: float | None = None) -> None:
        """Begin a stage, or go on with it; the signature is that of a trial's observer."""
        if stage == self._stage:
            return
        self._look()
        self._stage = stage
        self._look()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def peaks(self) -> dict[str, Peak]:
        """Return the peak of every stage."""
        return {
            stage: Peak(
                host=max(0, self._host[stage] - self.start.host),
                device=max(0, self._device.get(stage, 0) - self.start.device),
            )
            for stage in self._host
            if stage
        }

    def _look(self) -> None:
        self._host[self._stage] = max(self._host.get(self._stage, 0), host_memory())
        if torch.cuda.is_available():
            now = torch.cuda.max_memory_allocated()
            self._device[self._stage] = max(self._device.get(self._stage, 0), now)

    def _watch(self) -> None:
        pause = _INTERVAL
        while not self._ended.wait(pause):
            start = time.perf_counter()
            self._look()
            pause = max(_INTERVAL, (time.perf_counter() - start) / _SAMPLING_SHARE)

    def __enter__(self) -> MemoryTrace:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()


def memory_now() -> Peak:
    """Return what this process holds at the moment."""
    return Peak(host=host_memory(), device=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)


@contextlib.contextmanager
def peak_memory(start: Peak | None = None) -> Iterator[MemoryTrace]:
    """Watch the memory of this process; the trace holds the peaks by stage above `start`, None taking the present."""
    with MemoryTrace(start or memory_now()) as trace:
        yield trace
