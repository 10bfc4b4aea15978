"""Recoveries beside each other at equal cost: the same cut, the same text, the same processor seconds.

    python -m benchmarks.recoveries --seconds 600 --remove 0.2 --out runs/recoveries
    python -m benchmarks.recoveries --seconds 60 --only lora,full --items 24

Each strategy of `recoveries.yaml` is tried for some steps on one thread; its seconds per token, of the processor, so
that other work on the machine does not count, say how many tokens it trains on in `--seconds`. Then comes one
`adasearch compare` of all of them, in a folder below `--out`; the same command goes on where it was. Out come score on
report items, what of it is above chance, perplexity, and the paired difference from the first strategy. Strategies may
join later: what was measured and made before stands.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from adasearch import comparison, registry
from adasearch.config import SpaceConfig, StudyConfig, TrialConfig, load_study, merged
from adasearch.documents import plain
from adasearch.errors import AdaSearchError
from adasearch.library import load_recipe
from adasearch.report import difference
from adasearch.run import load_run

STRATEGIES = Path(__file__).with_suffix(".yaml")
Overlay = dict[str, Any]
STEPS = 6
"""Of a run that is timed."""
TRAINED = {"hidden": registry.HIDDEN, "schedule": registry.SCHEDULE, "recovery": registry.RECOVERY}
"""Sections of a trial that may train: those do whose settings hold `tokens`."""
Laid = Callable[[int | None], Overlay]
"""A strategy: the sections of its trial, given the tokens."""


def study_of(args: argparse.Namespace) -> tuple[StudyConfig, Overlay]:
    """Return the study of the comparison, the file's with this cut and these amounts, and the text of a recovery."""
    study = load_study(args.study)
    text: Overlay = {"length": args.length, "batch": args.batch}
    if args.corpora:
        text["corpus"] = {"mix": [{"corpus": name, "weight": 1.0} for name in args.corpora.split(",")]}
    made = dataclasses.replace(
        study,
        name=f"recoveries-{round(100 * args.remove):02d}-{round(args.seconds)}",
        # nothing is searched, and a space of the study may ask for a recovery
        space=SpaceConfig(name="inline", dimensions={"importance": {"choice": ["random", "wanda_sp"]}}),
        budget=dataclasses.replace(study.budget, remove=args.remove),
        trial={**study.trial, "recovery": {"type": "none"}},
        report=dataclasses.replace(study.report, items=args.items, perplexity_tokens=args.perplexity_tokens),
        recipes={},
        all_recipes=False,
        cluster=dataclasses.replace(study.cluster, workers=args.workers, threads=1),
    )
    return made, text


def options_of(key: str, part: Overlay) -> type:
    """Return the settings that a section of a strategy has."""
    return TRAINED[key].get(part["type"]).options


def laid(recipe: Overlay, text: Overlay, strategy: Overlay, tokens: int | None) -> Overlay:
    """Return the sections of one strategy: the recipe of the cut, the strategy over it, the text where it trains.

    One that learns what goes has a `schedule` or `hidden` of its own, which trains on as many tokens as the recovery.
    """
    given = {**text, **({} if tokens is None else {"tokens": tokens})}
    trained = [key for key in TRAINED if key in strategy and hasattr(options_of(key, strategy[key]), "tokens")]
    own = {key: {**given, **strategy[key]} for key in trained}
    return {**merged(recipe, {**strategy, **own}), "recovery": own.get("recovery", strategy["recovery"])}


def seconds_per_token(make: Callable[[int], TrialConfig], size: int, bench: Any) -> float:
    """Return the processor seconds that a strategy takes for each token of its trainings.

    Args:
        make: gives its trial for a number of tokens.
        size: tokens of a step.
        bench: that runs it; statistics that it keeps are no part of the cost.
    """
    few = make(STEPS * size)
    prune_seconds(few, bench)
    learning = prune_seconds(make(2 * STEPS * size), bench) - prune_seconds(few, bench)
    learns = any(hasattr(part.options, "tokens") for part in (few.hidden, few.schedule))
    learnt = learning / (STEPS * size) if learns else 0.0
    return learnt + recover_seconds(few, bench)


def prune_seconds(config: TrialConfig, bench: Any) -> float:
    """Return the processor seconds until a trial is cut."""
    from adasearch.trial import Clock, prune

    begun = time.process_time()
    prune(config, bench, Clock(lambda *_: None))
    return time.process_time() - begun


def recover_seconds(config: TrialConfig, bench: Any) -> float:
    """Return the processor seconds of a trial's recovery for each token, from the second step on."""
    from adasearch.conduct import Conduct
    from adasearch.trial import Clock, prune, recover

    marks: list[float] = []

    def look(*_: object) -> None:
        marks.append(time.process_time())

    clock = Clock(lambda *_: None)
    recover(prune(config, bench, clock), config.recovery, config, bench, clock, Conduct(look=look))
    options = config.recovery.options
    return (marks[-1] - marks[0]) / (len(marks) - 1) / (options.batch * options.length)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What is measured before the comparison, and kept for one that goes on.

    Args:
        tokens: that each strategy trains on; None for none.
        chance: accuracy of guessing, mean over the report tasks.
    """

    tokens: dict[str, int | None]
    chance: float


def measured(args: argparse.Namespace, study: StudyConfig, strategies: Mapping[str, Laid]) -> Amounts:
    """Return the tokens that each strategy trains on in the seconds that all have, and the accuracy of guessing."""
    from adasearch.workbench import Workbench
    from benchmarks.setting import empty_run

    tokens: dict[str, int | None] = {}
    with empty_run() as folder:
        bench = Workbench(study, folder, 1)
        bench.dense()
        guesses = [np.mean([1 / len(item.choices) for item in t.items]) for t in bench.items("report").values()]
        for name, strategy in strategies.items():
            if strategy(1)["recovery"]["type"] == "none":
                tokens[name] = None
                continue

            def make(tokens: int, name: str = name, strategy: Laid = strategy) -> TrialConfig:
                return TrialConfig.from_dict({**merged(study.trial, strategy(tokens)), "seed": study.seed}, name)

            size = args.batch * args.length
            cost = seconds_per_token(make, size, bench)
            tokens[name] = max(size, round(args.seconds / cost))
            print(f"{name}: {1 / cost:.0f} tokens per processor second, {tokens[name]} tokens", flush=True)
    return Amounts(tokens=tokens, chance=float(np.mean(guesses)))


def amounts(args: argparse.Namespace, study: StudyConfig, strategies: Mapping[str, Laid]) -> Amounts:
    """Return what was measured of these strategies before, the rest measured now and written down beside it."""
    path = args.out / f"{study.name}-amounts.yaml"
    known = yaml.safe_load(path.read_text(encoding="utf-8"))["tokens"] if path.exists() else {}
    fresh = {name: strategy for name, strategy in strategies.items() if name not in known}
    if fresh:
        found = measured(args, study, fresh)
        every = dataclasses.replace(found, tokens={**known, **found.tokens})
        path.write_text(yaml.safe_dump(dataclasses.asdict(every), sort_keys=False), encoding="utf-8")
    kept = Amounts(**yaml.safe_load(path.read_text(encoding="utf-8")))
    return dataclasses.replace(kept, tokens={name: kept.tokens[name] for name in strategies})


def compare(args: argparse.Namespace) -> tuple[Path, Amounts]:
    """Make the comparison, as far as it is not made yet, and return its run folder."""
    from adasearch.run import compare_study

    study, text = study_of(args)
    recipe = load_recipe(args.recipe, args.study, "--recipe")
    given = yaml.safe_load(STRATEGIES.read_text(encoding="utf-8"))
    names = args.only.split(",") if args.only else list(given)
    strategies = {name: functools.partial(laid, recipe, text, given[name]) for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    found = amounts(args, study, strategies)
    recipes = {name: strategy(found.tokens[name]) for name, strategy in strategies.items()}
    path = args.out / f"{study.name}.yaml"
    written = plain(dataclasses.replace(study, recipes=recipes).to_dict())
    path.write_text(yaml.safe_dump(written, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return compare_study(path, recipes=names, out=args.out / study.name, say=print), found


def _perplexities(row: comparison.Row) -> list[float]:
    return list(row.final.perplexity.values()) if row.final else [math.inf]


def table(run: Path, found: comparison.Comparison, amounts: Amounts) -> Iterator[str]:
    """Yield the lines of a table in Markdown: strategies by perplexity, the dense model first."""
    rows = [found.dense, *sorted(found.rows, key=lambda row: _perplexities(row)[:1])]
    heads = ["strategy", "tokens", "seconds", "score", "retained", "above chance", *found.corpora, "less the first"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    first = next((row for row in rows if row.name == next(iter(amounts.tokens))), None)
    for row in rows:
        if row.final is None:
            yield f"| {row.name} | {row.reason} |"
            continue
        gap = difference(run, row.final, first.final if first else None, found.study.seed)
        score, dense = row.score[0], found.dense.score[0]
        chance = amounts.chance
        cells = [
            row.name,
            "-" if amounts.tokens.get(row.name) is None else f"{amounts.tokens[row.name]:,}",
            f"{row.final.seconds.get('recover', 0.0):.0f}",
            f"{100 * score:.1f}",
            f"{100 * score / dense:.1f} %",
            f"{100 * (score - chance) / (dense - chance):.0f} %",
            *(f"{value:.1f}" for value in _perplexities(row)),
            f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})" if gap else "-",
        ]
        yield f"| {' | '.join(cells)} |"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--study", type=Path, default=Path("studies/smollm2_20.yaml"), help="model, calibration and tasks come from it")
    add("--recipe", default="slimllm", help="of the cut (default: slimllm)")
    add("--remove", type=float, default=0.2, help="fraction of the parameters removed (default: 0.2)")
    add("--seconds", type=float, default=600.0, help="of the processor, for each recovery (default: 600)")
    add("--only", help="strategies, a comma between them (default: all)")
    add(
        "--corpora",
        help="that are trained on, a comma between them, in equal shares (default: that of the calibration)",
    )
    add("--length", type=int, default=128, help="tokens of a sequence (default: 128)")
    add("--batch", type=int, default=8, help="sequences of a step (default: 8)")
    add("--items", type=int, default=32, help="report items of each task (default: 32)")
    add("--perplexity-tokens", type=int, default=8192, help="of each corpus (default: 8192)")
    add("--workers", type=int, default=2, help="of the comparison, one thread each (default: 2)")
    add("--out", type=Path, default=Path("runs/recoveries"), help="folder of the comparisons")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        run, found = compare(args)
    except AdaSearchError as error:
        raise SystemExit(f"{error}") from error
    print("\n".join(table(run, comparison.gather(run, load_run(run)), found)))


if __name__ == "__main__":
    main()
