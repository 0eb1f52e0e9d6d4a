"""Seconds and peak memory of the phases of a step.

On CUDA memory is what the allocator holds of this process's device, otherwise the resident set. Only Linux tells the
peak of the latter, and not in every container; where nothing tells it, no memory is reported.
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
    """Seconds and peak GiB of each phase of a step, counting the phases within it; `phase` is told of each.

    >>> clock = Clock()
    >>> with clock("update"):
    ...     pass
    >>> "time/update" in clock.read(), clock.read()
    (True, {})
    """

    def __init__(self, phase: Callable[[str], AbstractContextManager] = nullcontext):
        self.phase, self.seconds, self.gib = phase, defaultdict(float), defaultdict(float)
        self._open: list[str] = []  # phases that are not over
        self._knows_memory = restart_peak() is not None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._note_peak()
        self._open.append(phase)
        start = time.perf_counter()
        try:
            with self.phase(phase):
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:  # a video that cannot be read ends a phase, too
            self.seconds[f"time/{phase}"] += time.perf_counter() - start
            self._note_peak()
            self._open.pop()

    def _note_peak(self) -> None:
        """The peak since the last call belongs to every open phase."""
        if self._knows_memory:
            for phase in self._open:
                self.gib[f"memory/{phase}"] = max(self.gib[f"memory/{phase}"], peak_bytes() / GIB)
            restart_peak()

    def read(self) -> dict[str, float]:
        """`time/<phase>` in seconds and `memory/<phase>` in GiB since the last call, and start again."""
        found = dict(self.seconds | self.gib)
        self.seconds, self.gib = defaultdict(float), defaultdict(float)
        return found
