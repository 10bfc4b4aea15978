"""Small tokenizers of every kind that a vocabulary is cut from, trained on a few lines, and texts to try them on."""

import functools
import itertools
import json

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the theory of the other thing: they gathered there, then the weather changed and nothing mattered further",
    "a lowest tower, lower and newest, widest and wider; the newer flower was the lowest of the slow flowers",
    "naïve café déjà vu — señor, größer, 東京都 東京 京都, привет мир, привет всем, 12 123 1234 12345",
    "def function(self, other):\n    return self.value + other.value\n\n    # indented   spaces\t\ttabs",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte_level", "ignore_merges", "byte_fallback", "characters", "unigram", "unigram_characters")

# What the tokenizers know, what they do not, and mixtures: words are where merges happen.
texts = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from(" ".join(LINES).split(" ")), st.sampled_from([" ", "  ", "\n", "▁"])
    ),
    max_size=12,
).map("".join)


def _metaspace(core):
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        LINES * 3,
        trainers.BpeTrainer(
            vocab_size=460,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    late = core.get_vocab_size()
    core.add_special_tokens(["<|late|>"])  # numbers behind all merges, as of Qwen and Llama 3
    core.add_tokens([AddedToken("plain added")])
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A <|late|>", special_tokens=[("<s>", 1), ("<|late|>", late)]),
        ]
    )
    return json.loads(core.to_str())


def _all_splits(pieces):
    """Merges as SentencePiece's files give them: every split of a piece into two, the pieces in their order."""
    known = set(pieces)
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _sentencepiece(*, fallback):
    """BPE over characters; under byte fallback in the layout of Llama 2."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    _metaspace(core)
    words = [word for line in LINES for word in line.replace(" ", " ▁").split(" ")]
    core.pre_tokenizer = None
    core.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=240, show_progress=False))
    _metaspace(core)
    data = json.loads(core.to_str())
    ranked = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    pieces = ["<unk>", "<s>", "</s>", *(BYTES if fallback else []), *(p for p in ranked if len(p) > 1)]
    data["model"]["vocab"] = {piece: i for i, piece in enumerate([*pieces, *(p for p in ranked if len(p) == 1)])}
    data["model"]["merges"] = _all_splits([p for p in ranked if p not in pieces[:3]])
    data["model"] |= {"byte_fallback": fallback, "fuse_unk": True}
    core = Tokenizer.from_str(json.dumps(data))
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(core.to_str())


def _unigram(*, fallback):
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace("\t", " ")
    _metaspace(core)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    core.train_from_iterator([word for line in LINES * 3 for word in (line, *line.split(" "))], trainer)
    data = json.loads(core.to_str())
    if fallback:
        data["model"]["vocab"][3:3] = [[byte, 0.0] for byte in BYTES]
        data["model"]["byte_fallback"] = True
    return data


@functools.cache
def _file(kind):
    if kind == "ignore_merges":
        data = _byte_level()
        data["model"]["ignore_merges"] = True
    elif kind == "byte_level":
        data = _byte_level()
    elif kind in {"byte_fallback", "characters"}:
        data = _sentencepiece(fallback=kind == "byte_fallback")
    else:
        data = _unigram(fallback=kind == "unigram")
    return json.dumps(data)


def tokenizer_file(kind):
    """The parsed tokenizer.json of a kind, to be changed at will."""
    return json.loads(_file(kind))


def opened(data):
    """The tokenizer that a parsed tokenizer.json makes."""
    return Tokenizer.from_str(json.dumps(data))


def pieces(data):
    """Pieces of the model in the order of their numbers."""
    vocab = data["model"]["vocab"]
    return sorted(vocab, key=vocab.get) if isinstance(vocab, dict) else [piece for piece, _ in vocab]


def old_merges(data):
    """The same file with merges written as one string, as before version 0.20 of the library."""
    changed = json.loads(json.dumps(data))
    changed["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    return changed


def size(data):
    """Rows that the tokens of a file take."""
    return 1 + max(itertools.chain(range(len(pieces(data))), (token["id"] for token in data["added_tokens"])))
