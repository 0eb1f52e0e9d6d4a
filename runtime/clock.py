"""Seconds and peak memory of the phases of a step.

Memory is what this process holds at the most: on CUDA the allocator's, of its device, otherwise the resident set, which
Linux alone tells (and not in every container); elsewhere there is none. Not a profiler. Nothing to run.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

GIB = 2**30
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def restart_peak() -> int | None:
    """Have `peak_bytes` start again from what is held now; returns that, or None where it is not known."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        CLEAR_REFS.write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def peak_bytes() -> int:
    """The most that was held since `restart_peak`, where that knows it."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    return int(STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024


class Clock:
    """Seconds and peak GiB of each phase of a step; `phase` is told of each, and when it is over.

    Phases may stand within others, which count what they contain.

    >>> clock = Clock()
    >>> with clock("update"):
    ...     pass
    >>> "time/update" in clock.read(), clock.read()
    (True, {})
    """

    def __init__(self, phase: Callable[[str], AbstractContextManager] = nullcontext):
        self.phase, self.seconds, self.gib = phase, defaultdict(float), {}
        self._open: list[int] = []  # peaks of the phases that are not over, up to where the last one within began
        self._knows_memory = restart_peak() is not None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._enter()
        start = time.perf_counter()
        try:
            with self.phase(phase):
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:  # a video that cannot be read ends a phase, too
            self.seconds[f"time/{phase}"] += time.perf_counter() - start
            self._leave(f"memory/{phase}")

    def _enter(self) -> None:
        if self._knows_memory:
            if self._open:
                self._open[-1] = max(self._open[-1], peak_bytes())
            self._open.append(restart_peak())

    def _leave(self, name: str) -> None:
        if self._knows_memory:
            peak = max(self._open.pop(), peak_bytes())
            self.gib[name] = max(self.gib.get(name, 0.0), peak / GIB)
            if self._open:
                self._open[-1] = max(self._open[-1], peak)

    def read(self) -> dict[str, float]:
        """`time/<phase>` in seconds and `memory/<phase>` in GiB since the last call, and start again."""
        found = dict(self.seconds) | self.gib
        self.seconds, self.gib = defaultdict(float), {}
        return found
