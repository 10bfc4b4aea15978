"""Conversations: instruction data read from the rows of a data set, and written in the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from adasearch.documents import value
from adasearch.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = "instruction + output, messages, conversations, or prompt + completion"
"""Columns that make a row a conversation, for messages."""
ANSWERER = "assistant"
_DATE = "26 Jul 2024"
"""What templates that state a date are told (Llama 3's own where it has no clock): a text is the same on every day."""
_ROLES = {"human": "user", "gpt": ANSWERER}  # as ShareGPT calls them


class Turn(NamedTuple):
    """What one side of a conversation says; `role` is ``system``, ``user``, ``assistant`` or another."""

    role: str
    text: str


@value
class Conversation:
    """One row of instruction data: its turns, and the same as plain text, which decides the part that it falls in."""

    turns: tuple[Turn, ...]
    text: str


class Written(NamedTuple):
    """A document as tokens: their ids, and whether each belongs to an answer; None where all of it counts alike."""

    ids: list[int]
    answers: list[bool] | None = None


def _titled(parts: Sequence[tuple[str, Any]]) -> str:
    return "\n\n".join(f"### {title}:\n{text}" for title, text in parts if text)


def _turns(messages: Sequence[Any], role: str, content: str, name: str) -> Conversation:
    """Return the conversation of a list of messages whose keys are `role` and `content`."""
    turns = []
    for message in messages:
        given = message if isinstance(message, Mapping) else {}
        who, what = given.get(role), given.get(content)
        if not isinstance(who, str) or not isinstance(what, str):
            raise DataError(f"corpus {name!r}: each message must have the texts {role} and {content}, not {message}")
        turns.append(Turn(_ROLES.get(who, who), what))
    return _talk(turns)


def _talk(turns: Sequence[Turn]) -> Conversation:
    """Return turns as a conversation whose plain text names who speaks."""
    return Conversation(turns=tuple(turns), text=_titled([(turn.role.capitalize(), turn.text) for turn in turns]))


def conversation(row: Mapping[str, Any], name: str) -> Conversation | None:
    """Return the conversation that a row of a data set holds, None for a row of plain text.

    The columns may be those of Alpaca (`instruction`, `input`, `output`), `messages` of role and content,
    `conversations` of from and value (ShareGPT), or `prompt` and `completion`.

    Args:
        row: of a data set.
        name: of its corpus, for messages.

    Raises:
        DataError: a message without role or text.
    """
    if "instruction" in row and "output" in row:
        asked, given, answer = row["instruction"], row.get("input"), row["output"]
        text = _titled((("Instruction", asked), ("Input", given), ("Response", answer)))
        question = "\n\n".join(str(part) for part in (asked, given) if part)
        return Conversation(turns=(Turn("user", question), Turn(ANSWERER, str(answer or ""))), text=text)
    if isinstance(row.get("messages"), list):
        return _turns(row["messages"], "role", "content", name)
    if isinstance(row.get("conversations"), list):
        return _turns(row["conversations"], "from", "value", name)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return _talk((Turn("user", row["prompt"]), Turn(ANSWERER, row["completion"])))
    return None


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a tokenizer can write conversations.

    Raises:
        DataError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        advice = "name the corpus without chat/, as plain text, or take an instruction-tuned model"
        raise DataError(f"corpus {name!r} needs a chat template, and the model's tokenizer has none: {advice}")


def _pieces(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], name: str) -> list[tuple[str, bool]] | None:
    """Return the text of a conversation in pieces, and which of them are answers.

    An answer is what the template adds to the conversation before it, opened for an answer: what the model would have
    to say. None where a template writes the beginning of a conversation otherwise once it goes on.
    """
    from jinja2 import TemplateError  # what templates are written in

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]

    def text(count: int, *, opened: bool = False) -> str:
        if not count:
            return ""
        written = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=opened, date_string=_DATE
        )
        return str(written)

    done, pieces = "", list[tuple[str, bool]]()
    try:
        for index in (i for i, turn in enumerate(turns) if turn.role == ANSWERER):
            before, after = text(index, opened=True), text(index + 1)
            if not (before.startswith(done) and after.startswith(before)):
                return None
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        whole = text(len(turns))
    except TemplateError as error:
        raise DataError(f"corpus {name!r}: the model's chat template refuses a conversation: {error}") from error
    return [*pieces, (whole[len(done) :], False)] if whole.startswith(done) else None


def write(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], name: str) -> Written:
    """Return the tokens of a conversation in the tokenizer's chat template, and which belong to its answers.

    Answers are tokenised apart from what stands before them, as in use, where the model adds its tokens to a prompt.

    Raises:
        DataError: the template refuses the conversation, or writes it so that answers cannot be told from the rest.
    """
    pieces = _pieces(tokenizer, turns, name)
    if pieces is None:
        problem = "the model's chat template rewrites earlier turns, so answers cannot be told"
        raise DataError(f"corpus {name!r}: {problem}; name it without chat/, or one whose rows have a single answer")
    ids, answers = list[int](), list[bool]()
    for text, answer in pieces:
        found = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        ids += found
        answers += [answer] * len(found)
    return Written(ids, answers)
