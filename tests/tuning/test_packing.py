"""Several documents in one sequence: each must be read and trained on as if it were alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.errors import ConfigError, TrialError
from adasearch.streams import Marks
from adasearch.tuning import decoder
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.training import Lesson, TrainingConfig, batches, next_token_loss, sequences
from tests import tiny
from tests.tuning.test_decoder import cut_model
from tests.tuning.test_recovery import BATCH, LENGTH, options, recover, stream
from tests.tuning.test_recovery import cut_model as recovering_model

LENGTHS = ((7, 2, 9), (12, 5), (1, 16))  # of the documents of each sequence; what lacks to 18 is filled up
ROW = 18


@pytest.fixture(params=[True, False], ids=["plain", "fused"])
def short(request, monkeypatch):
    monkeypatch.setattr(decoder, "_PLAIN_LENGTH", 256 if request.param else 0)


def documents():
    generator = torch.Generator().manual_seed(4)
    return [[torch.randint(3, tiny.VOCABULARY, (n,), generator=generator) for n in row] for row in LENGTHS]


def packed(counts=lambda ids: torch.ones_like(ids, dtype=torch.bool)):
    rows, segments, counted = [], [], []
    for row in documents():
        fill = torch.full((ROW - sum(map(len, row)),), 2)
        rows.append(torch.cat([*row, fill]))
        segments.append(torch.cat([torch.full((len(ids),), i) for i, ids in enumerate([*row, fill])]))
        counted.append(torch.cat([*(counts(ids) for ids in row), torch.zeros(len(fill), dtype=torch.bool)]))
    return torch.stack(rows), Marks(segments=torch.stack(segments), counted=torch.stack(counted))


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3))
def test_positions_start_again_in_every_document(rows):
    longest = max(map(sum, rows))
    segments = [[i for i, n in enumerate([*row, longest - sum(row)]) for _ in range(n)] for row in rows]
    expected = [[p for n in [*row, longest - sum(row)] for p in range(n)] for row in rows]
    assert decoder.restarted(torch.tensor(segments)).tolist() == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_states_are_those_of_each_document_alone(family, short):
    model = cut_model(family)
    ids, marks = packed()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = decoder.hidden_states(model, ids, segments=marks.segments)
            for line, row in zip(found, documents(), strict=True):
                begin = 0
                for document in row:
                    alone = decoder.hidden_states(model, document[None])[0]
                    torch.testing.assert_close(line[begin : begin + len(document)], alone, rtol=1e-5, atol=1e-5)
                    begin += len(document)


def test_a_sliding_window_counts_inside_of_a_document(short):
    model = cut_model("mistral", sliding_window=4)
    ids, marks = packed()
    found = decoder.hidden_states(model, ids, segments=marks.segments)
    alone = decoder.hidden_states(model, documents()[1][0][None])[0]
    torch.testing.assert_close(found[1, :12], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distill", [0.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_loss_and_gradients_are_those_of_each_document_alone(family, distill, short):
    model = cut_model(family).requires_grad_(True)
    lesson = Lesson(cut_model(family, intermediate_size=48), distill) if distill else None
    twin = copy.deepcopy(model)
    ids, marks = packed()
    total, nll = next_token_loss(model, ids, lesson=lesson, marks=marks)
    total.backward()
    whole = [document for row in documents() for document in row if len(document) > 1]
    count = sum(len(document) - 1 for document in whole)
    expected = 0.0
    for document in whole:
        one, part = next_token_loss(twin, document[None], lesson=lesson)
        (one * (len(document) - 1) / count).backward()
        expected += part.item() * (len(document) - 1) / count
    assert nll.item() == pytest.approx(expected, abs=1e-5)
    for (name, mine), plain in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain[1].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_only_tokens_that_count_are_predicted():
    model = cut_model()
    ids, marks = packed(lambda document: document % 2 == 0)
    found = next_token_loss(model, ids, marks=marks)[1]
    total, count = 0.0, 0
    for document in (document for row in documents() for document in row):
        with torch.no_grad():
            logprobs = model(input_ids=document[None]).logits[0].log_softmax(-1)
        for place in range(1, len(document)):
            if int(document[place]) % 2 == 0:
                total, count = total - float(logprobs[place - 1, document[place]]), count + 1
    assert found.item() == pytest.approx(total / count, abs=1e-5)


def test_batches_carry_the_marks_of_their_tokens():
    run = TrainingConfig(tokens=96, length=8, batch=2, lr=1.0)
    tokens = torch.arange(40)
    marks = Marks(segments=tokens // 4, counted=tokens % 3 > 0)
    found = list(batches(tokens, run, marks))
    assert len(found) == run.steps == 6
    assert [batch.ids.tolist() for batch in found] == [ids.tolist() for ids in sequences(tokens, run)]
    for batch in found:
        assert torch.equal(batch.marks.segments, batch.ids // 4)
        assert torch.equal(batch.marks.counted, batch.ids % 3 > 0)
    with pytest.raises(TrialError, match="whole sequences of 8"):
        next(batches(tokens[:-1], run, Marks(segments=marks.segments[:-1], counted=marks.counted[:-1])))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_recoveries_train_on_marked_tokens(name):
    tokens = stream(640)
    quarters = torch.arange(640) % LENGTH // 4
    marks = Marks(segments=quarters, counted=torch.ones(640, dtype=torch.bool))
    losses = []
    for given_marks in (marks, None):
        model, structure = recovering_model()
        context = RecoveryContext(seed=3, marks=given_marks)
        losses.append(recover(name, model, structure, tokens, context, packing="documents", lr=3e-3).losses)
    assert len(losses[0]) == 8
    assert losses[0][-1] < losses[0][0]
    assert losses[0] != losses[1]
    model, structure = recovering_model()
    first = next_token_loss(model, tokens[: BATCH * LENGTH].view(-1, 4))[1]  # the first step's documents, each alone
    assert losses[0][0] == pytest.approx(first.item(), abs=1e-5)


def test_answers_are_not_cut_from_their_questions():
    with pytest.raises(ConfigError, match=r"recovery\.packing: must be documents where loss is answers"):
        options("lora", loss="answers")
    assert options("lora", loss="answers", packing="documents").loss == "answers"
