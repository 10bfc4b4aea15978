"""A tokenizer as data and back, and the token numbers that configs name: what a smaller vocabulary changes.

Only tokenizers of the `tokenizers` library (transformers' fast ones) hold all they do in one ``tokenizer.json``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from adasearch.checkpoints import ModelSource

# What a tokenizer was made from, and would be made from again in place of its tokenizer.json.
_SOURCES = (
    "vocab",
    "merges",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "tokenizer_object",
    "added_tokens_decoder",
)
_LISTS = frozenset({"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"})


def read_tokenizer(source: ModelSource) -> Any:
    """Return the tokenizer of a model that is not fetched yet.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoTokenizer

    path = Path(source.path)
    place = {"hub": source.name, "gguf": str(path.parent)}.get(source.kind, source.path)
    told = {"gguf_file": path.name} if source.kind == "gguf" else {"revision": source.revision}
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **told)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {source.name!r} cannot be read: {error}") from error


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what the tokenizer's ``tokenizer.json`` holds, parsed.

    Raises:
        ModelError: it is a tokenizer written in Python, which has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer must be a fast one to change its vocabulary (with a tokenizer.json), given "
            f"{type(tokenizer).__name__}; convert it or leave the vocabulary whole"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    return data


def with_tokenizer_json(tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> Any:
    """Return a tokenizer like `tokenizer` (class, special tokens, template, sides, length) that does what `data` says.

    Saved, it writes the new ``tokenizer.json`` and no file of the vocabulary that it came from.

    Args:
        tokenizer: a fast one; it is not changed.
        data: a parsed ``tokenizer.json``.

    Raises:
        ModelError: `tokenizer` is no fast one, or the library numbers the tokens of `data` otherwise.
    """
    tokenizer_json(tokenizer)
    old: Any = tokenizer
    backend = type(old.backend_tokenizer).from_str(json.dumps(data))
    for token in data["added_tokens"]:  # the library gives its own numbers to tokens that are no pieces of the model
        if backend.token_to_id(token["content"]) != token["id"]:
            given = backend.token_to_id(token["content"])
            raise ModelError(f"the token {token['content']!r} must have number {token['id']}, would have {given}")
    made = copy.deepcopy(old, {id(old.backend_tokenizer): backend})  # in the old one's place
    for key in _SOURCES:
        made.init_kwargs.pop(key, None)
        for name in (key, f"_{key}"):
            vars(made).pop(name, None)
    return made


def named_ids(data: Mapping[str, Any]) -> frozenset[int]:
    """Return the token numbers that a config or generation config names, as a dict: bos, eos, pad and their like.

    Negative numbers and None name no token.
    """
    return frozenset(i for key, given in data.items() if _names(key) for i in _flat(given))


def _names(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in _LISTS


def _flat(given: Any) -> list[int]:
    if isinstance(given, list | tuple):
        return [i for child in given for i in _flat(child)]
    return [given] if isinstance(given, int) and given >= 0 else []


def remapped_ids(data: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return a config or generation config, as a dict, with the new number of every token that it names.

    Raises:
        ModelError: a token that it names is not kept.
    """
    lost = sorted(named_ids(data) - new_ids.keys())
    if lost:
        raise ModelError(f"token {lost[0]} must stay: the config names it ({len(lost)} in all)")

    def renumbered(given: Any) -> Any:
        if isinstance(given, list | tuple):
            return [renumbered(child) for child in given]
        return new_ids[given] if isinstance(given, int) and given >= 0 else given

    return {key: renumbered(given) if _names(key) else given for key, given in data.items()}


def config_with_vocabulary(config: PretrainedConfig, new_ids: Mapping[int, int], size: int) -> Any:
    """Return a copy of a model's config for `size` rows of the embedding, its tokens renumbered.

    Raises:
        ModelError: a token that the config names is not kept.
    """
    made = copy.deepcopy(config)
    named = {key: given for key, given in config.to_dict().items() if _names(key)}
    for key, given in remapped_ids(named, new_ids).items():
        setattr(made, key, given)
    made.vocab_size = size
    return made
