"""llama.cpp itself, by the package xllamacpp where it is installed (it brings llama.cpp compiled), on the CPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adasearch.errors import ModelError
from adasearch.loading import GGUF


def installed() -> bool:
    """Return whether llama.cpp can be asked."""
    return find_spec("xllamacpp") is not None


class Runner:
    """One GGUF file opened by llama.cpp, for one sequence at a time.

    Args:
        folder: that the file lies in.
        threads: of reading and of writing.
        context: tokens that prompt and answer may take together.

    Raises:
        ModelError: llama.cpp does not open the file.
    """

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        import xllamacpp  # type: ignore[import-not-found,unused-ignore]

        params = xllamacpp.CommonParams()
        params.model.path = str(folder / GGUF)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{folder / GGUF}: llama.cpp does not open it: {error}") from error

    def complete(self, prompt: str | list[int], tokens: int, **asked: Any) -> dict[str, Any]:
        """Return llama.cpp's answer to a prompt (text or token numbers), the likeliest token each time.

        Raises:
            ModelError: it gives none.
        """
        wanted = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "cache_prompt": False, **asked}
        told: dict[str, Any] = self._server.handle_completions(wanted)
        if "choices" not in told:
            raise ModelError(f"llama.cpp gives no answer: {told.get('message', told)}")
        return told

    def seconds(self, prompt: list[int], written: int) -> tuple[float, float]:
        """Return the seconds of reading a prompt, and of writing `written` tokens one by one after its first."""
        # the first token that is written comes of the prompt
        times = self.complete(prompt, written + 1, ignore_eos=True)["timings"]
        if times["prompt_n"] != len(prompt) or times["predicted_n"] != written + 1:
            raise ModelError(f"llama.cpp read and wrote other numbers of tokens than it was asked to: {times}")
        return times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
