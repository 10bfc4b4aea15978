"""Ask a module of ours something in an interpreter of its own: a model opened as a user opens it, memory of its own.

A module that is asked writes `answer` to its standard output, under ``if __name__ == "__main__"``; `respond` does that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adasearch.documents import plain
from adasearch.errors import AdaSearchError, ModelError

ANSWER = "adasearch-answer:"
_SECONDS = 3600


def ask(module: str, arguments: list[str], *, env: Mapping[str, str] | None = None) -> Any:
    """Return what `module` answers to `arguments` in a new interpreter, which is told to stay off the network.

    Args:
        module: dotted name.
        arguments: of its `respond`.
        env: variables beside those of this process.

    Raises:
        ModelError: what went wrong there, or that it gave no answer in an hour.
    """
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as modules:
        told = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": modules, **(env or {})}
        told["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", module, *arguments]
        try:
            done = subprocess.run(
                command, env={**os.environ, **told}, capture_output=True, text=True, check=False, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ModelError(f"a fresh process took more than {_SECONDS} seconds") from None
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        said = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()[-1:]]
        raise ModelError(f"a fresh process gave no answer: {': '.join(said)}")
    answer = json.loads(answers[-1])
    if isinstance(answer, dict) and set(answer) == {"error"}:
        raise ModelError(answer["error"])
    return answer


def respond(make: Callable[[], Any]) -> None:
    """Write what `make` returns as the answer of this process, or the error of ours that it raises."""
    try:
        answer = plain(make())
    except AdaSearchError as error:
        answer = {"error": str(error)}
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")
