"""Which samples a step asks for, and their prompts, whose videos are decoded ahead in other processes.

The order of the samples is a pure function of the seed and the step, so a resumed run needs no state for it. The rest
of the file reads ahead, and gives a sample that cannot be read a stand-in. As a command it checks records and videos:

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
import torch
from tqdm import tqdm

from config import VideoConfig
from prompts import Prompt, PromptBuilder
from records.files import read_samples  # noqa: F401  (the public name)
from records.record import Sample
from video.budget import Geometry, read_geometry
from video.cache import FrameCache
from video.frames import Frames, decode_video, to_video
from video.readers import VideoError
from video.workers import Call, CallFailed, Workers

BAD_SAMPLES = "bad_samples.jsonl"
LEAST_ASKED = 100  # a share of fewer samples than this says little: they count as so many
MOST_ATTEMPTS = 20  # samples tried in one place until the run stops: the disk is gone
NUM_PRINTED = 20  # bad samples named as they are found
NUM_LISTED = 5  # and in the error that ends a run


# ---- the order of the samples --------------------------------------------------------------------------------------


def batch_indices(
    num_samples: int, batch_size: int, step: int, seed: int, order_of: Callable[[int], np.ndarray] | None = None
) -> list[int]:
    """Indices of step `step` (from 0): every epoch has an order of its own, and batches run on across epochs.

    `order_of(epoch)` is the order of an epoch, by default `epoch_order`.

    >>> sorted(batch_indices(4, 3, 0, seed=7) + batch_indices(4, 3, 1, seed=7)[:1])
    [0, 1, 2, 3]
    """
    order_of = order_of or cache(partial(epoch_order, num_samples, seed))
    places = (divmod(place, num_samples) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(order_of(epoch)[place]) for epoch, place in places]


def epoch_order(num_samples: int, seed: int, epoch: int, difficulty: np.ndarray | None = None) -> np.ndarray:
    """All indices in the order of an epoch: a permutation of its own.

    With the `difficulty` of each sample it goes from easy to hard, the permutation deciding between equals.

    >>> epoch_order(3, seed=7, epoch=0, difficulty=np.array([0.5, 0.9, 0.1])).tolist()
    [2, 0, 1]
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
    """Up to `count` indices not in `taken`, for refill round `refill` (from 1) of a step, whatever the epoch."""
    return _shuffled_rest(num_samples, taken, (seed, step, refill))[:count]


def spare_indices(num_samples: int, taken: Sequence[int], step: int, refill: int, seed: int) -> list[int]:
    """All indices not in `taken`, in the order in which they stand in for what a step's round cannot read."""
    return _shuffled_rest(num_samples, taken, (seed, step, refill, 1))


def _shuffled_rest(num_samples: int, taken: Sequence[int], seed: tuple[int, ...]) -> list[int]:
    free = np.setdiff1d(np.arange(num_samples), np.asarray(taken))
    return np.random.default_rng(seed).permutation(free).tolist()


class Order:
    """Which samples a step asks for, as indices of `samples`: those that training still uses.

    Every `data.refilter_every` epochs the samples are dropped whose group was dead when it was last sampled. All
    processes know which those are, so they agree.
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
        num, size, seed = len(self.samples), self.cfg.data.batch_size, self.cfg.run.seed
        return batch_indices(num, size, step - self.start, seed, lambda epoch: self._order_of(self.epoch + epoch))

    def visited(self, indices: Sequence[int], alive: Sequence[bool]) -> None:
        """Take note of which groups were alive; the last visit of a sample counts."""
        for index, is_alive in zip(indices, alive, strict=True):
            (self.dead.discard if is_alive else self.dead.add)(self.samples[index].id)

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


# ---- reading ahead -------------------------------------------------------------------------------------------------


def decode_sample(sample: Sample, spec: VideoConfig, geometry: Geometry, cache: FrameCache | None) -> Frames:
    """The frames that a sample is asked about. Raises VideoError when the file cannot be read."""
    return decode_video(sample.video, spec, geometry, sample.clip, sample.fps, cache)


@dataclass(frozen=True)
class PromptReader:
    """Samples to prompts, whose videos are decoded in other processes: `with reader.workers` ends those.

    The patches of a prompt's video are on `device`, where they take memory as long as the prompt lives.
    """

    builder: PromptBuilder
    workers: Workers  # of `decode_sample`
    geometry: Geometry
    time_step: str  # video.time_step
    device: torch.device | str

    def frames(self, sample: Sample, call: Call) -> Frames:
        """What the started call decodes. Raises VideoError, also where its process died or took too long."""
        try:
            return self.workers.result(call)
        except CallFailed as error:
            raise VideoError(sample.video, str(error)) from None

    def prompt(self, sample: Sample, frames: Frames) -> Prompt:
        return self.builder(sample, to_video(frames, self.geometry, self.device, self.time_step))

    def ahead(self, samples: Sequence[Sample], window: int) -> Iterator[Prompt | VideoError]:
        """Prompts in the order of the samples, the error in place of one that fails; `window` are decoded ahead."""
        calls = self.workers.ahead(((sample,) for sample in samples), window)
        for sample, call in zip(samples, calls):
            try:
                yield self.prompt(sample, self.frames(sample, call))
            except VideoError as error:
                yield error


def make_reader(cfg, tokenizer, device) -> PromptReader:
    """The reader of a whole config, for a policy on `device`. Raises ValueError without a preprocessor file."""
    geometry, data = read_geometry(cfg.model.path), cfg.data
    frames = FrameCache(data.cache_dir, data.cache_gib) if data.cache_dir else None
    decode = partial(decode_sample, spec=cfg.video, geometry=geometry, cache=frames)
    workers = Workers(decode, data.workers, data.decode_timeout)
    return PromptReader(PromptBuilder(tokenizer, cfg.prompt), workers, geometry, cfg.video.time_step, device)


def check_readable(
    bad: Sequence[dict], num_bad: int, num: int, limit: float, see: str = "", stuck: bool = False
) -> None:
    """End the command when more than `limit` (data.max_bad_share) of `num` samples could not be read.

    It also ends where the loader is `stuck`, without a sample to stand in. `bad` are rows with an `id` and an `error`,
    of which the first are named, and `see` says where all are listed.
    """
    why = f"more than data.max_bad_share={limit:g} of them"
    if stuck:
        why = f"and nothing was left to stand in for one of them ({MOST_ATTEMPTS} samples are tried)"
    if stuck or num_bad > limit * max(num, LEAST_ASKED):
        first = "; ".join(f"{row['id']}, {row['error']}" for row in bad[:NUM_LISTED])
        raise SystemExit(
            f"error: {num_bad} of the {num} samples asked for could not be read, {why}{see}; the first: {first}"
        )


# ---- the loader ----------------------------------------------------------------------------------------------------

Started = dict[int, tuple[Sample, Call | None]]  # by place in the round: what is being decoded


@dataclass(frozen=True)
class Round:
    """The prompts of one round of sampling in a step: this process's share of its places."""

    prompts: list[Prompt]  # one for each of `places`, and maybe more that only keep this process busy
    places: list[int]  # among the round's `num_places`
    num_places: int
    taken: list[int]  # indices of all samples that the step has asked for by now, on all processes
    occurrences: list[int]  # of each prompt: how often its sample stands in the round before it
    indices: list[int]  # of every place's sample, on all processes


class Loader:
    """This process's prompts, round by round. Every process must make the same calls.

    `num_replaced` counts, over all processes, the samples of the present step that could not be read. `state` and
    `order.state` survive a resume.
    """

    def __init__(self, samples: Sequence[Sample], reader: PromptReader, cfg, run, clock: Callable):
        self.order, self.reader = Order(samples, cfg, run.state.get("order")), reader
        self.cfg, self.run, self.clock = cfg, run, clock
        self.state = {name: run.state.get(name, 0) for name in ("num_asked", "num_bad")}
        self.bad = {row["id"]: row for row in run.rows(BAD_SAMPLES)}  # their rows in that file, by id
        self.num_replaced = 0
        self._ahead: dict[int, tuple[list[int], Started]] = {}  # by step: indices, and what is being decoded
        share = cfg.data.batch_size // run.engine.world_size
        self._num_steps_ahead = max(1, -(-2 * reader.workers.num // share))

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
                self._ahead[coming] = wanted, self._start(dict(enumerate(wanted)), len(wanted))
        wanted, started = self._ahead.pop(step)
        return self._load(step, 0, wanted, [], started)

    def peek(self, step: int) -> list[Sample]:
        """The samples of step `step`, then all others, without those that could not be read. Nothing is counted."""
        coming = [self.samples[index] for index in self.order.indices(step)]
        return [sample for sample in coming + self.samples if sample.id not in self.bad]

    def refill(self, step: int, refill: int, wanted: list[int], taken: list[int]) -> Round:
        """The videos `wanted` in refill round `refill` (from 1) of a step that has asked for those `taken`."""
        return self._load(step, refill, wanted, taken, self._start(dict(enumerate(wanted)), len(wanted)))

    def _share(self, num_places: int) -> tuple[list[int], int]:
        """This process's places, and how many of them count: past the end, the last one is there to be busy with."""
        world, rank = self.run.engine.world_size, self.run.engine.rank
        share = -(-num_places // world)
        places = range(rank * share, (rank + 1) * share)
        return [min(place, num_places - 1) for place in places], sum(place < num_places for place in places)

    def _start(self, coming: dict[int, int], num_places: int) -> Started:
        """Have decoded what is to be read at this process's places; no call for what is known to be bad."""
        samples = {place: self.samples[coming[place]] for place in self._share(num_places)[0] if place in coming}
        start = self.reader.workers.start
        return {place: (of, None if of.id in self.bad else start(of)) for place, of in samples.items()}

    def _load(self, step: int, refill: int, wanted: list[int], taken: list[int], started: Started) -> Round:
        """Read this process's places; while some fail, on any process, all give them the next spares and go on."""
        places, num_own = self._share(len(wanted))
        indices, asked, spares = list(wanted), [*taken, *wanted], None
        coming, prompts = dict(enumerate(wanted)), {}  # by place: what is to be read now, and what has been
        for _ in range(MOST_ATTEMPTS):
            taken = [*taken, *coming.values()]
            self.state["num_asked"] += len(coming)
            failed = self._gather_failed(self._read(started, prompts))
            if not failed:
                before = [wanted[:i].count(wanted[i]) if indices[i] == wanted[i] else 0 for i in places]
                mine = [prompts[place] for place in places]
                return Round(mine, places[:num_own], len(wanted), taken, before, indices)
            self._note(step + 1, failed)
            if spares is None:  # drawn only when a sample fails, because drawing them permutes all records
                spares = iter(spare_indices(len(self.samples), asked, step, refill, self.cfg.run.seed))
            coming = dict(zip((row["place"] for row in failed), spares))
            self._check(stuck=len(coming) < len(failed))
            for place, index in coming.items():
                indices[place] = index
            started = self._start(coming, len(wanted))
        self._check(stuck=True)

    def _read(self, started: Started, prompts: dict[int, Prompt]) -> list[dict]:
        """Put what was started into `prompts`, by place; returns what could not be read."""
        failed = []
        for place, (sample, call) in started.items():
            try:
                if sample.id in self.bad:  # whatever a call that was started before says now
                    raise VideoError(sample.video, self.bad[sample.id]["reason"])
                with self.clock("data_wait"):
                    frames = self.reader.frames(sample, call)
                prompts[place] = self.reader.prompt(sample, frames)
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
        bad = [{"id": row["id"], "error": f"{row['path']}: {row['reason']}"} for row in self.bad.values()]
        see = f"; {self.run.dir / BAD_SAMPLES} lists them all"
        num_bad, num_asked = self.state["num_bad"], self.state["num_asked"]
        check_readable(bad, num_bad, num_asked, self.cfg.data.max_bad_share, see, stuck)
