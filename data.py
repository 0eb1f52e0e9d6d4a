"""Records to `Sample`s, a data order that is a pure function of (seed, step), and the check of records and their files.

Not a DataLoader: what a step trains on is `samples[i] for i in batch_indices(...)`, so resuming needs no state.

    python data.py check train.jsonl --videos DIR --manifest manifest.jsonl
    python data.py check train.yaml validation.yaml --manifest manifest.jsonl
    python data.py check DIR                                                # every file below a folder, without records
"""

import sys

if __name__ == "__main__":  # here: a check needs no torch, which takes seconds to import
    from records.check import main

    raise SystemExit(main(doc=__doc__))

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np
from tqdm import tqdm

from prompts import Prompt, PromptBuilder
from records.files import read_samples  # noqa: F401  (the public name)
from records.record import Sample
from video.frames import Frames
from video.readers import VideoError
from video.workers import Call, CallFailed, Workers


def batch_indices(
    num_samples: int,
    batch_size: int,
    step: int,
    seed: int,
    first_epoch: int = 0,
    difficulty: np.ndarray | None = None,
    order_of: Callable[[int], np.ndarray] | None = None,
) -> list[int]:
    """Indices of step `step` (from 0): every epoch has an order of its own, and batches run on across epochs.

    Step 0 begins the epoch `first_epoch`. `order_of(epoch)` gives what `epoch_order` makes of the other arguments, for
    a caller that keeps it: making it takes as long as there are samples.

    >>> sorted(batch_indices(4, 3, 0, seed=7) + batch_indices(4, 3, 1, seed=7)[:1])
    [0, 1, 2, 3]
    >>> batch_indices(3, 4, 0, seed=7, difficulty=np.array([0.5, 0.9, 0.1]))
    [2, 0, 1, 2]
    """
    order_of = order_of or cache(partial(epoch_order, num_samples, seed, difficulty=difficulty))
    places = (divmod(place, num_samples) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(order_of(first_epoch + epoch)[place]) for epoch, place in places]


def epoch_order(num_samples: int, seed: int, epoch: int, difficulty: np.ndarray | None = None) -> np.ndarray:
    """All indices in the order of an epoch: a permutation of its own.

    With the `difficulty` of each sample it goes from easy to hard, the permutation deciding between equals.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    return order if difficulty is None else order[np.argsort(difficulty[order], kind="stable")]


def difficulties(samples: Sequence[Sample]) -> np.ndarray:
    """1 - `extra.reward_mean` of each sample, what `select_data.py` writes. Raises ValueError where there is none."""
    means = [(sample.extra or {}).get("reward_mean") for sample in samples]
    for sample, mean in zip(samples, means):
        if not isinstance(mean, int | float):
            raise ValueError(
                f"data.order=curriculum: record {sample.id!r} has no number extra.reward_mean; `python select_data.py` "
                f"writes it into selected.jsonl"
            )
    return 1.0 - np.array(means, dtype=float)


def refill_indices(num_samples: int, taken: Sequence[int], count: int, step: int, refill: int, seed: int) -> list[int]:
    """Up to `count` further indices for refill round `refill` (from 1) of a step, none of them in `taken`.

    A pure function of its arguments, like `batch_indices`; drawn from the whole data set, whatever the epoch.
    """
    free = np.setdiff1d(np.arange(num_samples), np.asarray(taken))
    return np.random.default_rng((seed, step, refill)).permutation(free)[:count].tolist()


def spare_indices(num_samples: int, taken: Sequence[int], step: int, refill: int, seed: int) -> list[int]:
    """What stands in for samples that cannot be read, in this order: everything that the step has not `taken`.

    A pure function of its arguments, like `batch_indices`; `refill` is 0 for a step's first round.
    """
    free = np.setdiff1d(np.arange(num_samples), np.asarray(taken))
    return np.random.default_rng((seed, step, refill, 1)).permutation(free).tolist()


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
    indices: list[int]  # of every place's sample, on all processes


class Order:
    """Which samples a step asks for, as indices of `samples`: those that training still uses.

    A pure function of (seed, step) and, with data.refilter_every, of which groups were dead: every so many epochs the
    samples are dropped whose group was when it was last sampled. All processes know that, so they agree.
    """

    def __init__(self, samples: Sequence[Sample], cfg, state: dict | None):
        """`state` is that of the run which is resumed, or None."""
        self.cfg = cfg
        state = state or {"start": 0, "epoch": 0, "dropped": [], "dead": []}
        self.start, self.epoch = state["start"], state["epoch"]  # first step and epoch since the last dropping
        self.dropped, self.dead = state["dropped"], set(state["dead"])  # ids
        self._use([sample for sample in samples if sample.id not in set(self.dropped)])

    @property
    def state(self) -> dict:
        """What a resumed run needs, nothing where nothing is ever dropped."""
        here = {"start": self.start, "epoch": self.epoch, "dropped": self.dropped, "dead": sorted(self.dead)}
        return {"order": here} if self.cfg.data.refilter_every else {}

    @property
    def end(self) -> int:
        """The step before which samples are dropped next."""
        num_epochs, batch_size = self.cfg.data.refilter_every, self.cfg.data.batch_size
        return self.start + -(-num_epochs * len(self.samples) // batch_size) if num_epochs else self.cfg.run.steps

    def indices(self, step: int) -> list[int]:
        size, seed = self.cfg.data.batch_size, self.cfg.run.seed
        return batch_indices(len(self.samples), size, step - self.start, seed, self.epoch, order_of=self._order_of)

    def visited(self, indices: Sequence[int], alive: Sequence[bool]) -> None:
        """Take note of which groups were alive; the last visit of a sample counts."""
        for index, is_alive in zip(indices, alive, strict=True):
            sample_id = self.samples[index].id
            if is_alive:
                self.dead.discard(sample_id)
            else:
                self.dead.add(sample_id)

    def refilter(self, step: int) -> int:
        """Drop what is due before step `step`, unless less than two batches were left; returns how many."""
        if step < self.end:
            return 0
        kept = [sample for sample in self.samples if sample.id not in self.dead]
        num_dropped = len(self.samples) - len(kept)
        self.epoch += -(-(step - self.start) * self.cfg.data.batch_size // len(self.samples))
        self.start = step
        if not num_dropped or len(kept) < 2 * self.cfg.data.batch_size:  # spares are drawn from what is left
            return 0
        self.dropped = self.dropped + [sample.id for sample in self.samples if sample.id in self.dead]
        self.dead = set()
        self._use(kept)
        return num_dropped

    def _use(self, samples: list[Sample]) -> None:
        self.samples = samples
        difficulty = difficulties(samples) if self.cfg.data.order == "curriculum" else None
        # steps are asked for in their order: only the present epoch and the next one are asked for again
        self._order_of = lru_cache(2)(partial(epoch_order, len(samples), self.cfg.run.seed, difficulty=difficulty))


class Loader:
    """This process's prompts, round by round. Every process must make the same calls.

    `num_replaced` counts, over all processes, the samples of the present step that could not be read. `state` and
    `order.state` survive a resume.
    """

    def __init__(self, samples: Sequence[Sample], builder: PromptBuilder, workers: Workers, cfg, run, clock: Callable):
        self.order, self.builder, self.workers = Order(samples, cfg, run.state.get("order")), builder, workers
        self.cfg, self.run, self.clock = cfg, run, clock
        self.state = {name: run.state.get(name, 0) for name in ("num_asked", "num_bad")}
        self.bad = {row["id"]: row for row in run.rows(BAD_SAMPLES)}  # their rows in that file, by id
        self.num_replaced = 0
        self._ahead: dict[int, tuple[list[int], list[Call | None]]] = {}  # indices and started calls of coming steps
        share = cfg.data.batch_size // run.engine.world_size
        self._num_steps_ahead = max(1, -(-2 * workers.num // share))

    @property
    def samples(self) -> list[Sample]:
        """Those that training still uses."""
        return self.order.samples

    def batch(self, step: int) -> Round:
        """The videos of step `step`; those of the next steps are decoded meanwhile."""
        self.num_replaced = 0
        num_dropped = self.order.refilter(step)
        if num_dropped and self.run.is_main:
            left = f"{num_dropped} samples dropped, whose rewards were all alike; {len(self.samples)} left"
            tqdm.write(f"step {step + 1}: {left} (data.refilter_every)", file=sys.stderr)
        for coming in range(step, min(step + 1 + self._num_steps_ahead, self.cfg.run.steps, self.order.end)):
            if coming not in self._ahead:
                wanted = self.order.indices(coming)
                self._ahead[coming] = wanted, self._start_share(wanted)
        wanted, calls = self._ahead.pop(step)
        return self._load(step, 0, wanted, [], calls)

    def peek(self, step: int) -> list[Sample]:
        """The samples of step `step`, then all others, without those that could not be read; nothing is counted."""
        coming = [self.samples[index] for index in self.order.indices(step)]
        return [sample for sample in coming + self.samples if sample.id not in self.bad]

    def refill(self, step: int, refill: int, wanted: list[int], taken: list[int]) -> Round:
        """The videos `wanted` in refill round `refill` (from 1) of a step that has asked for those `taken`."""
        return self._load(step, refill, wanted, taken, self._start_share(wanted))

    def _share(self, num_places: int) -> tuple[list[int], int]:
        """This process's places, and how many of them count: past the end, the last one is there to be busy with."""
        world, rank = self.run.engine.world_size, self.run.engine.rank
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
        asked, spares = [*taken, *wanted], None
        prompts: list[Prompt | None] = [None] * len(places)
        coming = dict(enumerate(wanted))  # what is to be read now, by place
        indices = list(wanted)
        replaced: set[int] = set()  # places
        for _ in range(MOST_ATTEMPTS):
            taken = [*taken, *coming.values()]
            self.state["num_asked"] += len(coming)
            failed = self._gather_failed(self._read(coming, places, prompts, calls))
            if not failed:
                before = [0 if i in replaced else wanted[:i].count(wanted[i]) for i in places]
                return Round(prompts, places[:num_own], len(wanted), taken, before, indices)
            replaced |= {row["place"] for row in failed}
            self._note(step + 1, failed)
            if spares is None:  # drawn only when a sample fails, because drawing them permutes all records
                spares = iter(spare_indices(len(self.samples), asked, step, refill, self.cfg.run.seed))
            coming = dict(zip((row["place"] for row in failed), spares))
            for place, index in coming.items():
                indices[place] = index
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
            num = self.run.engine.sums({"failed": float(len(failed))})["failed"]
            rows = self.run.engine.gather_rows(failed) if num else []
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
