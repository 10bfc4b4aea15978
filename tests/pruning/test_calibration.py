"""Statistics of a sample equal their definitions, leave the model as it was, and are cached safely."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest
import torch

from adasearch.errors import DataError, StorageError, TrialError
from adasearch.pruning import calibration, statistics, surgery
from adasearch.pruning.plan import make_plan
from adasearch.pruning.statistics import Statistics
from tests.pruning.sample import NEEDS, activations, sample, sequence_gradients, tokens
from tests.tiny import FAMILIES, tiny_config, tiny_structure, tiny_weights


def _fresh(dtype=torch.float32, family="llama"):
    config = tiny_config(family)
    structure, units = tiny_structure(config)
    dense = make_plan(structure, units, {}, {})
    return surgery.cut(config, tiny_weights(config, dtype), structure, dense), structure


class TestCollect:
    def test_features_equal_their_definition(self):
        case = sample()
        for group in case.structure.groups:
            x = activations(case.model, group.output, case.tokens)
            moments = case.statistics.moments(group.output)
            torch.testing.assert_close(moments.mean, x.mean(0))
            torch.testing.assert_close(moments.variance, x.var(0, unbiased=False))
            gram = case.statistics.covariance(group.output).matrix()
            torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert case.statistics.tokens == case.tokens.numel()

    def test_gradients_equal_their_definition(self):
        case = sample()
        model, structure = _fresh(torch.float64)
        gradients = sequence_gradients(model, case.tokens)
        for group in structure.groups:
            for part in group.slices:
                w, g = model.get_parameter(part.parameter).detach(), gradients[part.parameter]
                mean, fisher = g.mean(0), g.square().mean(0)
                expected = {
                    ("gradient", "elem1"): (w * mean).abs(),
                    ("gradient", "signed"): w * mean,
                    ("fisher", "elem2"): w * w * fisher,
                    ("fisher", "mix"): (w * mean - w * w * fisher / 2).abs(),
                    ("fisher", "signed"): w * mean,
                }
                for (family, name), item in expected.items():
                    rows = case.statistics.rows(family, part.parameter, name)
                    torch.testing.assert_close(rows, item.sum(1 - part.dim), rtol=1e-4, atol=1e-8)

    @pytest.mark.parametrize("needs", [NEEDS - {"fisher"}, NEEDS])
    def test_the_batch_split_makes_no_difference(self, needs):
        model, structure = _fresh()
        one, all_ = (calibration.collect(model, structure, tokens(), needs, token_budget=b) for b in (1, 10_000))
        some = calibration.collect(model, structure, tokens(), needs, token_budget=24)
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(all_.tensors[name], tensor, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(some.tensors[name], tensor, rtol=1e-3, atol=1e-6)

    def test_the_head_in_pieces_makes_no_difference(self, monkeypatch):
        model, structure = _fresh()
        whole = calibration.collect(model, structure, tokens(), frozenset({"gradient"}))
        monkeypatch.setattr(calibration, "_HEAD_ROWS", 7)
        pieces = calibration.collect(model, structure, tokens(), frozenset({"gradient"}))
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(pieces.tensors[name], tensor, rtol=1e-3, atol=1e-7)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_gives_the_families_asked_for_and_no_other(self, family):
        model, structure = _fresh(family=family)
        for need in NEEDS:
            assert calibration.collect(model, structure, tokens(2), frozenset({need})).families == {need}

    def test_bfloat16_weights_give_wide_statistics(self):
        model, structure = _fresh(torch.bfloat16)
        found = calibration.collect(model, structure, tokens(), NEEDS)
        assert {t.dtype for t in found.tensors.values()} == {torch.float32, torch.float64}
        exact = sample().statistics.moments("model.layers.0.mlp.down_proj").second_moment
        torch.testing.assert_close(
            found.moments("model.layers.0.mlp.down_proj").second_moment, exact, rtol=0.2, atol=0.01
        )

    def test_refuses_an_empty_or_too_short_sample(self):
        model, structure = _fresh()
        for shape in ((0, 12), (3, 1), (12,)):
            with pytest.raises(DataError, match="at least 1 sequence of 2 tokens"):
                calibration.collect(model, structure, torch.zeros(shape, dtype=torch.long), NEEDS)


def _state(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()] + [
        len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()
    ]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return hooks, flags, [m.training for m in model.modules()], [p.detach().clone() for p in model.parameters()]


def _same(before, after):
    return before[:3] == after[:3] and all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))


class TestLeavesNothingBehind:
    @pytest.mark.parametrize("flag", [True, False])
    def test_after_success(self, flag):
        model, structure = _fresh()
        model.train()
        model.requires_grad_(flag)
        before = _state(model)
        with torch.no_grad():
            calibration.collect(model, structure, tokens(), NEEDS)
        assert _same(before, _state(model))

    @pytest.mark.parametrize("needs", [frozenset({"moments"}), NEEDS])
    def test_after_an_error(self, needs):
        model, structure = _fresh()
        model.requires_grad_(False)
        before = _state(model)
        bad = tokens()
        bad[-1, -1] = 10_000
        with pytest.raises((IndexError, RuntimeError)):
            calibration.collect(model, structure, bad, needs)
        assert _same(before, _state(model))

    def test_after_a_loss_that_is_not_finite(self):
        model, structure = _fresh()
        with torch.no_grad():
            model.get_parameter("model.norm.weight").fill_(float("nan"))
        before = _state(model)
        with pytest.raises(TrialError, match="nan while in phase calibrate"):
            calibration.collect(model, structure, tokens(), frozenset({"gradient"}))
        assert before[:3] == _state(model)[:3]

    def test_activations_that_are_not_finite_are_an_error(self):
        model, structure = _fresh()
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[3] = float("inf")
        with pytest.raises(TrialError, match="must be finite"):
            calibration.collect(model, structure, tokens(), frozenset({"moments"}))


def _made(families, value=1.0, size=100):
    tensors = {f"{family}/m/x": torch.full((size,), value, dtype=torch.float64) for family in families}
    return Statistics(tokens=9, tensors=tensors)


def _never(missing):
    raise AssertionError(f"computed {missing} although it is on disk")


def _sleepless_writer(folder):
    for i in itertools.count():
        calibration.cached(
            folder, f"k{i % 5}", frozenset({"moments"}), lambda m: _made(m, size=200_000), max_bytes=4_000_000
        )


def _count_reads(folder, rounds, queue):
    for i in range(rounds):
        found = calibration.cached(folder, f"k{i % 3}", frozenset({"moments"}), _made, max_bytes=2000)
        queue.put(float(found.tensors["moments/m/x"].sum()))


class TestCached:
    def test_computes_what_is_missing_only(self, tmp_path):
        asked = []

        def compute(missing):
            asked.append(missing)
            return _made(missing)

        calibration.cached(tmp_path, "key", frozenset({"moments"}), compute)
        both = calibration.cached(tmp_path, "key", frozenset({"moments", "gradient"}), compute)
        assert asked == [{"moments"}, {"gradient"}]
        assert both.families == {"moments", "gradient"}
        again = calibration.cached(tmp_path, "key", frozenset({"moments", "gradient"}), _never)
        assert torch.equal(again.tensors["moments/m/x"], both.tensors["moments/m/x"])
        calibration.cached(tmp_path, "other", frozenset({"moments"}), compute)
        assert len(asked) == 3

    def test_no_need_is_no_work(self, tmp_path):
        assert calibration.cached(tmp_path / "none", "key", frozenset(), _never).tensors == {}
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize("content", [b"", b"x" * 40, None])
    def test_a_damaged_file_counts_as_absent(self, tmp_path, content):
        calibration.cached(tmp_path, "key", frozenset({"moments"}), _made)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-3] if content is None else content)
        calibration.cached(tmp_path, "key", frozenset({"moments"}), lambda m: _made(m, 2.0))
        again = calibration.cached(tmp_path, "key", frozenset({"moments"}), _never)
        assert float(again.tensors["moments/m/x"][0]) == 2.0

    def test_the_longest_unused_go_first(self, tmp_path):
        for i in range(3):
            calibration.cached(tmp_path, f"k{i}", frozenset({"moments"}), _made)
            os.utime(tmp_path / f"k{i}.moments.safetensors", (1000 + i, 1000 + i))
        size = (tmp_path / "k0.moments.safetensors").stat().st_size
        calibration.cached(tmp_path, "k0", frozenset({"moments"}), _never)
        calibration.cached(tmp_path, "k3", frozenset({"moments"}), _made, max_bytes=2 * size)
        assert sorted(f.name.split(".")[0] for f in tmp_path.iterdir()) == ["k0", "k3"]

    def test_what_does_not_fit_is_given_and_not_kept(self, tmp_path):
        found = calibration.cached(tmp_path, "key", frozenset({"moments"}), _made, max_bytes=10)
        assert found.families == {"moments"}
        assert list(tmp_path.iterdir()) == []

    def test_eviction_leaves_foreign_files_and_sweeps_old_drafts(self, tmp_path):
        foreign = tmp_path / "model.safetensors"
        foreign.write_bytes(b"z" * 10_000)
        draft = tmp_path / "k.moments.safetensors.0.part"
        young = tmp_path / "k.moments.safetensors.1.part"
        for file in (draft, young):
            file.write_bytes(b"half")
        os.utime(draft, (1000, 1000))
        calibration.cached(tmp_path, "key", frozenset({"moments"}), _made, max_bytes=10)
        assert {f.name for f in tmp_path.iterdir()} == {foreign.name, young.name}

    def test_a_folder_that_cannot_be_written_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError, match="must be writable"):
            calibration.cached(tmp_path / "file", "key", frozenset({"moments"}), _made)

    def test_a_killed_writer_leaves_no_file_that_reads_wrong(self, tmp_path):
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            writer = context.Process(target=_sleepless_writer, args=(tmp_path,))
            writer.start()
            time.sleep(0.3)
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            for file in tmp_path.glob("*.safetensors"):
                assert float(statistics.load(file).tensors["moments/m/x"].sum()) == 200_000
            calibration.cached(tmp_path, "k0", frozenset({"moments"}), lambda m: _made(m, size=200_000))

    def test_many_processes_share_a_folder_that_is_too_small(self, tmp_path):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        workers = [context.Process(target=_count_reads, args=(tmp_path, 40, queue)) for _ in range(3)]
        for worker in workers:
            worker.start()
        sums = [queue.get(timeout=60) for _ in range(120)]
        for worker in workers:
            worker.join()
        assert set(sums) == {100.0}
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
