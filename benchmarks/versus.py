"""The winners of several runs of one study, held against the first one's on the same report items.

    adasearch run studies/smollm2_20.yaml --out runs/auto          # and so for each sampler, in a study file of its own
    python -m benchmarks.versus runs/auto runs/tpe runs/random

Cost is the seconds of all trials over all workers, the dense model's left out. Differences are paired item by item; the
interval is 95 %, a percentile bootstrap over items within each task.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adasearch.records import read_items
from adasearch.report import Findings, accuracies, gather, paired_difference
from adasearch.run import load_run
from adasearch.search.stopping import spent

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Winner:
    """The best model of a run, and what finding it took; item values by task."""

    run: Path
    findings: Findings
    accuracy: Values
    metric: Values

    @property
    def cells(self) -> list[str]:
        """Return what a table says of it."""
        best, trials = self.findings.best, self.findings.records
        assert best is not None
        stopped = sum(1 for r in trials if r.result and r.result.stopped)
        cost = spent(trials)
        return [
            self.run.name, self.findings.study.sampler.type, f"{len(trials)} ({stopped} stopped)", f"{cost:.0f} s",
            f"{best.name}{f' ({best.recipe})' if best.recipe else ''}", _percent(self.accuracy), _percent(self.metric),
        ]  # fmt: skip


def _percent(values: Values) -> str:
    return f"{100 * np.mean([x.mean() for x in values.values()]):.1f}"


def winner_of(run: Path) -> Winner:
    """Return the winner of a finished run.

    Raises:
        SystemExit: it has none.
    """
    findings = gather(run, load_run(run))
    if findings.best is None:
        raise SystemExit(f"{run}: has no finished winner")
    return Winner(
        run=run,
        findings=findings,
        accuracy=accuracies(run, findings.best),
        metric={key: x for key, x in (read_items(run / "final" / findings.best.name) or {}).items() if "#" not in key},
    )


def table(winners: Sequence[Winner]) -> Iterator[str]:
    """Yield the lines of the table; the first winner is what the others are compared with."""
    first = winners[0]
    metric = first.findings.study.objective.metric
    heads = ("run", "sampler", "trials", "cost", "winner", "report accuracy", f"report {metric}",
             "accuracy of the first less this", metric)  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for found in winners:
        gaps = [paired_difference(getattr(first, name), getattr(found, name), 0) for name in ("accuracy", "metric")]
        said = ["-" if gap is None or found is first else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in gap))
                for gap in gaps]  # fmt: skip
        yield f"| {' | '.join([*found.cells, *said])} |"


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", type=Path, nargs="+")
    print("\n".join(table([winner_of(run) for run in made.parse_args(argv).runs])))


if __name__ == "__main__":
    main()
