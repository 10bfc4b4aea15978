"""What was measured, as values, and the tables that say it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch

from adasearch.documents import value
from benchmarks.machine import Machine, Peak
from benchmarks.work import Work

TOTAL = "total"
EVALUATE, MODEL_ALONE = "evaluate", "evaluate, model alone"
"""`MODEL_ALONE` leaves out of the naive evaluation what the harness does beside asking its model: building requests,
metrics, and a report on the environment that takes seconds however few the items are. Ours has the same row twice."""


@value
class Measurement:
    """One stage done one way.

    Args:
        stage: by the names of a trial's phases; `TOTAL` for all of them, `MODEL_ALONE` for a part.
        way: who did it, such as ``naive``, ``cold`` or ``warm``.
        dtype: number format of the weights.
        seconds: wall time of each repeat.
        peak: greatest memory above the start, over all repeats.
        work: what went through the matrix units; None where that is not what takes the time.
    """

    stage: str
    way: str
    dtype: str
    seconds: tuple[float, ...]
    peak: Peak
    work: Work | None = None

    @property
    def median(self) -> float:
        """Return the median wall time; a shared machine's speed changes from second to second."""
        return statistics.median(self.seconds)

    def floor(self, machine: Machine) -> float:
        """Return the seconds that the operations alone would take at the measured matrix rate."""
        return self.work.flops / machine.rate(getattr(torch, self.dtype)) if self.work else 0.0


def _by_stage(measurements: Iterable[Measurement]) -> dict[str, dict[str, Measurement]]:
    table: dict[str, dict[str, Measurement]] = {}
    for m in measurements:
        table.setdefault(m.stage, {})[m.way] = m
    return table


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def seconds_table(measurements: Sequence[Measurement], ways: Sequence[str]) -> str:
    """Return seconds by stage and way, and how many times as long as each other way the first one takes."""
    first, *others = ways
    rows = [["stage", *(f"{way} s" for way in ways), *(f"{first}/{way}" for way in others)]]
    for stage, row in _by_stage(measurements).items():
        cells = [f"{row[way].median:.3f}" if way in row else "-" for way in ways]
        base = row.get(first)
        ratios = [f"{base.median / max(row[way].median, 1e-9):.2f}" if base and way in row else "-" for way in others]
        rows.append([stage, *cells, *ratios])
    return _aligned(rows)


def work_table(measurements: Sequence[Measurement], machine: Machine) -> str:
    """Return tokens, rate, operations, share of the matrix rate, floor and peak memory of every stage and way."""
    rows = [["stage", "way", "dtype", "tokens", "tokens/s", "GFLOP", "share %", "floor s", "peak MiB", "device MiB"]]
    for m in measurements:
        if m.work is not None:
            took = max(m.median, 1e-9)
            counted = [f"{m.work.tokens}", f"{m.work.tokens / took:.0f}", f"{m.work.flops / 1e9:.1f}"]
            counted += [f"{100 * m.floor(machine) / took:.1f}", f"{m.floor(machine):.3f}"]
        else:
            counted = ["-"] * 5
        memory = [f"{size / 2**20:.0f}" for size in (m.peak.host, m.peak.device)]
        rows.append([m.stage, m.way, m.dtype, *counted, *memory])
    return _aligned(rows)


def machine_line(machine: Machine) -> str:
    """Return the machine in one line."""
    rates = f"bfloat16 {machine.bf16_flops / 1e9:.0f} GFLOP/s, float32 {machine.fp32_flops / 1e9:.0f} GFLOP/s"
    return (
        f"{machine.name}, {machine.device}, {machine.threads} threads: {rates}, copy {machine.bandwidth / 1e9:.1f} GB/s"
    )
