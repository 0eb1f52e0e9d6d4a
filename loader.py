"""The prompts of the coming steps, their videos decoded ahead in other processes; what cannot be read is replaced.

Not a DataLoader: which samples a step asks for is a pure function of (seed, step), in data.py, and nothing here changes
it. A sample whose video fails is replaced by another one with its own label, the next spare of the step: which one
depends on (seed, step) and on what else failed in it, but not on the number of processes. What failed in a step before
fails again without being decoded: bad_samples.jsonl in the run folder lists it, so that a resumed run knows as much.
Only a video that fails now and then (a time limit on a busy machine) can make two runs differ.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object
from tqdm import tqdm

from data import batch_indices, spare_indices
from prompts import Prompt, PromptBuilder
from records import Sample
from video import Frames, VideoError
from workers import Call, CallFailed, Workers

BAD_SAMPLES = "bad_samples.jsonl"
LEAST_ASKED = 100  # a share of fewer samples than this says little: they count as so many
MOST_ATTEMPTS = 20  # samples tried in one place until the run stops: the disk is gone
NUM_PRINTED = 20  # bad samples named as they are found
NUM_LISTED = 5  # and in the error that ends a run


def make_workers(builder: PromptBuilder, cfg) -> Workers:
    """The processes that decode for `builder`; a context manager. `cfg` is the section data."""
    return Workers(builder.decode, cfg.workers, cfg.decode_timeout)


def frames_of(workers: Workers, sample: Sample, call: Call) -> Frames:
    """What the started call decodes. Raises VideoError, also where its process died or took too long."""
    try:
        return workers.result(call)
    except CallFailed as error:
        raise VideoError(sample.video, str(error)) from None


def read_ahead(
    samples: Sequence[Sample], builder: PromptBuilder, workers: Workers, window: int
) -> Iterator[Prompt | VideoError]:
    """Prompts in the order of the samples, the error in place of one that fails; `window` are decoded ahead."""
    calls = workers.ahead(((sample,) for sample in samples), window)
    for sample, call in zip(samples, calls):
        try:
            yield builder.prompt(sample, frames_of(workers, sample, call))
        except VideoError as error:
            yield error


@dataclass(frozen=True)
class Round:
    """The prompts of one round of sampling in a step: this process's share of its places."""

    prompts: list[Prompt]  # one for each of `places`, and maybe more that only keep this process busy
    places: list[int]  # among the round's `num_places`
    num_places: int
    taken: list[int]  # indices of all samples that the step has asked for by now, on all processes
    occurrences: list[int]  # of each prompt: how often its sample stands in the round before it


class Loader:
    """This process's prompts, round by round. Every process must make the same calls.

    `num_replaced` counts, over all processes, the samples of the present step that could not be read. `state` survives
    a resume.
    """

    def __init__(self, samples: Sequence[Sample], builder: PromptBuilder, workers: Workers, cfg, run, clock: Callable):
        self.samples, self.builder, self.workers = samples, builder, workers
        self.cfg, self.run, self.clock = cfg, run, clock
        self.state = {name: run.state.get(name, 0) for name in ("num_asked", "num_bad")}
        self.bad = {row["id"]: row for row in run.rows(BAD_SAMPLES)}  # their rows in that file, by id
        self.num_replaced = 0
        self._ahead: dict[int, list[Call]] = {}  # started calls of coming steps, by step
        share = cfg.data.batch_size // run.accelerator.num_processes
        self._num_steps_ahead = max(1, -(-2 * workers.num // share))

    def batch(self, step: int) -> Round:
        """The videos of step `step`; those of the next steps are decoded meanwhile."""
        self.num_replaced = 0
        for coming in range(step, min(step + 1 + self._num_steps_ahead, self.cfg.run.steps)):
            if coming not in self._ahead:
                self._ahead[coming] = self._start_share(self._wanted(coming))
        return self._load(step, 0, self._wanted(step), [], self._ahead.pop(step))

    def refill(self, step: int, refill: int, wanted: list[int], taken: list[int]) -> Round:
        """The videos `wanted` in refill round `refill` (from 1) of a step that has asked for those `taken`."""
        return self._load(step, refill, wanted, taken, self._start_share(wanted))

    def _wanted(self, step: int) -> list[int]:
        return batch_indices(len(self.samples), self.cfg.data.batch_size, step, self.cfg.run.seed)

    def _share(self, num_places: int) -> tuple[list[int], int]:
        """This process's places, and how many of them count: past the end, the last one is there to be busy with."""
        world, rank = self.run.accelerator.num_processes, self.run.accelerator.process_index
        share = -(-num_places // world)
        places = range(rank * share, (rank + 1) * share)
        return [min(place, num_places - 1) for place in places], sum(place < num_places for place in places)

    def _start_share(self, wanted: list[int]) -> list[Call | None]:
        return [self._start(wanted[place]) for place in self._share(len(wanted))[0]]

    def _start(self, index: int) -> Call | None:
        sample = self.samples[index]
        return None if sample.id in self.bad else self.workers.start(sample)

    def _load(self, step: int, refill: int, wanted: list[int], taken: list[int], calls: list[Call | None]) -> Round:
        """Read this process's places; while some fail, on any process, all give them the next spares and go on."""
        places, num_own = self._share(len(wanted))
        spares = iter(spare_indices(len(self.samples), [*taken, *wanted], step, refill, self.cfg.run.seed))
        prompts: list[Prompt | None] = [None] * len(places)
        coming = dict(enumerate(wanted))  # what is to be read now, by place
        replaced: set[int] = set()  # places
        for _ in range(MOST_ATTEMPTS):
            taken = [*taken, *coming.values()]
            self.state["num_asked"] += len(coming)
            failed = self._gather_failed(self._read(coming, places, prompts, calls))
            if not failed:
                before = [0 if i in replaced else wanted[:i].count(wanted[i]) for i in places]
                return Round(prompts, places[:num_own], len(wanted), taken, before)
            replaced |= {row["place"] for row in failed}
            self._note(step + 1, failed)
            coming = dict(zip((row["place"] for row in failed), spares))
            self._check(stuck=len(coming) < len(failed))
            calls = [self._start(coming[place]) if place in coming else None for place in places]
        self._check(stuck=True)

    def _read(self, coming: dict[int, int], places: list[int], prompts: list, calls: list) -> list[dict]:
        """Put what is coming to this process's places into `prompts`; returns what could not be read."""
        failed = []
        for i, place in enumerate(places):
            if place not in coming:
                continue
            sample = self.samples[coming[place]]
            try:
                if sample.id in self.bad:  # whatever a call that was started before says now
                    raise VideoError(sample.video, self.bad[sample.id]["reason"])
                with self.clock("data_wait"):
                    frames = frames_of(self.workers, sample, calls[i])
                prompts[i] = self.builder.prompt(sample, frames)
            except VideoError as error:
                failed.append({"place": place, "id": sample.id, "path": error.path, "reason": error.reason})
        return failed

    def _gather_failed(self, failed: list[dict]) -> list[dict]:
        """What all processes could not read, in the order of the places, each place once."""
        with self.clock("data_wait"):
            num = self.run.sums({"failed": float(len(failed))})["failed"]
            rows = gather_object(failed) if num else []
        by_place = {row["place"]: row for row in reversed(rows)}
        return [by_place[place] for place in sorted(by_place)]

    def _note(self, step: int, rows: list[dict]) -> None:
        """Count what could not be read; remember and list the samples that are new."""
        self.state["num_bad"] += len(rows)
        self.num_replaced += len(rows)
        for row in rows:
            if row["id"] in self.bad:
                continue
            self.bad[row["id"]] = {"step": step} | {key: row[key] for key in ("id", "path", "reason")}
            self.run.append(BAD_SAMPLES, [self.bad[row["id"]]])
            if self.run.is_main and len(self.bad) <= NUM_PRINTED:
                tqdm.write(f"step {step}: {row['id']} replaced; {row['path']}: {row['reason']}", file=sys.stderr)
            if self.run.is_main and len(self.bad) == NUM_PRINTED:
                tqdm.write(f"further ones are only listed, in {self.run.dir / BAD_SAMPLES}", file=sys.stderr)

    def _check(self, stuck: bool) -> None:
        asked, bad, limit = self.state["num_asked"], self.state["num_bad"], self.cfg.data.max_bad_share
        if not stuck and bad <= limit * max(asked, LEAST_ASKED):
            return
        why = f"more than data.max_bad_share={limit:g} of them"
        if stuck:
            why = f"and nothing was left to stand in for one of them ({MOST_ATTEMPTS} samples are tried)"
        rows = list(self.bad.values())[:NUM_LISTED]
        listed = "; ".join(f"{row['id']}, {row['path']}: {row['reason']}" for row in rows)
        raise SystemExit(
            f"error: {bad} of the {asked} samples asked for could not be read, {why}. All are listed in "
            f"{self.run.dir / BAD_SAMPLES}; the first: {listed}"
        )
