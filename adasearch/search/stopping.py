"""When a search ends before its trials are done, and in which words. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from adasearch.documents import Index, value
from adasearch.records import Record
from adasearch.sections import StoppingConfig


@value
class Ended:
    """A decision to ask for no more trials, as ``stopped.json`` in the run folder holds it.

    Args:
        reason: in words.
        asked: trials that there were; they are all finished.
        trials: how many the study was to have.
        rule: by which it was decided.
        lifted: it no longer stands, because one of the last two has changed since; `asked` says since when.
    """

    reason: str
    asked: Index
    trials: Index
    rule: StoppingConfig
    lifted: bool = False

    def stands(self, rule: StoppingConfig, trials: int) -> bool:
        """Return whether it holds for a study with this rule and so many trials."""
        return not self.lifted and self.rule == rule and self.trials == trials


def spent(records: Sequence[Record]) -> float:
    """Return the seconds of all trials that ran to a score; one that took its result from another has cost nothing."""
    results = [r.result for r in records if r.result is not None and not r.result.twin]
    return sum(sum(result.seconds.values()) for result in results)


def reason(rule: StoppingConfig, seconds: float, cost: float, gains: Sequence[float | None]) -> str | None:
    """Return why a search ends before it asks for another trial, None where it goes on.

    Args:
        rule: of the study.
        seconds: of the search, over all of its drivers.
        cost: seconds of its trials, over all workers.
        gains: expected gain of each proposal in its order, that of the next one last, in standard errors of the best
            trial's score; None where it could not be told, which ends a row.
    """
    if rule.seconds is not None and seconds >= rule.seconds:
        return f"{seconds:.0f} s of {rule.seconds:g} s are over"
    if rule.cost is not None and cost >= rule.cost:
        return f"trials took {cost:.0f} s of {rule.cost:g} s"
    if rule.gain is None or len(gains) < rule.patience:
        return None
    row = [gain for gain in gains[-rule.patience :] if gain is not None and gain < rule.gain]
    if len(row) < rule.patience:
        return None
    many = f"{rule.patience} proposals" if rule.patience > 1 else "a proposal"
    return f"expected gain {row[-1]:.2g} is below {rule.gain:g} standard errors, as for {many} in a row"


def summary(ended: Ended | None, trials: int) -> str:
    """Return how a search of so many trials ended, in one sentence."""
    if ended is None:
        return f"the search ran all {trials} trials"
    return f"the search ended after {ended.asked} of {ended.trials} trials: {ended.reason}"
