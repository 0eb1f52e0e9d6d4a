"""Two splits side by side: the validation samples that are answered, and what they share with the training set.

Both are pure functions of the samples. Nothing to run.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from records import Sample, source_of


def spread(samples: Sequence[Sample], num: int) -> list[Sample]:
    """`num` of the samples in their order, as evenly over the tasks as they allow, and within a task over its sources.

    Those of one source are evenly spaced, so that all of its files have a part. All samples where there are no more.
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
    """`num` shared out as evenly as groups of these sizes allow: what a small one cannot give, the others do.

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
    """How many validation records are in the training set, by their content, and how many validation videos are.

    Ids say nothing: two files may both be numbered from 0.
    """
    real = {video: os.path.realpath(video) for video in {sample.video for sample in (*train, *validation)}}
    contents = {_content(sample, real) for sample in train}
    records = sum(_content(sample, real) in contents for sample in validation)
    return records, len({real[sample.video] for sample in train} & {real[sample.video] for sample in validation})


def _content(sample: Sample, real: Mapping[str, str]) -> Sample:
    """The sample without what may differ between two copies of one record, and with the real path of its video."""
    return replace(sample, id="", video=real[sample.video], type="", source="", response=None, extra=None)
