"""The command line: each command reads a file and calls one function. Every experimental knob lives in YAML."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from adasearch.errors import AdaSearchError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130


def _say(text: str = "") -> None:
    print(text, flush=True)


def _run(args: argparse.Namespace) -> None:
    from adasearch.run import run_study

    run_study(Path(args.study), out=Path(args.out) if args.out else None, say=_say)


def _validate(args: argparse.Namespace) -> None:
    from adasearch.checks import check_study, describe_study
    from adasearch.config import load_study

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

    validate = commands.add_parser("validate", help="what would run, and what is wrong with it; loads no weights")
    validate.add_argument("study", help="study file")
    validate.set_defaults(do=_validate)

    one_run = {
        "status": (_status, "trials done, running, stopped and failed, and the best so far"),
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
        print("adasearch: interrupted; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
