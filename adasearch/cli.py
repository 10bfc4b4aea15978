"""The command line: each command reads a file and calls one function. Every experimental knob lives in YAML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.errors import AdaSearchError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130
PRUNE_OPTIONS = {
    "remove": (0.2, "fraction of all parameters that goes"),
    "corpus": ("pydoc", "calibration and recovery read one part of it, perplexity another"),
    "samples": (32, "calibration sequences of 128 tokens"),
    "tokens": (0, "tokens of LoRA recovery after the cut, 0 for none"),
    "seed": (0, "of all that is drawn"),
}
"""Options of `adasearch prune` beside model, recipe and folder: default and help, as in `adasearch.single.Order`."""


def _say(text: str = "") -> None:
    print(text, flush=True)


def _run(args: argparse.Namespace) -> None:
    from adasearch.run import run_study

    run_study(Path(args.study), out=Path(args.out) if args.out else None, say=_say)


def _compare(args: argparse.Namespace) -> None:
    from adasearch.run import compare_study

    names = None if args.recipes is None else [name.strip() for name in args.recipes.split(",") if name.strip()]
    compare_study(Path(args.study), recipes=names, out=Path(args.out) if args.out else None, say=_say)


def _prune(args: argparse.Namespace) -> None:
    from adasearch.documents import parse
    from adasearch.single import Order, prune_model

    given = {name: getattr(args, name) for name in ("model", "recipe", *PRUNE_OPTIONS)}
    prune_model(parse(Order, given, "prune:"), Path(args.out) if args.out else None, _say)


def _validate(args: argparse.Namespace) -> None:
    from adasearch.checks import check_study
    from adasearch.config import load_study
    from adasearch.describe import describe_study

    study = load_study(Path(args.study))
    for line in describe_study(study, check_study(study, f"{args.study}:")):
        _say(line)


def _status(args: argparse.Namespace) -> None:
    from adasearch.run import status

    for line in status(Path(args.run)):
        _say(line)


def _report(args: argparse.Namespace) -> None:
    from adasearch.run import write_report

    _say(f"wrote {write_report(Path(args.run))}")


def _dashboard(args: argparse.Namespace) -> None:
    from adasearch.dashboard import serve

    serve(Path(args.run), port=args.port, snapshot=args.snapshot, say=_say)


def _verify(args: argparse.Namespace) -> None:
    from adasearch.loading import verify

    report = verify(Path(args.export))
    for line in report.lines():
        _say(line)
    report.require()


def _replay(args: argparse.Namespace) -> None:
    from adasearch.run import replay

    for line in replay(Path(args.run), args.trial):
        _say(line)


def _rebuild(args: argparse.Namespace) -> None:
    from adasearch.run import rebuild

    _say(rebuild(Path(args.run)))


def _doctor(_args: argparse.Namespace) -> None:
    from adasearch.checks import doctor

    for line in doctor():
        _say(line)


def _add_prune(commands: Any) -> None:
    prune = commands.add_parser(
        "prune",
        help="one recipe on one model, without a search: an exported, verified model",
        epilog="A recipe that fixes its own calibration or recovery keeps it.",
    )
    prune.add_argument("model", help="hub id, folder, file.gguf or package:name")
    prune.add_argument("--recipe", required=True, help="name in search_spaces/recipes, or a path ending in .yaml")
    prune.add_argument("--out", help="folder to make (default: runs/<model>-<recipe>-<remove>)")
    for name, (default, text) in PRUNE_OPTIONS.items():
        prune.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    prune.set_defaults(do=_prune)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="adasearch",
        description="Find the smallest language model that still does your work: search over structured-pruning "
        "configurations, recover, score, fine-tune the best, export.",
        epilog="exit codes: 0 done, 2 configuration, 3 data or model, 4 storage, 5 no trial succeeded, 130 interrupted",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="search, fine-tune and export the best, write the report; goes on where it was"
    )
    run.add_argument("study", help="study file, such as studies/quickstart.yaml")
    run.add_argument("--out", help="run folder (default: runs/<study name>)")
    run.set_defaults(do=_run)

    compare = commands.add_parser("compare", help="every published recipe on one model and budget: a leaderboard")
    compare.add_argument("study", help="study file: model, budget, calibration, recovery and report items come from it")
    compare.add_argument(
        "--recipes", help="names, a comma between them (default: all in search_spaces/recipes and those of the study)"
    )
    compare.add_argument("--out", help="run folder (default: runs/<study name>-compare)")
    compare.set_defaults(do=_compare)
    _add_prune(commands)

    validate = commands.add_parser("validate", help="what would run, and what is wrong with it; loads no weights")
    validate.add_argument("study", help="study file")
    validate.set_defaults(do=_validate)

    one_run = {
        "status": (_status, "trials done, running, stopped and failed, and the best so far; or the leaderboard"),
        "report": (_report, "write leaderboard.csv and report.html again"),
        "rebuild": (_rebuild, "make study.db again from the trial records"),
    }
    for name, (do, text) in one_run.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("run", help="run folder, such as runs/quickstart")
        command.set_defaults(do=do)

    dashboard = commands.add_parser("dashboard", help="open the study in Optuna dashboard, on this machine only")
    dashboard.add_argument("run", help="run folder")
    dashboard.add_argument("--port", type=int, default=8080, help="port on 127.0.0.1 (default: 8080)")
    dashboard.add_argument("--snapshot", action="store_true", help="serve a copy, so that nothing can be changed")
    dashboard.set_defaults(do=_dashboard)

    verify = commands.add_parser(
        "verify", help="check an exported model: files, shapes, parameters, logits, generation"
    )
    verify.add_argument("export", help="folder of an exported model")
    verify.set_defaults(do=_verify)

    replay = commands.add_parser("replay", help="run one recorded trial again and compare its score")
    replay.add_argument("run", help="run folder")
    replay.add_argument("--trial", type=int, required=True, help="number of the trial")
    replay.set_defaults(do=_replay)

    doctor = commands.add_parser("doctor", help="versions, devices, memory and disk of this machine")
    doctor.set_defaults(do=_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.do(args)
    except AdaSearchError as error:
        print(f"adasearch: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("adasearch: interrupted; nothing finished is lost, the same command takes it up", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
