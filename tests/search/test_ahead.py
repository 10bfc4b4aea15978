"""Proposals made ahead: what a virtual clock says of idle workers, and that nothing waits for one or loses it."""

import heapq
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch.search import study as study_module
from adasearch.search.ahead import Proposer
from adasearch.search.outcomes import Proposed, due, lag
from adasearch.sections import ClusterConfig, SamplerConfig
from tests.search.synthetic import Faults, ThreadExecutor, factory, make_study, search, table

pytestmark = pytest.mark.usefixtures("fakes")


class Clock:
    """The order of the driver on a virtual clock: one proposal at a time, trials of given lengths, in order.

    `idle` is the share of the workers' time that passed without a trial while there were trials to ask for; `known` is
    for each trial how many had been told when it was proposed.
    """

    def __init__(self, workers, behind, lengths, ask):
        self.now, self.waited, self.last = 0.0, 0.0, 0.0
        self.free, self.running, self.queue = workers, [], []
        self.asked = self.told = 0
        self.done, self.known, self.ready = set(), [], None
        self.behind, self.lengths, self.ask = behind, lengths, ask
        while self.step():
            pass
        self.idle = self.waited / (workers * self.last)

    def settle(self):
        """Do all that can be done at this moment."""
        moved = True
        while moved:
            moved = False
            while self.queue and self.free:
                number = self.queue.pop(0)
                heapq.heappush(self.running, (self.now + self.lengths[number], number))
                self.free -= 1
            step = due(self.asked, self.told, self.behind, len(self.lengths))
            if step == "tell" and self.told in self.done:
                self.told += 1
                moved = True
            elif step == "ask" and self.ready is None:
                self.known.append(self.told)
                self.ready = self.now + self.ask
            elif step == "ask" and self.ready <= self.now:
                self.queue.append(self.asked)
                self.asked, self.ready = self.asked + 1, None
                moved = True

    def step(self):
        """Go to the next moment at which something happens; False at the end."""
        self.settle()
        moments = [self.running[0][0]] if self.running else []
        moments += [self.ready] if self.ready is not None else []
        if not moments:
            return False
        then = min(moments)
        if self.asked < len(self.lengths):
            self.waited += self.free * (then - self.now)
            self.last = then
        self.now = then
        while self.running and self.running[0][0] <= self.now:
            self.done.add(heapq.heappop(self.running)[1])
            self.free += 1
        return True


def lengths_of(n, seed):
    """Lengths that differ by a factor of 5, with mean 1: those of van der Corput, no random draws."""
    found = []
    for i in range(seed + 1, seed + n + 1):
        share, base = 0.0, 0.5
        while i:
            share += base * (i & 1)
            i >>= 1
            base /= 2
        found.append(5**share)
    # neighbours in that sequence are far apart; shuffled by a fixed stride they are not
    found = [found[(i * 61) % n] for i in range(n)]
    mean = sum(found) / n
    return [x / mean for x in found]


@pytest.mark.parametrize(("workers", "most"), [(1, 0.003), (4, 0.03), (16, 0.11)])
@pytest.mark.parametrize("seed", range(3))
def test_workers_hardly_wait(workers, most, seed):
    lengths = lengths_of(400, seed)
    clock = Clock(workers, lag(workers), lengths, 1 / 20)
    assert clock.told == 400
    assert clock.idle < most
    behind = Clock(workers, workers, lengths, 1 / 20)
    assert behind.idle > 0.04  # as many as there are workers: each waits for its next trial to be proposed


LENGTHS = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=40)


@given(st.integers(1, 9), st.integers(1, 14), st.floats(0.001, 1.0), LENGTHS)
def test_what_a_proposal_knows_does_not_depend_on_time(workers, behind, ask, lengths):
    clock = Clock(workers, behind, lengths, ask)
    assert clock.told == clock.asked == len(lengths)
    assert clock.known == [max(0, n - behind + 1) for n in range(len(lengths))]


def test_a_free_worker_is_not_kept_waiting_by_a_proposal(tmp_path, monkeypatch):
    """A proposal is held back until a further trial has begun: a loop that waited for it would never begin one."""
    real, begun = study_module.SearchStudy.proposed, threading.Semaphore(0)
    threads = set()

    def slow(self, before):
        if len(before) >= 4:
            assert begun.acquire(timeout=20), "no trial was begun while the next one was proposed"
        threads.add(threading.current_thread().name)
        return real(self, before)

    monkeypatch.setattr(study_module.SearchStudy, "proposed", slow)
    make = factory()

    def make_signalling():
        work = make()

        def done(task):
            if task.number >= 2:
                begun.release()
            return work(task)

        return done

    study = make_study(cluster=ClusterConfig(workers=1), sampler=SamplerConfig(type="random"))
    executor = ThreadExecutor(make_signalling, 1)
    found = search(study, tmp_path, executor=executor)
    executor.close()
    assert [r.number for r in found] == [-1, *range(8)]
    assert all(name.startswith("proposer") for name in threads)


def test_an_error_in_the_thread_ends_the_search_and_the_next_one_goes_on(tmp_path, monkeypatch):
    study = make_study(cluster=ClusterConfig(workers=2))
    whole = table(search(study, tmp_path / "whole", executor=ThreadExecutor(factory(), 2)))
    real = study_module.SearchStudy.proposed

    def broken(self, before):
        if len(before) == 5:
            raise ZeroDivisionError("in the model")
        return real(self, before)

    for error in (ZeroDivisionError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            if error is ZeroDivisionError:
                patch.setattr(study_module.SearchStudy, "proposed", broken)
            executor = ThreadExecutor(factory(Faults(delay=0.02)), 2)
            observed = []

            def observe(snapshot, error=error, observed=observed):
                observed.append(snapshot)
                if error is KeyboardInterrupt and snapshot.done >= 2:
                    raise KeyboardInterrupt

            with pytest.raises(error):
                search(study, tmp_path / "run", executor=executor, observer=observe)
            assert executor.closed
    assert not (tmp_path / "run" / "lease.json").exists()
    assert table(search(study, tmp_path / "run", executor=ThreadExecutor(factory(), 2))) == whole


def test_a_proposer_computes_one_thing_at_a_time_and_raises_here():
    gate = threading.Event()

    def compute(trials):
        gate.wait(10)
        if trials == "bad":
            raise ValueError("bad")
        return Proposed(params={"x": trials})

    proposer = Proposer(compute, ahead=True)
    assert proposer.proposal(lambda: 1) is None
    assert proposer.proposal(lambda: 2) is None  # still the first
    assert proposer.busy
    gate.set()
    proposer.wait(10)
    assert proposer.proposal(lambda: 3).params == {"x": 1}
    assert not proposer.busy
    assert proposer.proposal(lambda: "bad") is None
    proposer.wait(10)
    with pytest.raises(ValueError, match="bad"):
        proposer.proposal(lambda: 4)
    proposer.close()
    here = Proposer(lambda _: Proposed(params={"thread": threading.current_thread().name}), ahead=False)
    assert here.proposal(lambda: 0).params == {"thread": threading.main_thread().name}
