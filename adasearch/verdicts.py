"""What the cards of a run's exports say of how their models do beside others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adasearch import report
from adasearch.config import StudyConfig
from adasearch.records import FinalRecord
from adasearch.speed import exports_of
from adasearch.tuning.export._card import verdict_lines
from adasearch.tuning.export._folder import amend_card


def pronounce(study: StudyConfig, run: Path, ranked: Iterable[FinalRecord]) -> None:
    """Write into the cards of exports how their models do beside the dense one and the best published recipe."""
    found = report.gather(run, study)
    others = [(found.dense, "the dense model")]
    if found.recipe is not None:
        others.append((found.recipe, f"the best published recipe, {found.recipe.recipe}, after the same recovery"))
    for record in ranked:
        gaps = [(report.difference(run, record, other, study.seed), name) for other, name in others]
        lines = [f"Against {name}: **{gap.outcome}** ({gap.span})." for gap, name in gaps if gap is not None]
        for folder in exports_of(run, record).values() if lines else ():
            amend_card(folder, verdict_lines(lines))
