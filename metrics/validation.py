"""Validation while a model trains: metrics on held-out samples every few steps, and the best model so far is kept.

Both trainers call a `Validator`. Below it are the choice of the samples and what they share with the training set,
which are pure functions of the samples.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data import PromptReader
from metrics.predictions import predict
from metrics.tasks import score_predictions
from model.folder import save_model
from policy import Policy
from prompts import Prompt
from records.files import read_samples
from records.record import Sample, source_of
from records.tasks import TASKS
from runtime.resumable import cut
from runtime.run import Run, warn


class Validator:
    """Metrics on the validation samples every `eval.every` steps; the model with the best score is kept in best/.

    The score is the mean over tasks of the main metric of each. The samples are `eval.num_samples` of the validation
    set, evenly over tasks and sources. A warning tells what they share with the training set `train`. `state` survives
    a resume.
    """

    def __init__(self, cfg, reader: PromptReader, run: Run, train: Sequence[Sample]):
        self.cfg, self.reader, self.run = cfg, reader, run
        self.state = {"best": run.state.get("best", -1.0)}
        self.samples = []
        if cfg.data.validation and cfg.eval.every:
            self.samples = read_samples(cfg.data.validation, cfg.data.out_of_clip, cfg.run.seed, cfg.data.manifest)
        num = len(self.samples)
        if cfg.eval.num_samples:
            self.samples = spread(self.samples, cfg.eval.num_samples)
        if self.samples and run.is_main:
            print(f"validation: {len(self.samples)} of {num} records: {counts_of(self.samples)}")
            records, videos = shared(train, self.samples)
            if records or videos:
                warn(f"{records} validation records and {videos} validation videos are in the training set as well")

    def __call__(self, step: int, policy: Policy) -> dict[str, float]:
        """`validation/<task>/<metric>` when it is time after `step` steps, else nothing."""
        if not self.samples or step % self.cfg.eval.every:
            return {}
        engine = self.run.engine
        with engine.phase("validation"), engine.whole_weights(self.cfg.model.gather_weights) as whole:
            rows = engine.gather_rows(self._predict_mine(policy, whole))
        tasks = score_predictions(rows, self.cfg.eval.answer)["tasks"]
        score = sum(tasks[task][TASKS[task].main_metric] for task in tasks) / len(tasks)

        def save(folder: Path, weights: dict | None) -> None:
            save_model(policy.model, policy.adapter, folder, self.cfg.model.path, weights)

        if score > self.state["best"] and self.run.write_folder("best", save):
            self.state["best"] = score
        found = {f"{task}/{name}": v for task in tasks for name, v in tasks[task].items() if isinstance(v, float)}
        found |= {"score": score, "num_unreadable": float(sum("error" in row for row in rows))}
        return {f"validation/{name}": value for name, value in found.items()}

    def _predict_mine(self, policy: Policy, whole: bool) -> list[dict]:
        """The rows of this process's share; unless the weights are `whole`, as many batches as every other process."""
        rank, world_size, cfg = self.run.engine.rank, self.run.engine.world_size, self.cfg.eval
        batches, stand_in = cut(self.samples[rank::world_size], cfg.batch_size), None
        if not whole:
            loaded = self.reader.ahead(self.samples, 1)
            stand_in = next((prompt for prompt in loaded if isinstance(prompt, Prompt)), None)
            batches += [[]] * (len(cut(self.samples[::world_size], cfg.batch_size)) - len(batches))
        predicted = predict(policy, batches, self.reader, cfg, stand_in=stand_in)
        return [row for rows in predicted for row in rows]


def spread(samples: Sequence[Sample], num: int) -> list[Sample]:
    """`num` of the samples in their order, spread evenly over tasks, and within a task over its sources.

    The samples of one source are evenly spaced, so that all of its files have a part.
    """
    places: dict[str, dict[str, list[int]]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample.task, {}).setdefault(source_of(sample), []).append(place)
    chosen = []
    by_task = even_shares([sum(map(len, sources.values())) for sources in places.values()], num)
    for sources, share in zip(places.values(), by_task):
        for all_of, few in zip(sources.values(), even_shares([len(p) for p in sources.values()], share)):
            chosen += [all_of[i * len(all_of) // few] for i in range(few)]
    return [samples[place] for place in sorted(chosen)]


def even_shares(sizes: Sequence[int], num: int) -> list[int]:
    """`num` shared out as evenly as groups of these sizes allow: what a small group cannot give, larger ones do.

    >>> even_shares([148, 52, 148], 200), even_shares([3, 3, 3], 4), even_shares([2, 1], 9)
    ([74, 52, 74], [1, 1, 2], [2, 1])
    """
    shares = [0] * len(sizes)
    for rank, group in enumerate(sorted(range(len(sizes)), key=lambda group: sizes[group])):
        shares[group] = min(sizes[group], (num - sum(shares)) // (len(sizes) - rank))
    return shares


def counts_of(samples: Sequence[Sample]) -> str:
    """How many samples there are of each task and source, in their order.

    >>> counts_of([Sample("a/1", "tvg", "", ""), Sample("b", "mcqa", "", ""), Sample("a/2", "tvg", "", "")])
    'tvg/a 2, mcqa 1'
    """
    counts = Counter("/".join(filter(None, (sample.task, source_of(sample)))) for sample in samples)
    return ", ".join(f"{name} {num}" for name, num in counts.items())


def shared(train: Sequence[Sample], validation: Sequence[Sample]) -> tuple[int, int]:
    """How many validation records are in the training set, by content and not by id, and how many validation videos."""
    real = {video: os.path.realpath(video) for video in {sample.video for sample in (*train, *validation)}}
    ours, theirs = (
        [replace(s, id="", video=real[s.video], type="", source="", response=None, extra=None) for s in samples]
        for samples in (train, validation)  # without what may differ between two copies of one record
    )
    known = set(ours)
    return sum(content in known for content in theirs), len(
        {content.video for content in ours} & {content.video for content in theirs}
    )
