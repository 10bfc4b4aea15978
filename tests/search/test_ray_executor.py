"""One Ray of two workers for the whole module; only the tests of how Ray ends start their own."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import OutOfMemoryError

from adasearch.errors import ConfigError, DataError, NoTrialError, StorageError
from adasearch.search.executor import Outcome
from adasearch.search.ray_executor import RayExecutor, _check_address, _loss, machines
from tests.search import ray_workers

SECONDS = 120.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray with places for the executor that most tests share and for one more, as a caller may have started it."""
    options = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 * 2**20}
    ray.init(address="local", logging_level="ERROR", **options)
    yield
    assert ray.is_initialized(), "an executor must leave a Ray that was there before it"
    ray.shutdown()


@pytest.fixture(scope="module")
def executor(cluster: None) -> Iterator[RayExecutor]:
    with RayExecutor(ray_workers.open_worker, workers=2, threads=1, startup_seconds=SECONDS) as opened:
        yield opened
    opened.close()


def collect(executor: RayExecutor, count: int, seconds: float = SECONDS) -> dict[str, Outcome]:
    end, outcomes = time.monotonic() + seconds, {}
    while len(outcomes) < count:
        assert time.monotonic() < end, f"only {sorted(outcomes)} came back"
        outcomes |= {outcome.key: outcome for outcome in executor.wait(1.0)}
    return outcomes


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_tasks_are_shared_out_to_workers_that_are_opened_once(tmp_path: Path) -> None:
    opened, met = tmp_path / "opened", tmp_path / "met"
    opened.mkdir()
    met.mkdir()
    with RayExecutor(functools.partial(ray_workers.open_counted, str(opened)), workers=2, threads=1) as executor:
        assert executor.capacity == 2
        for key in ("a", "b"):
            executor.submit(key, ("meet", str(met)), seconds=SECONDS)
        for number in range(20):
            executor.submit(str(number), ("square", number), seconds=SECONDS)
        outcomes = collect(executor, 22)
    assert outcomes["a"].value != outcomes["b"].value
    assert [outcomes[str(number)].value for number in range(20)] == [number * number for number in range(20)]
    assert not any(outcome.failure for outcome in outcomes.values())
    assert len(list(opened.iterdir())) == 2


def test_waiting_for_nothing_takes_no_longer_than_allowed(executor: RayExecutor) -> None:
    start = time.monotonic()
    assert executor.wait(0.3) == []
    assert time.monotonic() - start < 1.5


def test_workers_find_threads_and_devices_in_their_environment() -> None:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")
    with RayExecutor(ray_workers.open_worker, workers=1, threads=1) as executor:
        executor.submit("a", ("environment", names), seconds=SECONDS)
        assert collect(executor, 1)["a"].value == dict(zip(names, ("1", "1", "false", ""), strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("trial", "nan", "loss is nan"),
        ("memory", "memory", "no room"),
        ("cuda", "memory", "CUDA out of memory"),
        ("error", "error", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_trial_raises_is_its_failure(executor: RayExecutor, name: str, kind: str, message: str) -> None:
    executor.submit("bad", ("raise", name), seconds=SECONDS)
    executor.submit("good", ("square", 3), seconds=SECONDS)
    outcomes = collect(executor, 2)
    failure = outcomes["bad"].failure
    assert failure is not None
    assert failure.kind == kind
    assert message in failure.message
    assert failure.phase == ("recover" if name == "trial" else "")
    assert outcomes["good"].value == 9


@pytest.mark.parametrize(("name", "cls"), [("config", ConfigError), ("data", DataError), ("storage", StorageError)])
def test_what_concerns_every_trial_reaches_the_driver_as_itself(
    executor: RayExecutor, name: str, cls: type[Exception]
) -> None:
    executor.submit("bad", ("raise", name), seconds=SECONDS)
    with pytest.raises(cls) as caught:
        collect(executor, 1)
    assert type(caught.value) is cls
    assert str(caught.value) == str(ray_workers.ERRORS[name]())
    executor.submit("next", ("square", 2), seconds=SECONDS)
    assert collect(executor, 1)["next"].value == 4


def test_a_value_that_cannot_be_sent_is_a_failure(executor: RayExecutor) -> None:
    executor.submit("bad", ("unpicklable", None), seconds=SECONDS)
    failure = collect(executor, 1)["bad"].failure
    assert failure is not None
    assert failure.kind == "error"
    assert "cannot pickle '_thread.lock' object" in failure.message
    executor.submit("next", ("square", 2), seconds=SECONDS)
    assert collect(executor, 1)["next"].value == 4


def test_a_killed_worker_loses_its_own_task_only(executor: RayExecutor) -> None:
    executor.submit("long", ("sleep", 3), seconds=SECONDS)
    executor.submit("lost", ("kill", None), seconds=SECONDS)
    start = time.monotonic()
    first = collect(executor, 1)
    assert list(first) == ["lost"]
    assert time.monotonic() - start < 10
    failure = first["lost"].failure
    assert failure is not None
    assert failure.kind == "worker_lost"
    assert "worker process" in failure.message
    assert "\n" not in failure.message
    executor.submit("again", ("square", 5), seconds=SECONDS)
    outcomes = collect(executor, 2)
    assert outcomes["again"].value == 25
    assert outcomes["long"].failure is None


def test_all_workers_lost_at_once_come_back(executor: RayExecutor) -> None:
    for key in ("a", "b"):
        executor.submit(key, ("kill", None), seconds=SECONDS)
    for number in range(4):
        executor.submit(str(number), ("square", number), seconds=SECONDS)
    outcomes = collect(executor, 6)
    assert [outcomes[key].failure.kind for key in ("a", "b")] == ["worker_lost"] * 2  # type: ignore[union-attr]
    assert [outcomes[str(n)].value for n in range(4)] == [0, 1, 4, 9]


@pytest.mark.parametrize("way", ["hang", "stop"])
def test_a_task_past_its_time_is_killed_and_others_go_on(executor: RayExecutor, tmp_path: Path, way: str) -> None:
    executor.submit("long", ("sleep", 2), seconds=SECONDS)
    executor.submit("hung", (way, str(tmp_path / "pid")), seconds=1.0)
    outcomes = collect(executor, 2)
    assert outcomes["long"].failure is None
    assert outcomes["hung"].failure.kind == "timeout"  # type: ignore[union-attr]
    pid = int((tmp_path / "pid").read_text())
    for key in ("a", "b"):
        executor.submit(key, ("sleep", 0.5), seconds=SECONDS)
    outcomes = collect(executor, 2)
    assert pid not in {outcome.value for outcome in outcomes.values()}
    assert gone(pid, SECONDS)


def test_an_error_of_the_factory_reaches_the_driver_without_a_restart(tmp_path: Path) -> None:
    with RayExecutor(functools.partial(ray_workers.refuse, str(tmp_path)), workers=1, threads=1) as executor:
        executor.submit("a", ("square", 1), seconds=SECONDS)
        with pytest.raises(DataError, match="100 documents, given 3"):
            collect(executor, 1)
    assert len(list(tmp_path.iterdir())) == 1


def test_another_failure_of_the_factory_is_that_of_the_task() -> None:
    with RayExecutor(ray_workers.fail, workers=1, threads=1) as executor:
        executor.submit("a", ("square", 1), seconds=SECONDS)
        failure = collect(executor, 1)["a"].failure
    assert failure is not None
    assert failure.kind == "error"
    assert "ValueError: cannot open" in failure.message


def test_a_worker_that_dies_at_each_start_is_given_up(tmp_path: Path) -> None:
    with RayExecutor(functools.partial(ray_workers.die, str(tmp_path)), workers=1, threads=1) as executor:
        executor.submit("a", ("square", 1), seconds=SECONDS)
        with pytest.raises(NoTrialError, match="no worker could be started, in 3 attempts"):
            collect(executor, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_that_find_no_place_end_the_wait() -> None:
    with (
        RayExecutor(ray_workers.open_worker, workers=1, threads=64, startup_seconds=1.0) as executor,
        pytest.raises(NoTrialError, match=r"within 1 s; the cluster offers 4 CPUs and 0 GPUs"),
    ):
        collect(executor, 1)


def test_the_machines_of_a_cluster_are_told_by_ray() -> None:
    (machine,) = machines("auto")
    assert machine.cores == 4
    assert machine.memory > 2**28
    assert machine.gpus == ()


SHARED = """
    import ray
    from adasearch.sections import ClusterConfig
    from adasearch.placement import Need, decide
    from adasearch.search.ray_executor import RayExecutor, machines
    from tests.search import ray_workers

    sizes = {"num_cpus": 6, "num_gpus": 1, "object_store_memory": 100 * 2**20}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, **sizes)
    stated = ClusterConfig(workers=3, threads=2, address="auto")
    placed = decide(stated, machines("auto"), Need(memory=2**20), 3)
    print(placed.gpus, placed.machines[0].gpus)
    with RayExecutor(ray_workers.open_worker, workers=3, threads=2, gpus=placed.gpus, address="auto") as executor:
        for key in "abc":
            executor.submit(key, ("environment", ("CUDA_VISIBLE_DEVICES",)), seconds=60)
        found = []
        while len(found) < 3:
            found += [outcome.value["CUDA_VISIBLE_DEVICES"] for outcome in executor.wait(1.0)]
    print(found)
"""


def test_workers_share_a_gpu_of_a_cluster_in_fractions() -> None:
    """Ray believes the number of GPUs that it is told, so that places are shared out as where there is one."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARED)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert found.stdout.splitlines() == ["0.3333 (0,)", "['0', '0', '0']"], found.stderr


def test_more_gpus_than_there_are_is_an_error_of_the_study() -> None:
    with pytest.raises(ConfigError, match="gpus_per_worker: 2 workers with 1 GPUs each need 2, this machine has 0"):
        RayExecutor(ray_workers.open_worker, workers=2, threads=1, gpus=1.0)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("nowhere", "must be auto, host:port"),
        ("ray://localhost:10001", "must be auto, host:port"),
        ("127.0.0.1:1", "must be the address of a running Ray cluster"),
        ("127.0.0.1:99999", "must be the address of a running Ray cluster"),
    ],
)
def test_an_address_where_no_ray_answers_is_told_at_once(address: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster.address: {problem}"):
        _check_address(address)


def test_a_kill_for_want_of_memory_is_told_as_such() -> None:
    text = "1 worker(s) were killed\nOOM kill reason: Memory usage 19B exceeded threshold of 12B\nObject store: none"
    failure = _loss(OutOfMemoryError(text), 7)
    assert failure.kind == "memory"
    assert failure.message.endswith("ran out of memory: Memory usage 19B exceeded threshold of 12B")


DRIVER = """
    import signal, sys
    from adasearch.search.ray_executor import RayExecutor
    from tests.search import ray_workers

    class Asked(Exception):
        pass

    def ask(*_):
        raise Asked

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with RayExecutor(ray_workers.open_worker, workers=1, threads=1) as executor:
        executor.submit("lost", ("kill", None), seconds=600)
        executor.submit("a", ("hang", sys.argv[1]), seconds=600)
        while True:
            try:
                executor.wait(1.0)
            except Asked:
                print("asked", flush=True)
"""


@dataclasses.dataclass
class Driver:
    process: subprocess.Popen[str]
    worker: int
    folder: Path


@pytest.fixture
def driver() -> Iterator[Driver]:
    """Another driver with a Ray of its own, whose worker is at work.

    It listens to SIGINT also where these tests run in the background of a shell, which has its jobs ignore it.
    """
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, mark = Path(name) / "tmp", Path(name) / "pid"
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DRIVER), str(mark)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            end = time.monotonic() + SECONDS
            while not (mark.exists() and mark.read_text()):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.1)
            yield Driver(process, int(mark.read_text()), folder)
        finally:
            process.kill()
            process.communicate()


def test_workers_go_when_their_driver_is_killed(driver: Driver) -> None:
    driver.process.kill()
    assert gone(driver.worker, SECONDS)


def test_signals_are_the_drivers_own_and_end_it_without_noise(driver: Driver) -> None:
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.stdout is not None
    assert driver.process.stdout.readline() == "asked\n"
    os.kill(driver.worker, signal.SIGINT)
    assert not gone(driver.worker, 0.5)
    driver.process.send_signal(signal.SIGINT)
    out, err = driver.process.communicate(timeout=SECONDS)
    assert driver.process.returncode == -signal.SIGINT
    assert gone(driver.worker, SECONDS)
    assert out == ""
    assert err.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert "ray::" not in err
    assert list(driver.folder.glob("ada-*")) == []
