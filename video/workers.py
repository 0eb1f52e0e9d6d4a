"""Calls in other processes, which may hang or die: each call has a time limit, and its failure is a reason to report.

A DataLoader would not do: its workers cannot be interrupted in a decoder, and one that dies ends it.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pebble import ProcessPool
NUM_STARTS = 3  # of processes that die before they take a call, until we give up


class CallFailed(Exception):
    """A call whose process died or ran out of time; its text is the reason."""


@dataclass
class Call:
    """One call of the function; `future` is None where it runs only when its result is asked for."""

    args: tuple
    future: Future | None = None


class Workers:
    """`function` in `num` processes of this one; with 0 here, when the result is asked for, and without a time limit.

    Processes start with the first call and end with the `with` block, or with this process, however it ends. They
    print nothing, see no GPU and use one thread. A signal to all of our process group, as of Ctrl-C or a launcher,
    does not reach them: this process may need them for a while.
    """

    def __init__(self, function: Callable, num: int, timeout_s: float):
        self.function, self.num, self.timeout_s = function, num, timeout_s
        self._pool: ProcessPool | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def start(self, *args: Any) -> Call:
        """Have the call made as soon as a process is free; arguments and results are pickled."""
        return Call(args, self._schedule(args) if self.num else None)

    def result(self, call: Call) -> Any:
        """What the call returns, or raises. Raises CallFailed when its process died or took too long."""
        if call.future is None:
            return self.function(*call.args)
        from pebble import ProcessExpired

        for _ in range(NUM_STARTS):
            try:
                return call.future.result()
            except ProcessExpired as error:
                raise CallFailed(f"the process that read it died ({_ending(error.exitcode)})") from None
            except TimeoutError:
                raise CallFailed(f"took more than {self.timeout_s:g} s") from None
            except BrokenProcessPool:  # processes died without a call at hand: new ones
                call.future = self._schedule(call.args)
        raise RuntimeError(f"worker processes died {NUM_STARTS} times before they took a call, see above")

    def ahead(self, arguments: Iterable[tuple], window: int) -> Iterator[Call]:
        """Calls in the order of their arguments; `window` of them are started before the first is needed."""
        calls: deque[Call] = deque()
        for args in arguments:
            calls.append(self.start(*args))
            if len(calls) > window:
                yield calls.popleft()
        yield from calls

    def _schedule(self, args: tuple) -> Future:
        if self._pool is not None and not self._pool.active:
            self._pool.join()
            self._pool = None
        if self._pool is None:
            self._pool = _make_pool(self.num, self.function)
        return self._pool.schedule(_call, args, timeout=self.timeout_s)


def _make_pool(num: int, function: Callable) -> "ProcessPool":
    import pebble.pool.process  # here, so that calls in this process need no pebble

    # its time limits are of the wall clock: one that is set forward would end every call that is under way
    pebble.pool.process.time = SimpleNamespace(time=time.monotonic, sleep=time.sleep)
    return pebble.ProcessPool(num, initializer=_prepare, initargs=(function,), context=_Context())


class _BareProcess(SpawnProcess):
    """Does not import the script that runs: every worker would load the code of models for nothing."""

    def start(self) -> None:
        main = vars(sys.modules["__main__"])
        hidden = {name: main[name] for name in ("__spec__", "__file__") if name in main}
        main.update(__spec__=None, __file__=None)
        try:
            super().start()
        finally:
            del main["__file__"]
            main.update(hidden)


class _Context(SpawnContext):
    Process = _BareProcess


def _prepare(function: Callable) -> None:
    """Runs once in every worker process."""
    import torch  # here, so that the parent may report without it

    global _function
    _function = function
    os.setsid()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(*args: Any) -> Any:
    return _function(*args)


def _ending(exitcode: int) -> str:
    return f"signal {-exitcode}" if exitcode < 0 else f"exit code {exitcode}"
