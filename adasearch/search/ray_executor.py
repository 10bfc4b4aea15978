"""Trials in worker processes under Ray: the `Executor` protocol on this machine or on a cluster.

A worker is a Ray actor that is never restarted by Ray: when it is lost, this module makes a new one in its place. So
a task is handed only to a worker that has answered, and Ray tells the reason of a loss (a restarting actor answers
"unavailable" and keeps the reason to itself).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Read when ray is imported. Notices of the raylet about lost workers would land between the lines of the display; and
# a cluster that is no longer there is asked for half a minute each time, of which twenty are too many.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")

import ray
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from adasearch.errors import AdaSearchError, ConfigError, NoTrialError
from adasearch.placement import Machine
from adasearch.records import Failure
from adasearch.search.executor import Outcome, Worker, WorkerFactory, classify, printable

OBJECT_STORE_BYTES = 100 * 2**20
START_ATTEMPTS = 3
POLL_SECONDS = 0.25
REACH_SECONDS = 10.0
_SHORT_PATH = 40
_HANDED_ON = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class _Host:
    """What lives in a worker process: opens the worker, then does one task after the other."""

    def __init__(self, factory: bytes, environment: dict[str, str]) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which closes its workers
        os.environ.update(environment)
        self._factory = factory  # unpickled later: that may import torch, which reads the environment once
        self._worker: Worker | None = None

    def _opened(self) -> Worker:
        if self._worker is None:
            factory: WorkerFactory = cloudpickle.loads(self._factory)
            self._worker = factory()
        return self._worker

    def open(self) -> int | AdaSearchError:
        """Open the worker and return the process id. What only fails a trial is left for the first task to report."""
        answer = _answer("", self._opened)
        return answer if isinstance(answer, AdaSearchError) else os.getpid()

    def run(self, key: str, task: Any) -> Outcome | AdaSearchError:
        """Return what came of the task, or the error that must stop the driver."""
        return _answer(key, lambda: self._opened()(task))


def _answer(key: str, call: Callable[[], Any]) -> Outcome | AdaSearchError:
    """Return what came of `call`. An error that must stop the driver is returned too: Ray would wrap what is raised."""
    try:
        return Outcome(key=key, value=call(), failure=None)
    except Exception as error:  # noqa: BLE001 - whatever a trial raises is its outcome, and only here has it a traceback
        try:
            return Outcome(key=key, value=None, failure=classify(error))
        except AdaSearchError as stop:
            return stop


@dataclass(eq=False, slots=True)
class _Slot:
    """One place for a worker. `call` is the answer waited for: of `open` while `starting`, of `run` with a `key`."""

    actor: Any
    call: concurrent.futures.Future[Any] | None
    since: float
    starting: bool = True
    key: str | None = None
    seconds: float = 0.0
    pid: int = 0
    lost_starts: int = 0


@dataclass(frozen=True, slots=True)
class _Queued:
    key: str
    task: Any
    seconds: float


class RayExecutor:
    """Runs tasks in `workers` processes, each with its own worker, made once by `factory`.

    Args:
        factory: picklable; called once in each worker process.
        workers: tasks at the same time.
        threads: CPU threads of each worker, and what it reserves on a cluster.
        gpus: GPUs of each worker, may be a fraction (which shares the device, not its memory); 0 hides them.
        address: None starts a Ray of its own on this machine; ``auto`` or ``host:port`` joins a running cluster.
        startup_seconds: how long opening a worker may take, and how long to wait with no worker at all.

    Raises:
        ConfigError: no Ray at `address`, or this machine has not so many GPUs.
    """

    def __init__(
        self,
        factory: WorkerFactory,
        *,
        workers: int,
        threads: int,
        gpus: float = 0.0,
        address: str | None = None,
        startup_seconds: float = 600.0,
    ) -> None:
        gpus = gpus if gpus <= 1 else float(int(gpus))  # Ray shares one GPU in fractions, several only whole
        ours = address is None and not ray.is_initialized()
        self._stack = _connect(address, workers, gpus)
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            if address is None:
                _check_gpus(workers, gpus)
            # On a Ray of our own the number of places is the only limit; threads may outnumber the cores.
            options = {"num_cpus": 1 if ours else threads, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
            self._make: Callable[..., Any] = ray.remote(_Host).options(**options).remote
            self._arguments = (cloudpickle.dumps(factory), _environment(threads, gpus))  # type: ignore[no-untyped-call]
            self._startup_seconds = startup_seconds
            self._queue: deque[_Queued] = deque()
            self._served = time.monotonic()
            self._slots = [self._start() for _ in range(workers)]
            undo.pop_all()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Tasks that can run at the same time; a place whose worker cannot be started is given up."""
        return len(self._slots)

    def submit(self, key: str, task: Any, *, seconds: float) -> None:
        """Queue a task; its `seconds` count from the moment a worker has it."""
        self._queue.append(_Queued(key, task, seconds))

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has finished, as soon as something has, after at most `timeout` seconds.

        Raises:
            AdaSearchError: what a worker raised that no other trial would fare better with, as it was raised.
            NoTrialError: no worker could be started.
        """
        end = time.monotonic() + timeout
        while True:
            self._dispatch()
            outcomes = self._collect(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
            outcomes += self._expire()
            self._dispatch()
            if outcomes or time.monotonic() >= end:
                return outcomes

    def close(self) -> None:
        """End the workers, whatever they are doing, and the Ray that was started for them."""
        self._queue.clear()
        for slot in self._slots:
            with contextlib.suppress(RayError, RuntimeError, ConnectionError):
                ray.kill(slot.actor)
        self._slots = []
        self._stack.close()

    def _start(self) -> _Slot:
        actor = self._make(*self._arguments)
        return _Slot(actor=actor, call=actor.open.remote().future(), since=time.monotonic())

    def _renew(self, slot: _Slot) -> None:
        """Put a new worker in the place of one that is gone or no longer wanted."""
        with contextlib.suppress(RayError):
            ray.kill(slot.actor)
        new = self._start()
        slot.actor, slot.call, slot.since = new.actor, new.call, new.since
        slot.starting, slot.key, slot.pid = True, None, 0

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._queue and slot.call is None:
                task = self._queue.popleft()
                slot.key, slot.call = task.key, slot.actor.run.remote(task.key, task.task).future()
                slot.since, slot.seconds = time.monotonic(), task.seconds

    def _collect(self, timeout: float) -> list[Outcome]:
        calls = {slot.call: slot for slot in self._slots if slot.call is not None}
        if not calls:
            time.sleep(min(timeout, 0.05))
            return []
        # On futures and not by ray.wait, which makes a RaySystemError of what the driver's signal handlers raise.
        ready = concurrent.futures.wait(calls, timeout=timeout, return_when=concurrent.futures.FIRST_COMPLETED).done
        outcomes = (self._finish(calls[call]) for call in ready)
        return [outcome for outcome in outcomes if outcome is not None]

    def _finish(self, slot: _Slot) -> Outcome | None:
        key, call = slot.key, slot.call
        assert call is not None
        try:
            answer = call.result()
        except RayTaskError as error:  # raised in the worker but not by the task: its value cannot be pickled
            slot.key, slot.call, slot.starting = None, None, False
            return None if key is None else Outcome(key=key, value=None, failure=classify(error.cause or error))
        except RayError as error:
            return self._lost(slot, error)
        slot.key, slot.call, slot.starting, slot.lost_starts = None, None, False, 0
        if isinstance(answer, AdaSearchError):
            raise answer
        if isinstance(answer, Outcome):
            return answer
        slot.pid = answer
        return None

    def _lost(self, slot: _Slot, error: RayError) -> Outcome | None:
        key, failure = slot.key, _loss(error, slot.pid)
        if key is None:
            slot.lost_starts += 1
        if slot.lost_starts < START_ATTEMPTS:
            self._renew(slot)
        else:
            self._slots.remove(slot)
        if not self._slots:
            raise NoTrialError(f"no worker could be started, in {START_ATTEMPTS} attempts at each: {failure.message}")
        return None if key is None else Outcome(key=key, value=None, failure=failure)

    def _expire(self) -> list[Outcome]:
        now = time.monotonic()
        outcomes = []
        if any(not slot.starting for slot in self._slots):
            self._served = now
        elif now - self._served > self._startup_seconds:
            raise NoTrialError(f"no worker was ready within {self._startup_seconds:g} s; {_offer()}")
        for slot in self._slots:
            if slot.key is not None and now - slot.since > slot.seconds:
                message = f"it took longer than the {slot.seconds:g} s it may take; its worker was replaced"
                outcomes.append(Outcome(key=slot.key, value=None, failure=Failure(kind="timeout", message=message)))
                self._renew(slot)
            elif slot.starting and now - slot.since > self._startup_seconds:
                self._renew(slot)
        return outcomes


def _environment(threads: int, gpus: float) -> dict[str, str]:
    """Return what a worker's libraries are to find in their environment before they are imported."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {name: str(threads) for name in counts} | {"TOKENIZERS_PARALLELISM": "false"}
    if gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all devices visible to who asked for none
    return environment | {name: os.environ[name] for name in _HANDED_ON if name in os.environ}


def _connect(address: str | None, workers: int, gpus: float) -> contextlib.ExitStack:
    """Start or join Ray and return what undoes it; a Ray that this process already uses is left as it is."""
    stack = contextlib.ExitStack()
    if ray.is_initialized():
        return stack
    if address is not None:
        _check_address(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        folder = _folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        options |= {"num_cpus": workers, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": folder}
        options |= {"include_dashboard": False} | ({"num_gpus": 0} if gpus == 0 else {})
    stack.callback(ray.shutdown)
    try:
        with _own_signals():
            ray.init(**options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        stack.close()
        reason = printable(str(error))
        if address is None:
            problem = f"Ray could not be started ({reason}); with cluster.address: in_process trials run without it"
            raise ConfigError("cluster", problem) from error
        problem = f"must be the address of a running Ray cluster, given {address!r}: {reason}"
        raise ConfigError("cluster.address", problem) from error
    except BaseException:
        stack.close()
        raise
    return stack


def _check_address(address: str) -> None:
    """Find out in seconds what ``ray.init`` finds out in minutes: that nobody answers at ``host:port``."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in host or not port.isdecimal():
        raise ConfigError("cluster.address", f"must be auto, host:port, in_process or null, given {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        problem = f"must be the address of a running Ray cluster, given {address!r}: {error}"
        raise ConfigError("cluster.address", problem) from error


def _folder() -> str:
    """Return a new folder for Ray's sockets and logs, its path short: a socket's may have 107 characters at most."""
    folder = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="ada-", dir=folder if len(folder) <= _SHORT_PATH else "/tmp")


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the driver's way to end on SIGTERM, for which ``ray.init`` sets its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def machines(address: str) -> tuple[Machine, ...]:
    """Return what the machines of a running Ray cluster offer; Ray does not tell how large their GPUs are.

    Raises:
        ConfigError: no Ray at `address`.
    """
    with _connect(address, 1, 0.0):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        offers = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return tuple(
        Machine(cores=int(o["CPU"]), memory=int(o.get("memory", 0)), gpus=(0,) * int(o.get("GPU", 0))) for o in offers
    )


def _check_gpus(workers: int, gpus: float) -> None:
    there = _resources().get("GPU", 0.0)
    if workers * gpus > there + 1e-6:
        problem = f"{workers} workers with {gpus:g} GPUs each need {workers * gpus:g}, this machine has {there:g}"
        raise ConfigError("cluster.gpus_per_worker", problem)


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _offer() -> str:
    with contextlib.suppress(RayError, RuntimeError, ConnectionError):
        there = _resources()
        return f"the cluster offers {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
    return "the cluster does not answer"


def _loss(error: RayError, pid: int) -> Failure:
    """Return why a worker is gone, in as few words as Ray's answer can be cut down to."""
    who = f"worker process {pid}" if pid else "a worker process that was starting"
    text = printable(str(error))
    if isinstance(error, OutOfMemoryError):
        reason = re.search(r"OOM kill reason: (.*)", str(error))
        text = f"{who} was killed because its machine ran out of memory: {reason[1] if reason else text}"
        return Failure(kind="memory", message=text)
    detail = re.search(r"Worker exit detail: (.*?)(?:Some common causes|$)", text)
    text = detail[1].strip() if detail else text
    if "connection error code 2" in text:
        text = "it crashed or was killed by a signal, such as the kernel's when memory runs out"
    return Failure(kind="worker_lost", message=f"{who} was lost: {text}")
