"""A real tokenizer trained in memory, small models that go with it, and the real data where a checkout has them."""

import functools
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from adasearch.data import documents
from tests import tiny

SPECIAL = ["<pad>", "<bos>", "<eos>"]


@functools.cache
def tokenizer(bos=False, vocabulary=600):
    """BPE with merges that cross the border of context and choice; `bos` puts a token before every text."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(documents("pydoc", "fit")[:120], trainer)
    if bos:
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@functools.cache
def model(family="llama", length=512, seed=0, **changes):
    """Model with random weights large enough that its preferences differ; attention by sdpa, in eval mode.

    Not larger: lm-eval sums in float32, whose spacing is 6e-5 where a choice has a log-likelihood below -512.
    """
    torch.manual_seed(seed)
    config = tiny.tiny_config(family, vocab_size=600, max_position_embeddings=length, **changes)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.15)
    return made


def data_root():
    """Return the folder of mirrored dataset repositories, skipping the test where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "hub"
    root = Path(os.environ.get("ADASEARCH_DATA_ROOT") or beside)
    if not (root / "baber" / "piqa").is_dir():
        pytest.skip("real task data are not here: set ADASEARCH_DATA_ROOT to a folder of mirrored dataset repositories")
    return str(root)
