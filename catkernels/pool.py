"""Tasks in processes of their own, each of which may die alone.

`concurrent.futures.ProcessPoolExecutor` gives up all tasks where one process dies, and a kernel
that breaks the device, or a compiler that crashes, does kill its process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

_environment = threading.Lock()

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Task, Result]):
    """What became of a task.

    Attributes:
        result: what the function returned; None where it failed.
        failure: what it raised, or how its process ended; None where it succeeded.
        seconds: from the task's start to its end, without the process's start.
    """

    task: Task
    result: Result | None
    failure: str | None
    seconds: float


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_apart(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    timeout_s: float = 600.0,
    until: float = float("inf"),
    environment: dict[str, str] | None = None,
) -> Iterator[Outcome[Task, Result]]:
    """Call ``function`` on each task in spawned processes; outcomes come as tasks end.

    With one worker the tasks are served in their order.

    A process serves one task after the other until a task fails; another one takes its place then,
    since what failed may have left the device unusable.

    Args:
        function: of one argument, a task; importable, as the tasks and results must be picklable.
        workers: processes at a time.
        timeout_s: a task that takes longer is ended, with its process.
        until: when, by `time.monotonic`, time is up: a task that is running fails, and those that
            have not begun have no outcome.
        environment: variables that the processes have beside this one's.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    tasks = list(tasks)
    for task in tasks:
        waiting.put(task)
    outcomes: queue.SimpleQueue[Outcome[Task, Result] | None] = queue.SimpleQueue()
    running: set[_Process] = set()
    arguments = (function, waiting, outcomes, running, timeout_s, until, environment or {})
    threads = [
        threading.Thread(target=_serve_tasks, args=arguments, daemon=True)
        for _ in range(min(workers, len(tasks)))
    ]
    for thread in threads:
        thread.start()
    try:
        serving = len(threads)
        while serving:
            outcome = outcomes.get()
            if outcome is None:
                serving -= 1
            else:
                yield outcome
    finally:
        # where the caller has had enough, nothing more begins, and what runs is ended
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for process in tuple(running):
            process.process.kill()
        for thread in threads:
            thread.join()


def _serve_tasks(
    function: Callable[[Task], Result],
    waiting: queue.SimpleQueue[Task],
    outcomes: queue.SimpleQueue[Outcome[Task, Result] | None],
    running: set[_Process],
    timeout_s: float,
    until: float,
    environment: dict[str, str],
) -> None:
    """In a thread: one process, and the next one where it has ended. None is the last outcome."""
    process: _Process | None = None
    with contextlib.suppress(queue.Empty):
        while time.monotonic() < until:
            task = waiting.get_nowait()
            if process is None:
                process = _Process(function, environment)
                running.add(process)
            outcome = process.serve(task, timeout_s, until)
            if outcome.failure:
                process.end()
                running.discard(process)
                process = None
            outcomes.put(outcome)
    if process is not None:
        process.end()
        running.discard(process)
    outcomes.put(None)


class _Process:
    def __init__(self, function: Callable[[Any], Any], environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, function), daemon=True)
        # a spawned process takes this one's variables along
        with _environment:
            before = {name: os.environ.get(name) for name in environment}
            os.environ.update(environment)
            try:
                self.process.start()
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value
        other_end.close()
        self.starting = True

    def serve(self, task: Any, timeout_s: float, until: float) -> Outcome[Any, Any]:
        start = time.monotonic()
        try:
            if self.starting:
                # it imports PyTorch first, which is none of the task's time
                self.connection.recv()
                self.starting = False
            start = time.monotonic()
            self.connection.send(task)
            left_s = max(0.0, min(timeout_s, until - start))
            if not self.connection.poll(left_s):
                return Outcome(task, None, f"not done after {left_s:.0f} s", left_s)
            result, failure, seconds = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=10)
            failure = f"its process ended with exit status {self.process.exitcode}"
            return Outcome(task, None, failure, time.monotonic() - start)
        return Outcome(task, result, failure, seconds)

    def end(self) -> None:
        self.connection.close()
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """In the process: serve tasks until the other end closes."""
    connection.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            task = connection.recv()
            start = time.monotonic()
            result, failure = None, None
            try:
                result = function(task)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            connection.send((result, failure, time.monotonic() - start))
