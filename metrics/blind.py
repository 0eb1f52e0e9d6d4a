"""What an answer earns that looks at no video: the best constant answer of a training set, and clips that are swapped.

A constant answer is one option letter, or one span as shares of the clip's duration, for all questions of a task. It is
chosen on the training set and scored on the test set. It needs no model, no videos and no torch.

    python -m metrics.blind charades_sta_train.jsonl charades_sta_test.jsonl
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from metrics.rows import truth_of
from metrics.tasks import score_predictions
from records.files import read_for_floor, read_samples
from records.record import Sample

NUM_SHARES = 100  # the starts and ends that are tried are hundredths of the duration


def floor_of(data: str, tests: Sequence[Sample], out_of_clip: str = "clamp", seed: int = 0) -> dict[str, dict]:
    """Metrics on `tests` of the best constant answers of the training set `data`, by task, named as the model's are.

    Each task also has its `constant`: the training set, the `choice` and the `span`. A task without a record in the
    training set has no floor. Records of the training set that cannot be used are left out, and a line counts them.
    """
    of_task: dict[str, list[Sample]] = {sample.task: [] for sample in tests}
    for sample in read_for_floor(data, out_of_clip, seed):
        if sample.task in of_task:
            of_task[sample.task].append(sample)
    found = {}
    for task, train in of_task.items():
        if train:
            constant = best_constant(train)
            rows = []  # as predictions.jsonl would have them
            for sample in (sample for sample in tests if sample.task == task):
                spans = [[share * sample.duration for share in constant["span"]]] if "span" in constant else []
                rows.append(truth_of(sample) | {"pred_choice": constant.get("choice"), "pred_segments": spans})
            found[task] = score_predictions(rows)["tasks"][task] | {"constant": {"data": data} | constant}
    return found


def best_constant(train: Sequence[Sample]) -> dict[str, Any]:
    """The `choice` and the `span`, those that the task has, that do best on samples of one task.

    The choice is the most frequent letter. The span is the one with the largest mean IoU.
    """
    choices = Counter(sample.answer for sample in train if sample.answer)
    best = {"choice": min(choices, key=lambda letter: (-choices[letter], letter))} if choices else {}
    return best | ({"span": list(best_span(train))} if train[0].segments else {})


def best_span(train: Sequence[Sample]) -> tuple[float, float]:
    """Start and end, as shares of the duration, whose mean IoU with the best true segment of each sample is largest.

    >>> best_span([Sample("a", "tvg", "", "", 10.0, segments=((2.0, 6.0),))])
    (0.2, 0.6)
    """
    first_N = np.cumsum([0, *(len(sample.segments) for sample in train[:-1])])
    starts_M, ends_M = np.array([np.divide(span, s.duration) for s in train for span in s.segments]).T
    best = (-1.0, 0, 0)
    for start in range(NUM_SHARES):
        ends_E1 = np.arange(start + 1, NUM_SHARES + 1)[:, None] / NUM_SHARES
        overlap_EM = (np.minimum(ends_E1, ends_M) - np.maximum(start / NUM_SHARES, starts_M)).clip(0)
        iou_EM = overlap_EM / (ends_E1 - start / NUM_SHARES + ends_M - starts_M - overlap_EM)
        mean_E = np.maximum.reduceat(iou_EM, first_N, axis=1).mean(1)
        end = int(mean_E.argmax())
        best = max(best, (float(mean_E[end]), -start, -(start + 1 + end)))
    return -best[1] / NUM_SHARES, -best[2] / NUM_SHARES


def in_words(constant: dict[str, Any]) -> str:
    """What the constant answer is.

    >>> in_words({"data": "train.jsonl", "choice": "B", "span": [0.15, 0.85]})
    'B, 15% to 85% of the clip'
    """
    span = "{:.0%} to {:.0%} of the clip".format(*constant["span"]) if "span" in constant else ""
    return ", ".join(filter(None, (constant.get("choice"), span)))


def floor_line(task: str, floor: dict[str, Any]) -> str:
    """The floor of a task in one line, without what is always 0 or the same for one span."""
    shown = {k: v for k, v in floor.items() if isinstance(v, float) and k != "parse_fail" and not k.endswith("_set")}
    numbers = " ".join(f"{name} {value:.2f}" for name, value in shown.items())
    return f"floor of {task}, always {in_words(floor['constant'])}: n {floor['n']} {numbers}"


def swap_clips(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample with its question and truth, but with a clip of another video, the nearest one in duration.

    The clips stand in the order of their durations (those without one come first, as if they had none), and each clip
    takes the nearer of its two neighbours of another video. Raises ValueError where there is only one video.
    """
    clips: dict[tuple, float] = {}  # and their durations: not every record says it
    for sample in samples:
        clip = (sample.video, sample.clip, sample.fps)
        clips[clip] = max(clips.get(clip, 0.0), sample.duration or 0.0)
    order = sorted(clips, key=lambda clip: (clips[clip], clip[0], clip[1] or ()))
    before, after = _of_other_videos(order), _of_other_videos(order[::-1])
    taken = {}
    for clip in clips:
        near = [other for other in (after[clip], before[clip]) if other]
        if not near:
            raise ValueError("eval.blind=true needs clips of at least two videos")
        taken[clip] = min(near, key=lambda other: abs(clips[other] - clips[clip]))
    shown = [taken[sample.video, sample.clip, sample.fps] for sample in samples]
    return [replace(sample, video=v, clip=clip, fps=fps) for sample, (v, clip, fps) in zip(samples, shown)]


def _of_other_videos(order: Sequence[tuple]) -> dict[tuple, tuple | None]:
    """For each clip the last one before it that is of another video, or None."""
    found, last, other = {}, None, None
    for clip in order:
        other = last if last and last[0] != clip[0] else other
        found[clip], last = other, clip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="records whose best constant answer is taken: .yaml, .jsonl or .json")
    parser.add_argument("test", help="records that it is scored on")
    args = parser.parse_args(argv)
    try:
        found = floor_of(args.train, read_samples(args.test, need_videos=False))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if not found:
        raise SystemExit(f"error: {args.train} has no record of a task of {args.test}")
    for task, floor in found.items():
        print(floor_line(task, floor))


if __name__ == "__main__":
    main()
