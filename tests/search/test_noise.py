import numpy as np
import pytest

from adasearch.search.noise import Consensus, excess, paired_errors, paired_variances, score_variances


def values_of(trials=8, items=4000, seed=0, own=0.3):
    """Item values of trials: what the trial is worth, what the item is worth to all, and the rest."""
    rng = np.random.default_rng(seed)
    common = {task: rng.standard_normal(items) for task in ("a", "b")}
    worth = rng.normal(0, 0.05, trials)
    return [{t: w + c + own * rng.standard_normal(items) for t, c in common.items()} for w in worth]


def test_what_items_have_in_common_does_not_count():
    *others, last = values_of()
    consensus = Consensus()
    for values in others:
        consensus.add(values)
    # two tasks of 4000 items: 0.3 / sqrt(8000); a plain standard error would hold the items' spread of 1 too
    assert consensus.error(last) == pytest.approx(0.3 / np.sqrt(8000), rel=0.05)


def test_one_other_trial_is_enough_and_its_own_noise_is_taken_off():
    first, second = values_of(trials=2)
    consensus = Consensus()
    consensus.add(first)
    assert consensus.error(second) == pytest.approx(0.3 / np.sqrt(8000), rel=0.05)


def test_fewer_items_are_more_uncertain():
    first, second, third = values_of(trials=3)
    consensus = Consensus()
    consensus.add(first)
    consensus.add(second)
    short = consensus.error({task: x[:1000] for task, x in third.items()})
    assert short == pytest.approx(2 * consensus.error(third), rel=0.1)


@pytest.mark.parametrize("values", [{}, {"c": np.zeros(5)}, {"a": np.zeros(9000)}, {"a": np.zeros(1)}])
def test_what_cannot_be_paired_has_no_error(values):
    consensus = Consensus()
    assert consensus.error({"a": np.zeros(5)}) is None
    consensus.add(values_of(trials=1)[0])
    assert consensus.error(values) is None


def test_a_trial_of_fewer_items_does_not_spoil_the_consensus():
    first, second, third = values_of(trials=3)
    one, two = Consensus(), Consensus()
    one.add(first)
    two.add(first)
    two.add({task: x[:10] for task, x in second.items()})
    assert one.error(third) == two.error(third)


def test_errors_of_many_trials_are_those_against_the_others():
    trials = dict(enumerate(values_of(trials=6)))
    stopped = {6: {task: x[:1000] for task, x in trials.pop(5).items()}}
    found = paired_errors(trials, stopped)
    assert set(found) == set(range(5)) | {6}
    for number in range(5):
        assert found[number] == pytest.approx(0.3 / np.sqrt(8000), rel=0.05)
    assert found[6] == pytest.approx(0.3 / np.sqrt(2000), rel=0.1)


def test_one_trial_alone_has_no_paired_error():
    assert paired_errors({0: values_of(trials=1)[0]}, {}) == {}


def test_a_trial_without_a_paired_error_takes_the_median():
    assert paired_variances(np.array([np.nan, 0.1, 0.3, 0.2])).tolist() == pytest.approx([0.04, 0.01, 0.09, 0.04])
    assert paired_variances(np.array([np.nan])).tolist() == [0.0]


def test_of_plain_errors_what_is_above_the_least_counts():
    assert excess(np.array([3.0, 2.0, 5.0])).tolist() == [1.0, 0.0, 3.0]
    plain, none = np.array([0.3, np.nan, 0.1]), np.full(3, np.nan)
    assert score_variances(none, plain).tolist() == pytest.approx([0.09, 0.0, 0.01])
    assert score_variances(none, plain[[0, 2]]).tolist() == pytest.approx([0.08, 0.0])
    assert score_variances(np.array([0.2, np.nan, 0.2]), plain).tolist() == pytest.approx([0.04] * 3)
