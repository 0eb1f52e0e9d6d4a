"""Text and target to a reward: answer parsing, temporal IoU and the weighted sum of the parts.

Not a model, a metric (`eval.py`) or a loader: a bad ground truth is rejected when the data is read. Everything here is
total: any response gives finite numbers in [0, 1] in time linear in its length, without `eval`.
"""

import json
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Segment = tuple[float, float]  # (start, end) in seconds, start <= end

PARTS = {"tvg": ("format", "iou"), "mcqa": ("format", "answer"), "gqa": ("format", "answer", "iou")}
MAX_ANSWER_CHARS = 4000  # a longer answer block is malformed; bounds the number of segments as well

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TIME_KEYS = (("start_time", "end_time"), ("start", "end"))
_SPAN_KEYS = {"segments", *_TIME_KEYS[0], *_TIME_KEYS[1]}
_TIME = r"[0-9:.]+(?: ?s(?:econds?|ecs?)?)?"
TO = r"(?:to|--|[-–—~])"  # between two times
_SPAN = re.compile(
    rf"(?:from )?({_TIME}) ?{TO} ?({_TIME})|between ({_TIME}) and ({_TIME})"
    rf"|[\[(] ?({_TIME}) ?(?:,|{TO}) ?({_TIME}) ?[\])]",
    re.ASCII | re.IGNORECASE,
)
_SEPARATOR = re.compile(r" ?[,;] ?(?:and )?| and ", re.ASCII | re.IGNORECASE)
_SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?: ?s(?:econds?|ecs?)?)?", re.ASCII | re.IGNORECASE)
_CLOCK = re.compile(r"(?:([0-9]{1,3}):([0-5][0-9])|([0-9]{1,3})):([0-5][0-9](?:\.[0-9]+)?)", re.ASCII)
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_LETTER_HEAD = re.compile(  # the last kind, a letter and white space, may also be the first word of an option's text
    r"(?:option )?(?:\(([A-Z])\)|([A-Z])(?=[.,:;)]|$)|([A-Z])(?= ))[.,:;)]? ?(.*)", re.ASCII | re.IGNORECASE
)
_JOINT = re.compile(r"\.?[,:;]? (?:and )?|[,;](?=[A-Za-z])|(?=[(\[])")  # of an option and segments; `12,5` is a number
_TUPLE = re.compile(r"\(([0-9., ]+)\)")
_MARKUP = re.compile(  # each alternative ends at the next mark of its kind: linear in the text's length
    r"(?<!\w)(?:\\boxed ?\{([^{}]+)\}|\*\*([^*]+)\*\*|`([^`]+)`|[\"“]([^\"“”]+)[\"”]|'([^']+)')(?!\w)"
)


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

    Segments and `duration` in seconds from 0; in [0, 1]. Of several segments the IoU is that of the unions, start and
    end are those of the hull. With `duration` None the last end of either side stands in for it: no video that holds
    both is shorter. Never above the IoU, so a miss pays 0. (Time-R1, arXiv 2503.13377, whose code divides by the hull
    where this divides by the union: the same for two spans that overlap.)

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
    0 for an empty side.

    It tells misses apart, and so pays them: a span beside the truth gets 3/8 where they touch and less the farther
    off, a point inside the truth or pieces on both sides of it up to 1/2, the whole video 1/2 and more unless the
    truth is short and off its centre. The map is affine: advantages divided by the group's standard deviation are
    those of the unmapped value while no other part differs; next to other parts its spread is half.

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


def final_text(text: str) -> str:
    """What follows the last `</think>`, or the whole text when there is none."""
    return text.rpartition("</think>")[2]


def parse_answer(text: str) -> str | None:
    """Content of the last closed answer block after the thinking, or None.

    >>> parse_answer("<think><answer>A</answer></think><answer>B</answer><answer>C")
    'B'
    """
    text = final_text(text)
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.index("</answer>", start)]


def parse_choice(text: str, options: Sequence[str] | None) -> str | None:
    """`choice_from` of the last answer block; None without one."""
    answer = parse_answer(text)
    return None if answer is None else choice_from(answer, options)


def parse_segments(text: str, options: Sequence[str] | None = None) -> list[Segment]:
    """`segments_from` of the last answer block; [] without one."""
    answer = parse_answer(text)
    return [] if answer is None else segments_from(answer, options)


def choice_from(answer: str, options: Sequence[str] | None) -> str | None:
    """The chosen option as an upper-case letter, or None when absent or ambiguous.

    Takes a letter (`b`, `(B)`, `B.`, `Option B`), a letter with its own option's text (`B. a cat`, `B a cat`), with
    segments before or after it (`B, 3 to 7`, `3 to 7, B`) or with both, an option's text (up to white space, case and
    a final full stop), any of these within `**`, `\\boxed{}` or quotes, or JSON with one of these as "answer". With
    `options` None any letter is an option. A text that names two options is ambiguous: that of a duplicated option, or
    a letter that is also another option's text.

    >>> choice_from("(b) 3 to 7", ["a dog", "a cat"]), choice_from("B. a dog", ["a dog", "a cat"])
    ('B', None)
    """
    text = _clean(answer)
    value = _load_json(text)
    if isinstance(value, dict):
        text = _clean(str(value.get("answer") or ""))
    letters = string.ascii_uppercase[: len(options) if options else None]
    found = {*_options_with_text(text, options), _letter_and_segments(bare(text), options)[0]}
    found = {index for index in found if index is not None and index < len(letters)}
    return letters[found.pop()] if len(found) == 1 else None


def segments_from(answer: str, options: Sequence[str] | None = None) -> list[Segment]:
    """Segments in seconds, in the order given; [] when there is none or anything in the answer is malformed.

    Takes `3 to 7`, `from 3 to 7`, `between 3 and 7`, `3 - 7` (also with `--` or `~`), `(3, 7)`, several separated by
    `,` `;` or `and`, times as `3.5`, `10s`, `mm:ss` or `hh:mm:ss`, the same before or after an option letter
    (`B, 3 to 7`, `B (3 to 7)`) that may have its option's text, any of these within `**`, `\\boxed{}` or quotes, and
    JSON: {"start_time": 3, "end_time": "7"} or start / end, lists of those or of pairs, {"segments": [[3, 7]]}, each
    with an optional "answer" and one further key. Malformed: a reversed, negative or non-finite span, a repeated key, a
    further key with an answer of its own. A span without length is taken.

    >>> segments_from("0:03 to 0:07 and 9s - 12s"), segments_from("7 to 3")
    ([(3.0, 7.0), (9.0, 12.0)], [])
    >>> segments_from("B. a cat, 3 to 7", ["a dog", "a cat"]), segments_from("B. a dog, 3 to 7", ["a dog", "a cat"])
    ([(3.0, 7.0)], [])
    """
    text = _clean(answer)
    value = _load_json(text)
    return _letter_and_segments(bare(text), options)[1] if value is None else _json_segments(value, options)


def bare(text: str) -> str:
    """A text without `**`, backticks, quotes and `\\boxed{}` around its parts, and without a final full stop in them.

    >>> bare('**B**, "3 to 7."'), bare("the man's dog's"), bare(r"\\boxed{**B**}")
    ('B, 3 to 7', "the man's dog's", 'B')
    """
    inner = text
    for _ in range(3):  # marks within marks
        inner = _MARKUP.sub(lambda match: match[match.lastindex].strip(), inner)
    return text if inner == text else inner.strip().removesuffix(".")


def score(text: str, sample: Any, cfg: Any) -> Reward:
    """Reward of one response: sum(weight x part) / sum(weights) over the parts of the sample's task.

    `sample` has `task`, `options`, `answer`, `segments` and `duration` (seconds, or None: spans are not
    clipped); `cfg` has `prompt.think`, `rewards.format_gates_task`, `rewards.overlap` (which overlap the part `iou`
    is: `iou`, `timestamp_iou` or `distance_iou`) and, for each task, weights such as `rewards.tvg.iou`; with all of
    them 0 the total is 0. Predicted segments are clipped to [0, duration]. With the gate, `format` is 1 only when
    every part of the answer parses as well, and the task's parts count only then; without it `format` is the layout
    alone. A truth without length, which the data loader refuses, has IoU 0.
    """
    part_names, weights = PARTS[sample.task], getattr(cfg.rewards, sample.task)
    values = {"format": float(_layout_ok(text, cfg.prompt.think))}
    if "answer" in part_names:
        choice = parse_choice(text, sample.options)
        values["answer"] = float(choice is not None and choice == sample.answer)
    if "iou" in part_names:
        values["iou"] = _overlap_part(cfg.rewards.overlap, parse_segments(text, sample.options), sample)
    if cfg.rewards.format_gates_task and not (values["format"] and parses(text, sample)):
        values = dict.fromkeys(part_names, 0.0)
    weight = {name: getattr(weights, name) for name in part_names}
    total = sum(weight[name] * values[name] for name in part_names)
    return Reward(total / (sum(weight.values()) or 1.0), values)


def parses(text: str, sample: Any) -> bool:
    """Whether every part of the answer that the sample's task asks for can be read from the response."""
    parts = PARTS[sample.task]
    choice_ok = "answer" not in parts or parse_choice(text, sample.options) is not None
    return choice_ok and ("iou" not in parts or bool(parse_segments(text, sample.options)))


def task_reward(task: str, parts: Mapping[str, float]) -> float:
    """The reward without its format: the mean of the task's own parts, 1 for a perfect answer.

    >>> task_reward("gqa", {"format": 1.0, "answer": 1.0, "iou": 0.5, "brevity": 0.3})
    0.75
    """
    own = PARTS[task][1:]
    return sum(parts[name] for name in own) / len(own)


def format_answer(sample: Any) -> str:
    """The answer block a perfect response ends with, tags included: the target of supervised tuning.

    Times in seconds with at most two decimals, e.g. `<answer>B, 3 to 7.25, 9 to 12</answer>`.
    """
    part_names = PARTS[sample.task]
    pieces = [sample.answer] if "answer" in part_names else []
    if "iou" in part_names:
        pieces += [f"{_decimal(start)} to {_decimal(end)}" for start, end in sample.segments]
    return f"<answer>{', '.join(pieces)}</answer>"


def _overlap_part(kind: str, segments: list[Segment], sample: Any) -> float:
    pred = _clip(segments, sample.duration)
    if kind == "timestamp_iou":
        return timestamp_iou(pred, sample.segments, sample.duration)
    return {"iou": temporal_iou, "distance_iou": distance_iou}[kind](pred, sample.segments)


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
    """Length of the intersection of two merged lists, one pass over both."""
    total_s, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total_s += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total_s


def _clip(segments: list[Segment], duration: float | None) -> list[Segment]:
    end_s = math.inf if duration is None else duration
    return [(min(start, end_s), min(end, end_s)) for start, end in segments]  # parsed starts are >= 0


def _layout_ok(text: str, think: bool) -> bool:
    """Exactly one answer block, after exactly one think block with a letter or digit when thinking, nothing else."""
    text = text.strip()
    if [text.count(tag) for tag in _TAGS] != [think, think, 1, 1] or not text.endswith("</answer>"):
        return False
    thought = text[: text.index("<answer>")].rstrip()
    if not think:
        return not thought
    is_block = thought.startswith("<think>") and thought.endswith("</think>")
    return is_block and _LETTER_OR_DIGIT.search(thought[7:-8]) is not None


def _clean(answer: str) -> str:
    """Single spaces, no code fence, no final full stop; empty when too long."""
    text = " ".join(answer.split()) if len(answer) <= MAX_ANSWER_CHARS else ""
    if len(text) >= 6 and text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json").strip()
    return text.removesuffix(".").rstrip()


def _load_json(text: str) -> Any:
    """Parsed JSON object or list, every number a float; None for anything else. Takes Python's quotes and pairs too."""
    if not text.startswith(("{", "[")):
        return None
    for form in (text, _TUPLE.sub(r"[\1]", text).replace("'", '"')):
        try:
            return json.loads(form, parse_int=float, parse_float=float, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            continue
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def _options_with_text(text: str, options: Sequence[str] | None) -> list[int]:
    """Indices of the options with this text; case and marks count only where they decide."""
    for form in (str, str.casefold, lambda part: bare(part).casefold()):
        same = [index for index, option in enumerate(options or ()) if form(_clean(option)) == form(text) != ""]
        if same:
            return same
    return []


def _letter_and_segments(text: str, options: Sequence[str] | None) -> tuple[int | None, list[Segment]]:
    """The index of the letter in an answer and its segments, either of which may be missing.

    (None, []) when anything else stands there but the text of the letter's own option, right after the letter.
    """
    segments, rest = _leading_segments(text)
    joint = _JOINT.match(rest) if segments else None
    head = _LETTER_HEAD.fullmatch(rest[joint.end() :] if joint else text)
    if not head or (head[3] and _options_with_text(text, options)):
        return None, [] if rest else segments
    letter, rest = head[1] or head[2] or head[3], head[4]
    index = string.ascii_uppercase.index(letter.upper())
    if segments and letter.islower() and index >= len(options or ()):
        return None, []  # `3 to 7, x`: a word
    owners = _options_with_text(rest, options)
    if not rest or index in owners:
        return index, segments or _text_segments(rest)
    own = _clean(options[index]) if options and index < len(options) else ""
    joint = _JOINT.match(rest, len(own)) if own and rest[: len(own)].casefold() == own.casefold() else None
    found = [] if segments or owners else _text_segments(rest) or _text_segments(rest[joint.end() :] if joint else "")
    return (index, found) if found else (None, [])


def _text_segments(text: str) -> list[Segment]:
    """The segments of a text that holds nothing else."""
    segments, rest = _leading_segments(text)
    return [] if rest else segments


def _leading_segments(text: str) -> tuple[list[Segment], str]:
    """The segments that a text begins with, and the text after them. One malformed segment spoils them all."""
    segments, end, span = [], 0, _SPAN.match(text)
    while span:
        segments.append(_segment(*(time for time in span.groups() if time)))
        end = span.end()
        separator = _SEPARATOR.match(text, end)
        span = _SPAN.match(text, separator.end()) if separator else None
    return ([], text) if None in segments else (segments, text[end:])


def _json_segments(value: Any, options: Sequence[str] | None) -> list[Segment]:
    if isinstance(value, dict):
        fields = {key: item for key, item in value.items() if key != "answer"}
        (value,) = _values(fields, ("segments",), options) or [[fields]]
    if not isinstance(value, list):
        return []
    is_pair = len(value) == 2 and not any(isinstance(item, list | dict) for item in value)
    return _all_or_none([_json_segment(item, options) for item in ([value] if is_pair else value)])


def _json_segment(item: Any, options: Sequence[str] | None) -> Segment | None:
    if isinstance(item, dict):
        item = next((values for keys in _TIME_KEYS if (values := _values(item, keys, options))), None)
    return _segment(*item) if isinstance(item, list) and len(item) == 2 else None


def _values(item: dict[str, Any], keys: Sequence[str], options: Sequence[str] | None) -> list[Any] | None:
    """The values of these keys; None when one is missing, or there is more than one other key or a second answer."""
    others = item.keys() - set(keys)
    if len(item) - len(others) < len(keys) or len(others) > 1 or others & _SPAN_KEYS:
        return None
    return None if any(_is_answer(item[key], options) for key in others) else [item[key] for key in keys]


def _is_answer(value: Any, options: Sequence[str] | None) -> bool:
    """Whether a value says when, or which option. Without options a letter names nothing."""
    if not isinstance(value, str):
        return isinstance(value, list | dict)
    return bool(segments_from(value, options) or (options and choice_from(value, options)))


def _segment(start: Any, end: Any) -> Segment | None:
    start_s, end_s = _seconds(start), _seconds(end)
    return None if start_s is None or end_s is None or start_s > end_s else (start_s, end_s)


def _seconds(value: Any) -> float | None:
    """A finite, non-negative time in seconds from a float or from `3.5`, `10s`, `mm:ss` or `hh:mm:ss`."""
    if isinstance(value, str):
        plain, clock = _SECONDS.fullmatch(value.strip()), _CLOCK.fullmatch(value.strip())
        if clock:
            hours, minutes = clock[1] or 0, clock[2] or clock[3]
            value = 3600 * int(hours) + 60 * int(minutes) + float(clock[4])
        else:
            value = float(plain[1]) if plain else None
    return value if isinstance(value, float) and 0 <= value < math.inf else None


def _all_or_none(segments: list[Segment | None]) -> list[Segment]:
    return [] if None in segments else [segment for segment in segments if segment]


def _decimal(seconds: float) -> str:
    return f"{seconds:.2f}".rstrip("0").rstrip(".")
