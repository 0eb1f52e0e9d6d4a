"""A time limit on waiting for other processes: an error that names those that have not come, in place of a hang.

Every process says every few seconds, through the store that the processes met in, to how many meetings (collective
calls) it has come and what it is doing. One that has waited for too long reads what the others said, names those that
came to fewer meetings or are silent, and ends. Independent of the backend: NCCL's own limit names nobody. Where
processes work on their own for long and unequally, as evaluation does, `wait_for_work` waits for signs of life and not
for arrival. Times are each process's own, by its monotonic clock.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError, PrefixStore, TCPStore

LONGEST_BEAT_S = 2.0  # between two signs of life
SILENT_BEATS = 2.5  # without a sign of life, then a process counts as silent


class Watchdog:
    """What this process is doing, told to the others; it waits for them for `limit_s` at most. Alone it does nothing.

    `step`, counted from 1, is set by the loop.
    """

    def __init__(self, rank: int, world_size: int, limit_s: float):
        self.rank, self.limit_s, self.beat_s = rank, limit_s, min(LONGEST_BEAT_S, limit_s / 10)
        self.others = [other for other in range(world_size) if other != rank]
        self.step = self.num_meetings = self._num_beats = 0
        self._phases = [("start", time.monotonic())]
        self._waiting_since: float | None = None
        self._heard: dict[int, tuple[int, float]] = {}  # number of each process's last sign of life, and when it came
        self._ended = threading.Event()
        if self.others:  # a connection of our own to the store, which another thread may keep busy
            store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self._store = PrefixStore("watchdog", store)
            self._beat()
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the block does, as the others' messages will call it."""
        self._phases.append((name, time.monotonic()))
        try:
            yield
        finally:
            self._phases.pop()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """The block ends only when all processes have come to it."""
        self.num_meetings += 1
        outer, self._waiting_since = self._waiting_since, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.others and (isinstance(error, DistError) or "by peer" in str(error)):  # as gloo says that one died
                self._late()  # listen from here on
                time.sleep((SILENT_BEATS + 1) * self.beat_s)
                raise SystemExit(f"{self.report()} ({error})") from None
            raise
        finally:
            self._waiting_since = outer

    def wait_for_work(self) -> None:
        """Return once all processes have come here, however long the work of each has taken.

        A collective call behind it meets no limit of its own. One that has been silent for `limit_s` ends this process.
        One that gives signs of life and does not come, maybe because its work hangs, is named every `limit_s`.
        """
        self.num_meetings += 1
        since = told = time.monotonic()
        try:
            if self.others:
                self._beat()
            while coming := [rank for rank in self.others if self._hear(rank)[0]["num_meetings"] < self.num_meetings]:
                if max(self._hear(rank)[1] for rank in coming) > self.limit_s:
                    break
                if time.monotonic() - told > self.limit_s:
                    told = time.monotonic()
                    print(f"rank {self.rank} waits: {'; '.join(self._late())}", file=sys.stderr, flush=True)
                time.sleep(self.beat_s)
        except DistError:  # the store is gone
            coming = self.others
        if coming:
            self._waiting_since = since
            raise SystemExit(self.report())

    def stop(self) -> None:
        self._ended.set()

    def report(self) -> str:
        """One line: for how long this process has waited, and what is known of those that did not come."""
        now = time.monotonic()
        waited_s = now - (self._waiting_since or now)
        where = f"in phase {self._phases[-1][0]} of step {self.step}"
        late = "; ".join(self._late()) or "all others have come, so it is their connection that hangs"
        return f"error: rank {self.rank} has waited for {waited_s:.0f} s {where}: {late}"

    def _late(self) -> list[str]:
        """What is known of those that have not come to this meeting, or are silent."""
        try:
            return [text for rank in self.others if (text := self._late_text(rank))]
        except DistError:
            return ["the store that the processes met in is gone, and with it the launcher or rank 0"]

    def _late_text(self, rank: int) -> str:
        if not self._store.check([str(rank)]):
            return f"rank {rank} has not started"
        state, silent_s = self._hear(rank)
        doing = f"in phase {state['phase']} of step {state['step']} for {state['phase_s']:.0f} s"
        if silent_s > SILENT_BEATS * self.beat_s:
            return f"rank {rank} gives no sign of life, it was {doing}"
        return f"rank {rank} has not arrived, it is {doing}" if state["num_meetings"] < self.num_meetings else ""

    def _hear(self, rank: int) -> tuple[dict, float]:
        """What a process last said, and for how long nothing new has come."""
        state = json.loads(self._store.get(str(rank)))
        if rank not in self._heard or self._heard[rank][0] != state["beat"]:
            self._heard[rank] = state["beat"], time.monotonic()
        return state, time.monotonic() - self._heard[rank][1]

    def _beat(self) -> None:
        phase, since = self._phases[-1]
        self._num_beats += 1
        state = {"num_meetings": self.num_meetings, "step": self.step, "phase": phase, "beat": self._num_beats}
        self._store.set(str(self.rank), json.dumps(state | {"phase_s": time.monotonic() - since}))

    def _watch(self) -> None:
        while not self._ended.wait(self.beat_s):
            since = self._waiting_since
            waited_s = time.monotonic() - since if since is not None else 0.0
            try:
                self._beat()
                if waited_s > self.limit_s / 2:  # listen for who is silent
                    self._late()
            except DistError:  # the store is gone; the limit holds all the same
                pass
            if waited_s > self.limit_s:
                print(self.report(), file=sys.stderr, flush=True)
                os._exit(1)
