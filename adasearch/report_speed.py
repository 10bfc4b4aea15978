"""The report's section on what the exported models take: files, memory, tokens per second, beside the dense model."""

from __future__ import annotations

from html import escape

from adasearch.records import FinalRecord, Rate, Speed
from adasearch.report import Findings
from adasearch.report_parts import html_table, section

_MIB = 2**20


def _cells(files: int, peak: int, prefill: float | None, decode: float | None) -> list[str]:
    """Return the figures of a model as text; what is not known is a dash."""
    rates = [f"{rate:,.1f}" if rate is not None else "–" for rate in (prefill, decode)]
    return [f"{files / _MIB:,.1f}", f"{peak / _MIB:,.0f}" if peak else "–", *rates]


def _gain(rate: Rate | None) -> str:
    return f"× {rate.gain:.2f} ± {rate.spread:.2f}" if rate else "–"


def _row(final: FinalRecord, speed: Speed) -> tuple[str, list[str]]:
    prefill, decode = (rate.own if rate else None for rate in (speed.prefill, speed.decode))
    cells = _cells(speed.file_bytes, speed.peak_bytes, prefill, decode)
    return "", [escape(final.name), escape(speed.format), *cells, _gain(speed.prefill), _gain(speed.decode)]


def _dense_row(speed: Speed) -> tuple[str, list[str]]:
    """Return the row of the dense model as it ran beside an export."""
    prefill, decode = (rate.dense if rate else None for rate in (speed.prefill, speed.decode))
    cells = _cells(speed.dense_file_bytes, speed.dense_peak_bytes, prefill, decode)
    ran = escape(f"{'llama.cpp' if speed.gguf else 'torch'}, {speed.dtype}")
    return "", ["dense", ran, *cells, "", ""]


def speed_section(f: Findings) -> str:
    """Return the section, empty where no export was measured."""
    rows = [_row(final, speed) for final in f.finals for speed in final.speeds]
    timed = [speed for final in f.finals for speed in final.speeds if speed.prefill and speed.decode]
    if not rows:
        return ""
    said = "<p>Not timed: these files are run by llama.cpp, which is not installed here (xllamacpp).</p>"
    if timed:
        first = timed[0]
        # one row for each way in which the dense model ran
        ways = {(speed.gguf, speed.dtype): speed for speed in reversed(timed)}
        rows[:0] = [_dense_row(ways[way]) for way in sorted(ways)]
        bare = f", {first.bare_bytes / _MIB:,.0f} MiB of it before a model is opened" if first.bare_bytes else ""
        said = (
            f"<p>Batch 1 on the machine of the run ({escape(first.device)}, {first.threads} threads, "
            f"{escape(first.dtype)}): a prompt of {first.prompt} tokens, then {first.written} written one by one with "
            "the key-value cache. Each export takes turns with the dense model in one process, after all trials and "
            "finalists were done; the ratios are medians over such pairs, with their standard error, and are what to "
            "compare: the speed of a machine drifts. GGUF files are run by llama.cpp on the CPU, beside the dense "
            f"model in the same number format. Memory is the peak of a process that opens one model alone{bare}.</p>"
        )
    head = ["<model", "<format", "weights, MiB", "peak memory, MiB", "prefill, tokens/s", "decode, tokens/s",
            "prefill, of dense", "decode, of dense"]  # fmt: skip
    return section("speed", "Speed and memory", said, html_table(head, rows))
