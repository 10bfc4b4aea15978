"""A tokenizer as the fields of a GGUF file.

llama.cpp has byte-level BPE (GPT-2's) and SentencePiece-like BPE with byte fallback (Llama 2's). Of the first it must
be told by name how text is split before the merges; the names are those of its ``llama-vocab.cpp``, and what each means
is compared here with what the tokenizer itself says, so that a tokenizer it would read otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adasearch.documents import value
from adasearch.errors import ModelError
from adasearch.tokenization import tokenizer_json

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}]*[\p{{Ll}}{_MARKS}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}]+[\p{{Ll}}{_MARKS}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _WORD % r"\p{N}{1,3}"), ("ByteLevel", False)): "llama-bpe",
    (("Split", _WORD % r"\p{N}"), ("ByteLevel", False)): "qwen2",
    (("Split", _TEKKEN), ("ByteLevel", False)): "tekken",
}
"""Steps before the merges, each with its regular expression or what it does -> the name that llama.cpp has for them."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's kinds of tokens
_PROBE = "a"


@value
class GgufTokenizer:
    """What a GGUF file says of a tokenizer.

    Args:
        model: ``gpt2``, ``llama`` or ``no_vocab``.
        split: how text is split before the merges, empty for ``llama``.
        tokens: by number; rows of the embedding that no token has get names of their own.
        kinds: of each token.
        scores: of each token, empty for ``gpt2``.
        merges: pairs, a space between, the first one first.
        ids: number of the special tokens, by name (bos, eos, unk, pad).
        adds: whether a sequence begins with bos, ends with eos, and whether a text gets a space before it.
        template: of chats, None without one.
    """

    model: str
    split: str = ""
    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    ids: dict[str, int]
    adds: dict[str, bool]
    template: str | None = None


def _refuse(problem: str) -> ModelError:
    return ModelError(f"gguf: llama.cpp must know the tokenizer: {problem}; leave gguf out of the formats")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, sequences taken apart."""
    for child in part.get("pretokenizers", part.get("normalizers", [])) if part else ():
        yield from _steps(child)
    if part and part["type"] != "Sequence":
        yield part


def _split_name(data: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits text before its merges."""
    found: list[tuple[str, Any]] = []
    for step in _steps(data["pre_tokenizer"]):
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            raise _refuse("it puts a space before every text (add_prefix_space)")
        told = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}.get(step["type"], "")
        setting = step.get(told)
        found.append((step["type"], setting.get("Regex") if isinstance(setting, dict) else setting))
    strange = sorted({step["type"] for step in _steps(data.get("normalizer"))} - {"NFC"})
    if strange:
        raise _refuse(f"it normalizes text by {', '.join(strange)}")
    name = _SPLITS.get(tuple(found))
    if name is None:
        known = ", ".join(_SPLITS.values())
        raise _refuse(f"the steps before its merges are {[kind for kind, _ in found]}, which is none of {known}")
    return name


def _pairs(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges, in the order of both spellings of ``tokenizer.json``."""
    given = data["model"].get("merges") or []
    pairs = (x.split(" ") if isinstance(x, str) else x for x in given)
    return [(left, right) for left, right in pairs]


def _kinds(data: dict[str, Any], names: dict[int, str], size: int) -> list[int]:
    added = {token["id"]: _CONTROL if token["special"] else _USER for token in data["added_tokens"]}
    unknown = data["model"].get("unk_token")
    bytes_ = bool(data["model"].get("byte_fallback"))

    def kind(number: int) -> int:
        name = names.get(number)
        if name is None:
            return _UNUSED
        if name == unknown and bytes_:
            return _UNKNOWN
        if number in added:
            return added[number]
        return _BYTE if bytes_ and len(name) == 6 and name.startswith("<0x") else _NORMAL

    return [kind(number) for number in range(size)]


def _scores(names: dict[int, str], pairs: list[tuple[str, str]], size: int) -> tuple[float, ...]:
    """Return scores by which llama.cpp merges in the order of `pairs`: minus the place of the first to make a token."""
    places: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        places.setdefault("".join(pair), place)
    return tuple(-float(places.get(names.get(number, ""), len(pairs))) for number in range(size))


def _puts_space(data: dict[str, Any]) -> bool:
    """Return whether a text gets a space before it."""
    if any(step["type"] == "Prepend" for step in _steps(data.get("normalizer"))):
        return True
    return any(step.get("prepend_scheme") in {"first", "always"} for step in _steps(data.get("pre_tokenizer")))


def _adds(tokenizer: Any) -> dict[str, bool]:
    ids = list(tokenizer(_PROBE).input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {"bos": bos is not None and ids[0] == bos, "eos": len(ids) > 1 and eos is not None and ids[-1] == eos}


def _template(tokenizer: Any) -> str | None:
    given = getattr(tokenizer, "chat_template", None)
    return given.get("default") if isinstance(given, dict) else given


def gguf_tokenizer(tokenizer: Any, size: int) -> GgufTokenizer:
    """Return a tokenizer of transformers as GGUF holds it.

    Args:
        tokenizer: a fast one; None for a model without one.
        size: rows of the embedding.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    if tokenizer is None:
        return GgufTokenizer(model="no_vocab", ids={}, adds={})
    data = tokenizer_json(tokenizer)
    if data["model"]["type"] != "BPE":
        raise _refuse(f"it is of the kind {data['model']['type']}, must be BPE")
    by_name = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data["added_tokens"]}}
    names = {number: name for name, number in by_name.items()}
    if max(names) >= size:
        raise _refuse(f"it has tokens up to number {max(names)}, the embedding has {size} rows")
    pairs, adds = _pairs(data), _adds(tokenizer)
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    common: dict[str, Any] = {
        "tokens": tuple(names.get(number, f"[UNUSED{number}]") for number in range(size)),
        "kinds": tuple(_kinds(data, names, size)),
        "ids": {name: number for name, number in named.items() if number is not None},
        "template": _template(tokenizer),
    }
    if data["model"].get("byte_fallback"):
        adds["space_prefix"] = _puts_space(data)
        return GgufTokenizer(model="llama", scores=_scores(names, pairs, size), adds=adds, **common)
    merges = tuple(" ".join(pair) for pair in pairs)
    return GgufTokenizer(model="gpt2", split=_split_name(data), merges=merges, adds=adds, **common)
