"""Text and target to a reward: answer parsing, temporal IoU and the weighted sum of the parts.

Not a model, a metric (`eval.py`) or a loader: a bad ground truth is rejected when the data is read. Everything here is
total: any response gives finite numbers in [0, 1] in time linear in its length, without `eval`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from answers import Segment, layout_ok, parse_answer, parse_choice, parse_segments  # noqa: F401  (public names)
from records.tasks import TASKS


@dataclass(frozen=True)
class Reward:
    """One response's reward: the weighted mean of its parts, and the parts; from `score` every number in [0, 1]."""

    total: float
    parts: dict[str, float]


def temporal_iou(pred: Sequence[Segment], truth: Sequence[Segment]) -> float:
    """Intersection over union of two sets of segments in seconds; overlaps within a side count once.

    0.0 when a side is empty or the union has no length. Raises ValueError for a reversed or non-finite
    segment.

    >>> temporal_iou([(3, 7)], [(5, 9)])  # 2 s of 6 s
    0.3333333333333333
    """
    union_s = _length(_merge([*pred, *truth]))
    return min(1.0, _overlap(_merge(pred), _merge(truth)) / union_s) if union_s > 0 else 0.0


def timestamp_iou(pred: Sequence[Segment], truth: Sequence[Segment], duration: float | None) -> float:
    """Time-R1's timestamp-aware IoU: IoU x (1 - |start - start'| / duration) x (1 - |end - end'| / duration).

    Segments and `duration` in seconds from 0. Of several segments the IoU is that of the unions, start and end are
    those of the hull. With `duration` None the last end of either side stands in for it. A miss pays 0. (Time-R1, arXiv
    2503.13377, whose code divides by the hull and not by the union: the same for two spans that overlap.)

    >>> round(timestamp_iou([(3, 7)], [(5, 9)], 20), 6)  # 1/3 x 0.9 x 0.9
    0.27
    """
    iou = temporal_iou(pred, truth)
    if iou == 0:
        return 0.0
    (start, end), (true_start, true_end) = _hull(pred), _hull(truth)
    length_s = duration or max(end, true_end)
    return iou * max(0.0, 1 - abs(start - true_start) / length_s) * max(0.0, 1 - abs(end - true_end) / length_s)


def distance_iou(pred: Sequence[Segment], truth: Sequence[Segment]) -> float:
    """Distance-IoU in one dimension, IoU - (d / c)^2, mapped from [-1, 1] to [0, 1] by (1 + x) / 2.

    d is the distance of the centres, c the length of the hull of both sides. (Zheng et al. 2020, arXiv 1911.08287,
    eq. 7: the loss 1 - IoU + d^2 / c^2.) Of several segments the centre is that of the hull, the IoU the smaller of
    the unions' and the hulls': points at both ends of the video, which cost no IoU, would lower d / c for any answer.
    0 for an empty side. It tells misses apart, and so pays them: a span beside the truth gets 3/8 where they touch and
    less the farther off, a point inside the truth up to 1/2, and the whole video often 1/2 and more.

    >>> distance_iou([(0, 2)], [(6, 8)]), distance_iou([(0, 20)], [(4, 8)])  # (1 - (6/8)^2) / 2, (1 + 0.2 - 0.04) / 2
    (0.21875, 0.58)
    """
    if not pred or not truth:
        return 0.0
    (start, end), (true_start, true_end) = hulls = _hull(pred), _hull(truth)
    iou = min(temporal_iou(pred, truth), temporal_iou(hulls[:1], hulls[1:]))
    hull_s = max(end, true_end) - min(start, true_start)
    distance_s = abs((start - true_start) / 2 + (end - true_end) / 2)
    return (1 + iou - min(1.0, distance_s / hull_s) ** 2) / 2 if hull_s > 0 else 0.0


def temporal_iop(pred: Sequence[Segment], truth: Sequence[Segment]) -> float:
    """Intersection over the predicted length, of two sets of segments in seconds.

    A prediction of no length has the share of its points that lie in a true segment, borders included
    (NExT-GQA's scorer: 1 inside, 0 outside). Raises ValueError for a reversed or non-finite segment.

    >>> temporal_iop([(3, 7)], [(5, 9)]), temporal_iop([(6, 6)], [(5, 9)])
    (0.5, 1.0)
    """
    pred, truth = _merge(pred), _merge(truth)
    pred_s = _length(pred)
    if pred_s > 0:
        return min(1.0, _overlap(pred, truth) / pred_s)
    inside = [any(start <= point <= end for start, end in truth) for point, _ in pred]
    return sum(inside) / len(inside) if inside else 0.0


def score(text: str, sample: Any, cfg: Any) -> Reward:
    """Reward of one response: sum(weight x part) / sum(weights) over the parts of the sample's task.

    `cfg` has the sections `prompt` and `rewards`. Where all weights are 0 the total is 0. Predicted segments are
    clipped to [0, duration] where the sample has a duration (seconds). With `rewards.format_gates_task`, `format` is 1
    only when every part of the answer parses as well, and the task's parts count only then. Without it `format` is the
    layout alone. A truth without length, which the data loader refuses, has IoU 0.
    """
    part_names, weights = TASKS[sample.task].parts, getattr(cfg.rewards, sample.task)
    values = {"format": float(layout_ok(text, cfg.prompt.think))}
    if "answer" in part_names:
        choice = parse_choice(text, sample.options)
        values["answer"] = float(choice is not None and choice == sample.answer)
    if "iou" in part_names:
        end_s = math.inf if sample.duration is None else sample.duration
        pred = [(min(start, end_s), min(end, end_s)) for start, end in parse_segments(text, sample.options)]
        kinds = {"iou": temporal_iou, "distance_iou": distance_iou}
        kinds["timestamp_iou"] = partial(timestamp_iou, duration=sample.duration)
        values["iou"] = kinds[cfg.rewards.overlap](pred, sample.segments)
    if cfg.rewards.format_gates_task and not (values["format"] and parses(text, sample)):
        values = dict.fromkeys(part_names, 0.0)
    weight = {name: getattr(weights, name) for name in part_names}
    total = sum(weight[name] * values[name] for name in part_names)
    return Reward(total / (sum(weight.values()) or 1.0), values)


def parses(text: str, sample: Any) -> bool:
    """Whether every part of the answer that the sample's task asks for can be read from the response."""
    task = TASKS[sample.task]
    choice_ok = not task.has_options or parse_choice(text, sample.options) is not None
    return choice_ok and (not task.has_segments or bool(parse_segments(text, sample.options)))


def task_reward(task: str, parts: Mapping[str, float]) -> float:
    """The reward without its format: the mean of the task's own parts, 1 for a perfect answer.

    >>> task_reward("gqa", {"format": 1.0, "answer": 1.0, "iou": 0.5, "brevity": 0.3})
    0.75
    """
    own = TASKS[task].parts[1:]
    return sum(parts[name] for name in own) / len(own)


def format_answer(sample: Any) -> str:
    """The answer block a perfect response ends with, tags included: the target of supervised tuning.

    Times in seconds with at most two decimals, e.g. `<answer>B, 3 to 7.25, 9 to 12</answer>`.
    """
    task = TASKS[sample.task]
    pieces = [sample.answer] if task.has_options else []
    if task.has_segments:
        pieces += [f"{_decimal(start)} to {_decimal(end)}" for start, end in sample.segments]
    return f"<answer>{', '.join(pieces)}</answer>"


def _hull(segments: Sequence[Segment]) -> Segment:
    return min(start for start, _ in segments), max(end for _, end in segments)


def _merge(segments: Iterable[Segment]) -> list[Segment]:
    """Sorted, disjoint segments with the same union."""
    merged: list[Segment] = []
    for start, end in sorted(map(tuple, segments)):
        if not -math.inf < start <= end < math.inf:
            raise ValueError(f"not a segment: ({start}, {end}), expected finite start <= end in seconds")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(merged: list[Segment]) -> float:
    return sum(end - start for start, end in merged)


def _overlap(a: list[Segment], b: list[Segment]) -> float:
    """Length of the intersection of two merged lists."""
    total_s = 0.0
    for (start, end), (other_start, other_end) in product(a, b):
        total_s += max(0.0, min(end, other_end) - max(start, other_start))
    return total_s


def _decimal(seconds: float) -> str:
    return f"{seconds:.2f}".rstrip("0").rstrip(".")
