"""Rewards: overlaps by hand, parser tables, what must not pay, any text; no model and no video."""

import itertools
import json
import math
import random
import re
import time
from functools import cache

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rewards
from config import GrpoConfig, load
from data import read_samples
from records import Sample

OPTIONS = ["a dog", "a cat", "two birds", "nobody"]
THINK = "<think>I look.</think>"
OVERLAPS = ["iou", "timestamp_iou", "distance_iou"]


@cache
def config(think: bool = True, gate: bool = True, overlap: str = "iou") -> GrpoConfig:
    """The recipe's weights: grounding 0.5 / 0.5, multiple choice 0.5 / 0.5, grounded QA 0.2 / 0.4 / 0.4."""
    chosen = {"prompt.think": think, "rewards.format_gates_task": gate, "rewards.overlap": overlap}
    return load(GrpoConfig, [], [f"{key}={str(value).lower()}" for key, value in chosen.items()])


def sample(task: str, **fields) -> Sample:
    """A record whose true span is 20% of its video: 4 to 8 s of 20 s; option B is right."""
    row = {"id": "a", "video": "v.mp4", "question": "When?", "options": OPTIONS, "answer": "B"}
    row |= {"segments": [(4.0, 8.0)], "duration": 20.0}
    return Sample(task=task, **(row | fields))


def thought(answer: str) -> str:
    return f"{THINK}<answer>{answer}</answer>"


# ---- overlaps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pred", "truth", "iou", "iop"),
    [
        ([(3, 7)], [(3, 7)], 1, 1),
        ([(3, 7)], [(5, 9)], 2 / 6, 2 / 4),
        ([(0, 20)], [(4, 8)], 0.2, 0.2),
        ([(5, 6)], [(4, 8)], 0.25, 1),
        ([(0, 1)], [(2, 3)], 0, 0),
        ([(0, 2)], [(2, 3)], 0, 0),
        ([(0, 2), (6, 8)], [(1, 7)], 2 / 8, 2 / 4),
        ([(0, 4), (2, 6), (6, 8)], [(0, 8)], 1, 1),  # overlaps within a side count once
        ([(3, 4), (1, 2)], [[1, 4]], 2 / 3, 1),  # any order; lists as in JSON
        ([(6, 6)], [(5, 9)], 0, 1),  # no length, inside
        ([(9, 9)], [(5, 9)], 0, 1),
        ([(10, 10)], [(5, 9)], 0, 0),
        ([(6, 6), (10, 10)], [(5, 9)], 0, 0.5),
        ([(6, 6)], [(6, 6)], 0, 1),
        ([], [(5, 9)], 0, 0),
        ([(5, 9)], [], 0, 0),
        ([(0, 1.7e308)], [(0, 1.0)], 1 / 1.7e308, 1 / 1.7e308),
    ],
)
def test_overlap_by_hand(pred, truth, iou, iop):
    assert rewards.temporal_iou(pred, truth) == pytest.approx(iou)
    assert rewards.temporal_iop(pred, truth) == pytest.approx(iop)


@pytest.mark.parametrize(
    ("pred", "truth", "duration", "expected"),
    [
        ([(4, 8)], [(4, 8)], 20, 1),
        ([(3, 7)], [(5, 9)], 20, 1 / 3 * 0.9 * 0.9),
        ([(0, 20)], [(4, 8)], 20, 0.2 * 0.8 * 0.4),  # the whole video: 0.064
        ([(4, 6)], [(4, 8)], 20, 0.5 * 1 * 0.9),
        ([(9, 12)], [(4, 8)], 20, 0),  # a miss
        ([(5, 5)], [(4, 8)], 20, 0),
        ([(3, 7)], [(5, 9)], None, 1 / 3 * (1 - 2 / 9) ** 2),  # no video that holds both is shorter than 9 s
        ([(0, 2), (6, 8)], [(0, 8)], 10, 0.5),  # the hull has the right ends
        ([(0, 2)], [(0, 2), (6, 8)], 10, 0.5 * 1 * 0.4),
        ([(0, 40)], [(0, 10)], 10, 0),  # not clipped: off by more than the video
        ([], [(4, 8)], 20, 0),
        ([(4, 8)], [], 20, 0),
    ],
)
def test_timestamp_iou_by_hand(pred, truth, duration, expected):
    assert rewards.timestamp_iou(pred, truth, duration) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pred", "truth", "expected"),
    [
        ([(4, 8)], [(4, 8)], 1),
        ([(2, 10)], [(4, 8)], (1 + 0.5) / 2),  # one centre: no distance
        ([(3, 7)], [(5, 9)], (1 + 2 / 6 - (2 / 6) ** 2) / 2),
        ([(0, 20)], [(4, 8)], (1 + 0.2 - (4 / 20) ** 2) / 2),  # the whole video: 0.58
        ([(0, 4)], [(4, 8)], 3 / 8),  # touching
        ([(16, 20)], [(4, 8)], (1 - (12 / 16) ** 2) / 2),
        ([(6, 6)], [(4, 8)], 1 / 2),  # a point at the centre
        ([(20, 20)], [(4, 8)], (1 - (14 / 16) ** 2) / 2),
        ([(0, 2), (6, 8)], [(0, 8)], (1 + 0.5) / 2),
        ([(0, 2), (6, 8)], [(0, 2), (6, 8)], 1),
        ([(0, 8)], [(0, 2), (6, 8)], (1 + 0.5) / 2),
        ([(6, 6)], [(6, 6)], 0),  # no hull
        ([], [(4, 8)], 0),
        ([(4, 8)], [], 0),
        ([(0, 1.7e308)], [(0, 1.0)], (1 - 0.25) / 2),
    ],
)
def test_distance_iou_by_hand(pred, truth, expected):
    assert rewards.distance_iou(pred, truth) == pytest.approx(expected)
    assert rewards.distance_iou(truth, pred) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [(7, 3), (math.nan, 3), (1, math.inf)])
def test_overlap_refuses_what_is_no_segment(bad):
    for overlap in (rewards.temporal_iou, rewards.temporal_iop, rewards.distance_iou):
        for pred, truth in (([bad], [(0, 1)]), ([(0, 1)], [bad])):
            with pytest.raises(ValueError, match="not a segment"):
                overlap(pred, truth)
    with pytest.raises(ValueError, match="not a segment"):
        rewards.timestamp_iou([bad], [(0, 1)], 10)


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1])), max_size=6)


@given(spans, spans)
def test_overlap_equals_counting_unit_cells(pred, truth):
    cells = [{second for start, end in side for second in range(start, end)} for side in (pred, truth)]
    both, either = cells[0] & cells[1], cells[0] | cells[1]
    assert rewards.temporal_iou(pred, truth) == pytest.approx(len(both) / len(either) if either else 0)
    assert rewards.temporal_iou(pred, truth) == rewards.temporal_iou(truth, pred)
    if cells[0]:
        assert rewards.temporal_iop(pred, truth) == pytest.approx(len(both) / len(cells[0]))


def covered(segments) -> list:
    """The union, as disjoint segments with length, to tell whether two answers say the same."""
    return [segment for segment in rewards._merge(segments) if segment[1] > segment[0]]


@given(spans, spans, st.integers(0, 20))
def test_timestamp_iou_is_the_iou_and_a_penalty(pred, truth, more):
    """In [0, 1], symmetric, never above the IoU, equal to it where the ends are right, 1 for the right answer only."""
    duration = max([1, *(end for _, end in pred + truth)]) + more
    value, iou = rewards.timestamp_iou(pred, truth, duration), rewards.temporal_iou(pred, truth)
    assert 0 <= value <= iou
    assert value == rewards.timestamp_iou(truth, pred, duration)
    if value == 1:
        assert covered(pred) == covered(truth)
    assert rewards.timestamp_iou(pred, truth, None) <= value + 1e-12  # a longer video forgives more
    if pred and truth and rewards._hull(pred) == rewards._hull(truth):
        assert value == pytest.approx(iou)


@given(spans, spans)
def test_distance_iou_is_the_iou_and_a_distance(pred, truth):
    """In [0, 1], symmetric, (1 + IoU) / 2 at most, 1 for the right answer only."""
    value, iou = rewards.distance_iou(pred, truth), rewards.temporal_iou(pred, truth)
    assert 0 <= value <= (1 + iou) / 2
    assert value == rewards.distance_iou(truth, pred)
    if value == 1:
        assert covered(pred) == covered(truth)
    if iou == 0 and len(pred) == len(truth) == 1 and pred[0][0] < pred[0][1] and truth[0][0] < truth[0][1]:
        assert value <= 3 / 8


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9))
def test_distance_iou_tells_misses_apart(gap, length, true_length):
    """The nearer a span of one length, the more it pays, on either side of the truth."""
    start, end = 50, 50 + true_length
    sides = [
        [[(end + away, end + away + length)] for away in (gap, gap + 1)],
        [[(start - away - length, start - away)] for away in (gap, gap + 1)],
    ]
    for near, far in sides:
        assert rewards.distance_iou(near, [(start, end)]) > rewards.distance_iou(far, [(start, end)]) > 0
        assert rewards.temporal_iou(near, [(start, end)]) == rewards.temporal_iou(far, [(start, end)]) == 0


@given(spans.filter(len), st.integers(0, 30), st.integers(1, 9))
def test_pieces_pay_no_more_than_one_span_over_all_of_them(pred, start, length):
    """Points at both ends of the video lengthen the hull and cost no IoU: `0 to 0, 15 to 18, 20 to 20` paid 0.48
    where `15 to 18` pays 0.22 (truth 4 to 8), and such points raised the payment of almost any other answer too."""
    truth = [(start, start + length)]
    assert rewards.distance_iou(pred, truth) <= rewards.distance_iou([rewards._hull(pred)], truth) + 1e-12


# ---- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<answer>A</answer><answer>B", "A"),  # an unclosed block is no block
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer>A</answer></answer>", "A"),
        ("<think><answer>A</answer></think>", None),
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>A</answer><think>x</think>", None),
        ("<answer></answer>", ""),
        ("</answer><answer>", None),
        ("<answer", None),
        ("B", None),
        ("", None),
    ],
)
def test_parse_answer(text, answer):
    assert rewards.parse_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[(text, "B") for text in ("B", "b", " B\n", "(B)", "(b)", "B.", "B)", "B:", "(B).", "```\nB\n```")],
        *[(text, "B") for text in ("B. a cat", "(B) a cat", "B) A cat.", "b: a  cat", "a cat", "A cat.")],
        *[(text, "B") for text in ("B, 3 to 7", "B. 3 to 7", "(B) 3.0 to 7.5", "B; 1 to 2, 3 to 4")],
        *[(text, "B") for text in ('{"answer": "B"}', '{"answer": "a cat", "start_time": 3, "end_time": 7}')],
        ('```json\n{"answer": "(b)", "segments": [[3, 7]]}\n```', "B"),
        *[(text, None) for text in ("", " ", ".", "()", "E", "BB", "A B", "A, B", "A or B", "AB", "(B", "Ｂ")],
        *[(text, None) for text in ("B. a dog", "B. a cow", "B a cat", "A cat or a dog", "3 to 7", "B, 7 to 3")],
        *[(text, None) for text in ('{"answer": 1}', '{"answer": null}', '["B"]', '{"answer": "A", "answer": "B"}')],
    ],
)
def test_parse_choice(answer, letter):
    assert rewards.parse_choice(f"<answer>{answer}</answer>", OPTIONS) == letter


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["x", "x", "y"], "x", None),  # a duplicated option is ambiguous by text, not by letter
        (["x", "x", "y"], "B. x", "B"),
        (["B", "A", "C"], "B", None),  # letter B, or option A's text
        (["B", "A", "C"], "C", "C"),
        (["x", "e"], "E", "B"),  # no option E, so the text decides
        (["us", "US"], "US", "B"),  # case decides where it can
        (["us", "US"], "Us", None),
        (["3 to 7", "8 to 9"], "B. 3 to 7", None),  # another option's text, not a span
        (["3 to 7", "8 to 9"], "A. 3 to 7", "A"),
        (["[1, 2]", "[3, 4]"], "[3, 4]", "B"),
        (["", "x"], "", None),
        ([str(n) for n in range(30)], "29", None),  # no letter is left for it
        (None, "g", "G"),
        (None, "a cat", None),
    ],
)
def test_choice_against_awkward_options(options, answer, letter):
    assert rewards.choice_from(answer, options) == letter


GOOD_SEGMENTS = [
    ("3 to 7", [(3, 7)]),
    ("3.25 - 7.5", [(3.25, 7.5)]),
    ("3-7", [(3, 7)]),
    ("3 – 7.", [(3, 7)]),
    ("3s to 7s", [(3, 7)]),
    ("10 seconds TO 12 Seconds", [(10, 12)]),
    ("3 to 7 sec", [(3, 7)]),
    ("5 to 5", [(5, 5)]),
    ("0:03 to 1:07.5", [(3, 67.5)]),
    ("00:00:03 - 01:00:07", [(3, 3607)]),
    ("90:00 to 91:00", [(5400, 5460)]),
    ("3 to 7, 9 to 12", [(3, 7), (9, 12)]),
    ("9 to 12; 3 to 7", [(9, 12), (3, 7)]),  # the order given
    ("1 to 2, 3 to 4, and 5 to 6 and 7 to 8", [(1, 2), (3, 4), (5, 6), (7, 8)]),
    ("B, 3 to 7", [(3, 7)]),
    ("B. 3 to 7", [(3, 7)]),
    ("(B) 3.0 to 7.5 and 8 to 9", [(3, 7.5), (8, 9)]),
    ('{"start_time": "1.0", "end_time": "2.0"}', [(1, 2)]),
    ('{"end": 2, "start": 1e0}', [(1, 2)]),
    ('{"start_time": "00:01", "end_time": "2s"}', [(1, 2)]),
    ('{"segments": [[1, 2], [3, 4]]}', [(1, 2), (3, 4)]),
    ("[[1, 2]]", [(1, 2)]),
    ("[1, 2]", [(1, 2)]),
    ('[{"start_time": 1, "end_time": 2}, {"start_time": 3, "end_time": 4}]', [(1, 2), (3, 4)]),
    ('{"answer": "B", "start_time": 3, "end_time": 7}', [(3, 7)]),
    ('{"answer": "B", "segments": [[3, 7]]}', [(3, 7)]),
    ('```json\n{"start_time": 1, "end_time": 2}\n```', [(1, 2)]),
    ("```\n3 to 7\n```", [(3, 7)]),
]
BAD_SEGMENTS = [
    *("", " ", "nothing", "3", "3 7", "3, 7", "3 to", "to 7", "3 to 7 to 9", "from 3 to 7", "3 to 7 maybe"),
    *(
        "7 to 3",
        "3 to 7, 9 to 8",
        "3 to 7,",
        "3 to 7 and",
        "3 to 7, x",
        "-3 to 7",
        "3 to -7",
        "-3 - 7",
        "3--7",
    ),
    *("12:61 to 13:00", "1:60:00 to 2:00:00", "1:5 to 1:6", "1:02:03:04 to 2:00:00:00", ": to :", ". to ."),
    *(
        "nan to 7",
        "3 to inf",
        "1e1 to 20",
        "3 to " + "9" * 400,
        "٣ to ٧",
        "³ to ⁷",
        "３ to ７",
        "1,5 to 2,5",
        "1.2.3 to 4",
    ),
    *("B", "(B)", "B, 7 to 3", "B 3 to 7", "cat, 3 to 7", "__import__('os') to 7", "1+1 to 7", "0x1 to 0x2"),
    *(
        "[]",
        "{}",
        "[[]]",
        "[[1]]",
        "[[1, 2, 3]]",
        "[1, 2, 3, 4]",
        "[[2, 1]]",
        "[[1, 2], [4, 3]]",
        "[[-1, 2]]",
    ),
    *(
        "[[NaN, 2]]",
        "[[1, Infinity]]",
        "[[1, 1e999]]",
        "[[true, 2]]",
        "[[null, 2]]",
        "[[[1, 2]]]",
        "[[1, 2]",
        "12",
    ),
    *(
        '{"start_time": 1}',
        '{"start_time": 2, "end_time": 1}',
        '{"start_time": 1, "end": 2}',
        '{"segments": 3}',
    ),
    *('{"start_time": 1, "start_time": 2, "end_time": 9}', '{"segments": [], "start": 1, "end": 2}'),
    *(
        '{"answer": "B"}',
        '{"segments": []}',
        '{"segments": null}',
        '{"start": "x", "end": 2}',
        '{"start": [1], "end": 2}',
    ),
    *(
        "[[1, 2]] [[3, 4]]",
        '"3 to 7"',
        "```",
        "``````",
        "```json```",
        "1 to 2 " + ";" * 100,
        "3 to 7" + " " * 4000,
    ),
]


@pytest.mark.parametrize(("answer", "segments"), [*GOOD_SEGMENTS, *((answer, []) for answer in BAD_SEGMENTS)])
def test_parse_segments(answer, segments):
    assert rewards.parse_segments(f"<think>x</think><answer>{answer}</answer>") == segments
    assert rewards.parse_segments(answer) == []  # without a block there is no answer


# ---- the built-in reward ---------------------------------------------------------------------------------------------


def test_parts_and_total_by_hand():
    half = rewards.score(thought("4 to 6"), sample("tvg"), config())
    assert half == rewards.Reward(0.75, {"format": 1, "iou": 0.5})
    assert rewards.score(thought("B"), sample("mcqa"), config()) == rewards.Reward(1, {"format": 1, "answer": 1})
    assert rewards.score(thought("A"), sample("mcqa"), config()) == rewards.Reward(0.5, {"format": 1, "answer": 0})
    both = rewards.score(thought("B, 4 to 6"), sample("gqa"), config())
    assert both.parts == {"format": 1, "answer": 1, "iou": 0.5}
    assert both.total == pytest.approx(0.2 + 0.4 + 0.4 * 0.5)
    wrong = rewards.score(thought("C, 4 to 8"), sample("gqa"), config())
    assert wrong.parts == {"format": 1, "answer": 0, "iou": 1}
    several = sample("tvg", segments=[(0.0, 2.0), (6.0, 8.0)])
    assert rewards.score(thought("0 to 2 and 6 to 8"), several, config()).total == 1
    assert rewards.score(thought("0 to 8"), several, config()).parts["iou"] == 0.5


@pytest.mark.parametrize("answer", ["B", "4 to 8", "B, 8 to 4", "Z, 4 to 8"])
def test_grounded_qa_needs_both_parts_to_parse(answer):
    assert rewards.score(thought(answer), sample("gqa"), config()).total == 0


def released(text: str, truth: tuple[float, float] = (4.0, 8.0)) -> float:
    """The rule of the reward released with Temporal-R1: 0.5 IoU + 0.5 format.

    Format: a think block, which may be empty, then an answer block with `start_time` and `end_time`, quoted. IoU of
    the first answer block wherever it stands, read as JSON, over the hull of both spans; 0 when anything fails.
    """
    time_field = r'\s*"%s"\s*:\s*"[\d.]+"\s*'
    fields = ",".join(time_field % name for name in ("start_time", "end_time"))
    layout = re.compile(r"<think>.*</think>\s*<answer>\s*\{" + fields + r"\}\s*</answer>", re.DOTALL)
    paid = 0.5 if layout.fullmatch(text) else 0.0
    first = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    try:
        answer = json.loads(first[1])
        start, end = float(answer["start_time"]), float(answer["end_time"])
        both_s, hull_s = min(end, truth[1]) - max(start, truth[0]), max(end, truth[1]) - min(start, truth[0])
        return paid + 0.5 * max(0.0, both_s / hull_s)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return paid


def spanned(start: str, end: str) -> str:
    """The answer block that the released reward asks for."""
    return f'<answer>{{"start_time": "{start}", "end_time": "{end}"}}</answer>'


PAID = {
    "what should pay": (THINK + spanned("4.0", "8.0"), 1, 1),
    "well-formed nonsense": (THINK + spanned("1.2.3", "..."), 0.5, 0),
    "a reversed span": (THINK + spanned("8.0", "4.0"), 0.5, 0),
    "a span past the end": (THINK + spanned("4.0", "400.0"), 0.5 + 0.5 * 4 / 396, 0.5 + 0.5 * 4 / 16),  # clipped
    "a span outside the video": (THINK + spanned("30", "40"), 0.5, 0.5),  # well-formed and wrong
    "the whole video": (THINK + spanned("0", "20"), 0.6, 0.6),  # honest: its IoU is 0.2
    "right while thinking": (f"<think>{spanned('4', '8')}</think>{spanned('12', '16')}", 1, 0),
    "an empty think block": ("<think></think>" + spanned("4", "8"), 1, 0),
    "a blank think block": ("<think> \n</think>" + spanned("4", "8"), 1, 0),
    "an invisible think block": ("<think>\u200b\ufeff</think>" + spanned("4", "8"), 1, 0),
    "a think block of dots": ("<think>...</think>" + spanned("4", "8"), 1, 0),
}


@pytest.mark.parametrize(("text", "paid_there", "paid_here"), PAID.values(), ids=PAID)
def test_what_the_released_reward_paid_for(text, paid_there, paid_here):
    """True span 4 to 8 s of 20 s; the released reward's payments are computed, not remembered."""
    assert released(text) == pytest.approx(paid_there)
    assert rewards.score(text, sample("tvg"), config()).total == pytest.approx(paid_here)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("mcqa", "A, B, C, D"),
        ("mcqa", "A or B"),
        ("mcqa", "(A)(B)"),
        ("mcqa", "B. a dog"),
        ("mcqa", "a dog a cat two birds nobody"),
        ("mcqa", "A. a dog B. a cat C. two birds D. nobody"),
        ("mcqa", '{"answer": ["A", "B"]}'),
        ("mcqa", '{"answer": "A", "answer": "B"}'),
        ("mcqa", '[{"answer": "A"}, {"answer": "B"}]'),
        ("mcqa", '{"answer": {"answer": "B"}}'),
        ("mcqa", "<answer>A</answer><answer>B</answer>"),
        ("gqa", "A, 0 to 2; B, 4 to 8"),
        ("gqa", "A, B, 4 to 8"),
        ("gqa", '{"answer": "B", "segments": [[4, 8]], "start": 0, "end": 20}'),
        ("tvg", '{"start": 0, "end": 20, "start_time": 4, "end_time": 8}'),
        ("tvg", "0 to 2 or 4 to 8"),
        ("tvg", "<answer>4 to 8</answer>"),  # a block in the block
        ("tvg", "4 to 8</answer><answer>12 to 16"),
        ("tvg", ", ".join(f"{n} to {n + 1}" for n in range(1000))),  # past the length limit
        ("tvg", json.dumps([[n / 100, n / 100] for n in range(2000)])),
    ],
)
def test_an_answer_that_says_several_things_pays_nothing(task, answer):
    for overlap in OVERLAPS:
        assert rewards.score(thought(answer), sample(task), config(overlap=overlap)).total == 0


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_enumerating_segments_pays_no_more_than_the_whole_video(overlap):
    """Blind lists, in sum over every truth of whole seconds."""
    lists = {
        "tiles": [(n, n + 1) for n in range(20)],
        "loose tiles": [(n, n + 0.9) for n in range(20)],
        "every other tile": [(n, n + 1) for n in range(0, 20, 2)],
        "points": [(n, n) for n in range(21)],
        "ends": [(0, 0), (20, 20)],
        "tile and ends": [(0, 0), (5, 6), (20, 20)],
        "repeated": [(0, 20)] * 100,
    }
    paid = dict.fromkeys(["whole", *lists], 0.0)
    for start, end in itertools.combinations(range(21), 2):
        row = sample("tvg", segments=[(start, end)])
        for name, segments in {"whole": [(0, 20)], **lists}.items():
            answer = thought(", ".join(f"{a} to {b}" for a, b in segments))
            paid[name] += rewards.score(answer, row, config(overlap=overlap)).total
    assert {name for name in lists if paid[name] > paid["whole"] + 1e-9} == set()


def test_the_right_answer_inside_the_thinking_does_not_count_even_without_the_gate():
    """The released reward took its IoU from the first answer block, so this paid 1.0."""
    text = "<think><answer>4 to 8</answer></think><answer>12 to 16</answer>"
    assert rewards.score(text, sample("tvg"), config(gate=False)).total == 0


def test_a_truth_without_length_is_refused_when_the_data_is_read(tmp_path):
    """The released reward gives the exact answer no IoU there (0 / 0); here training does not begin."""
    exact = json.dumps({"start_time": "4.0", "end_time": "4.0"})
    assert released(thought(exact), (4.0, 4.0)) == 0.5
    (tmp_path / "v.mp4").touch()
    record = {"id": "a", "task": "tvg", "video": "v.mp4", "duration": 20, "question": "When?", "segments": [[4, 4]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"a segment must end after it starts, got \[4, 4\]"):
        read_samples(str(tmp_path / "a.jsonl"))
    for overlap in OVERLAPS:  # and the reward is total
        reward = rewards.score(thought(exact), sample("tvg", segments=[(4.0, 4.0)]), config(overlap=overlap))
        assert reward.parts == {"format": 1, "iou": 0}


@pytest.mark.parametrize(
    ("text", "with_think", "without"),
    [
        (thought("4 to 8"), 1, 0),
        ("\n <think>\nx\n</think>\n\n<answer>4 to 8</answer> \n", 1, 0),
        ("<answer>4 to 8</answer>", 0, 1),
        (" <answer>\n4 to 8\n</answer>\n", 0, 1),
        ("Here: <answer>4 to 8</answer>", 0, 0),
        ("<answer>4 to 8</answer> done", 0, 0),
        ("<answer>1 to 2</answer><answer>4 to 8</answer>", 0, 0),
        ("<think>x</think> so <answer>4 to 8</answer>", 0, 0),
        ("so <think>x</think><answer>4 to 8</answer>", 0, 0),
        ("<think>x</think><think>y</think><answer>4 to 8</answer>", 0, 0),
        ("<think>x<answer>4 to 8</answer></think>", 0, 0),
        ("</think>x<think><answer>4 to 8</answer>", 0, 0),
        ("<think>x</think><answer><answer>4 to 8</answer>", 0, 0),
        ("<think>x<answer>4 to 8</answer>", 0, 0),
        ("4 to 8", 0, 0),
        ("", 0, 0),
    ],
)
def test_layout(text, with_think, without):
    for think, expected in ((True, with_think), (False, without)):
        reward = rewards.score(text, sample("tvg"), config(think))
        assert reward == rewards.Reward(expected, {"format": expected, "iou": expected})


def test_without_the_gate_layout_and_task_pay_apart():
    cfg = config(gate=False)
    assert rewards.score(thought("soon"), sample("tvg"), cfg).parts == {"format": 1, "iou": 0}
    assert rewards.score("so: <answer>4 to 8</answer>", sample("tvg"), cfg).parts == {"format": 0, "iou": 1}
    assert rewards.score(thought("B"), sample("gqa"), cfg).parts == {"format": 1, "answer": 1, "iou": 0}


def test_spans_are_clipped_only_where_the_duration_is_known():
    text = thought("4 to 40")
    assert rewards.score(text, sample("tvg", duration=10.0), config()).parts["iou"] == pytest.approx(4 / 6)
    assert rewards.score(text, sample("tvg", duration=None), config()).parts["iou"] == pytest.approx(4 / 36)


@pytest.mark.parametrize(("overlap", "paid"), [("iou", 0.5), ("timestamp_iou", 0.45), ("distance_iou", 0.71875)])
def test_the_part_iou_is_the_overlap_that_was_chosen(overlap, paid):
    """4 to 6 of 4 to 8: IoU 1/2, the end 2 of 20 s off, the centres 1 s apart in a hull of 4 s."""
    for task, answer in (("tvg", "4 to 6"), ("gqa", "B, 4 to 6")):
        assert rewards.score(thought(answer), sample(task), config(overlap=overlap)).parts["iou"] == pytest.approx(paid)
    beyond = rewards.score(thought("4 to 60"), sample("tvg"), config(overlap=overlap))
    assert beyond == rewards.score(thought("4 to 20"), sample("tvg"), config(overlap=overlap))  # clipped first


def test_weights_that_are_all_zero_give_zero():
    """config.py allows them where reward functions are given."""
    zero = ["rewards.tvg.format=0", "rewards.tvg.iou=0", "rewards.functions={f.py:f: 1}"]
    reward = rewards.score(thought("4 to 8"), sample("tvg"), load(GrpoConfig, [], zero))
    assert reward == rewards.Reward(0, {"format": 1, "iou": 1})


def test_canonical_answers_are_short():
    two = [(3.0, 7.25), (9.5, 100.0)]
    assert rewards.format_answer(sample("tvg", segments=two)) == "<answer>3 to 7.25, 9.5 to 100</answer>"
    assert rewards.format_answer(sample("mcqa", segments=None)) == "<answer>B</answer>"
    assert rewards.format_answer(sample("gqa")) == "<answer>B, 4 to 8</answer>"


cents = st.integers(0, 2_000_000)


@given(
    st.sampled_from(["tvg", "mcqa", "gqa"]),
    st.sampled_from("ABCD"),
    st.lists(st.tuples(cents, cents.filter(bool)).map(lambda t: (t[0] / 100, (t[0] + t[1]) / 100)), min_size=1),
)
def test_canonical_answers_parse_back_and_pay_in_full(task, letter, segments):
    row = sample(task, answer=letter, segments=segments, duration=None)
    text = rewards.format_answer(row)
    assert rewards.score(text, row, config(think=False)).total == 1
    assert rewards.score(f"<think>x</think>{text}", row, config()).total == 1
    if task != "mcqa":
        assert rewards.parse_segments(text) == segments
    if task != "tvg":
        assert rewards.parse_choice(text, OPTIONS) == letter


# ---- any text --------------------------------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<answer></answer>", "<", "<answer", "<think>I look.</think>"]
JSON = ["{", "}", "[", "]", '"', ":", '{"a":', '"start_time"', '"segments": [[', '"answer": "B"', "NaN", "1e999", "```"]
TIMES = ["3", "7.5", "-3", "1e309", "nan", "inf", "1.2.3", "12:61", "0:03", "1:02:03", "10s", "٣", "३", "９", "9" * 400]
WORDS = ["B", "(b)", "A. ", "a cat", "C or D", " to ", "-", "–", ",", ";", " and ", "8 to 4", "3 to 7", "\n", "\\"]
ODD = ["\ud800", "\x00", "\u200b", "\u2028", "İ", "ß", "🎥", "\u202e", "é"]
UNITS = TAGS + JSON + TIMES + WORDS + ODD + [" ", "  ,", ".", "1:", "3 to 7, ", "3 - ", "9.", '{"answer":', "[[1, 2], "]
LENGTHS = [10] * 4 + [100] * 4 + [1000] * 2 + [3900] * 2 + [20_000, 100_000]  # on either side of the answer's limit
WRAPS = ["{}", "<answer>{}</answer>", THINK + "<answer>{}</answer>", THINK + "<answer>3 to 7{}</answer>"]
WRAPS += ["<think>{}</think><answer>B</answer>", "<think><answer>B</answer></think>{}", "```json\n{}\n```"]
AWKWARD = ["3 to 7", "4 to 8", "[4, 8]", "B", "A", "", "A, 4 to 8", '{"answer": "C"}', "b.", "```"]
ROWS = [
    *(sample(task, options=options) for task in rewards.PARTS for options in (OPTIONS, AWKWARD)),
    sample("tvg", duration=None, segments=[(0.0, 2.5), (6.0, 7.0)]),
]
ASKED = [
    (row, config(think, overlap=overlap))
    for row, think, overlap in itertools.product(ROWS, (True, False), OVERLAPS)
    if row.task != "mcqa" or overlap == "iou"
]

pieces = st.lists(st.one_of(st.sampled_from(UNITS), st.text(max_size=5)), max_size=25).map("".join)
repeats = st.builds(lambda unit, num: unit * (num // len(unit) + 1), st.sampled_from(UNITS), st.sampled_from(LENGTHS))
bodies = st.one_of(pieces, pieces, pieces, st.text(), repeats, st.builds("{}{}{}".format, pieces, repeats, pieces))
outputs = st.builds(lambda wrap, body: wrap.replace("{}", body), st.sampled_from(WRAPS), bodies)


def random_output(rng: random.Random) -> str:
    """One string of the grammar of `outputs`, without hypothesis."""

    def few() -> str:
        num, odd = rng.randrange(25), chr(rng.randrange(0x11000))
        return "".join(rng.choices([*UNITS, odd], k=num))

    def run() -> str:
        unit = rng.choice(UNITS)
        return unit * (rng.choice(LENGTHS) // len(unit) + 1)

    body = rng.choice([few, few, few, few, run, lambda: few() + run() + few()])()
    return rng.choice(WRAPS).replace("{}", body)


def check_any(text: str) -> tuple[float, int]:
    """Score one text for every row, layout and overlap; returns the seconds of CPU and the number of scores."""
    start = time.process_time()
    results = [rewards.score(text, row, cfg) for row, cfg in ASKED]
    seconds = time.process_time() - start
    for (row, _), reward in zip(ASKED, results):
        assert tuple(reward.parts) == rewards.PARTS[row.task]
        assert all(math.isfinite(x) and 0 <= x <= 1 for x in (reward.total, *reward.parts.values()))
    return seconds, len(results)


def report(name: str, times: list[tuple[float, int]], capsys) -> None:
    mean_ms = 1000 * sum(seconds for seconds, _ in times) / sum(num for _, num in times)
    worst_ms = 1000 * max(seconds / num for seconds, num in times)
    with capsys.disabled():
        print(f"\n{name}: {len(times)} strings, {mean_ms:.3f} ms of CPU per score, {worst_ms:.1f} ms for the worst")


def test_any_text_gives_finite_numbers_between_0_and_1(capsys):
    times = []

    @settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(outputs)
    @example("[" * 3000)
    @example(thought("[" * 3900))
    def run(text):
        times.append(check_any(text))

    run()
    report("hypothesis", times, capsys)


@pytest.mark.slow
def test_a_hundred_thousand_texts(capsys):
    rng = random.Random(0)
    report("seeded", [check_any(random_output(rng)) for _ in range(100_000)], capsys)


@settings(max_examples=200, deadline=None)
@given(outputs, st.sampled_from(list(rewards.PARTS)), st.booleans())
def test_any_text_without_the_gate(text, task, think):
    reward = rewards.score(text, sample(task), config(think, gate=False))
    assert all(math.isfinite(x) and 0 <= x <= 1 for x in (reward.total, *reward.parts.values()))


@pytest.mark.parametrize("num_chars", [3900, 100_000])
@pytest.mark.parametrize("unit", UNITS)
def test_long_runs_of_anything_take_little_time(unit, num_chars):
    """Nested, unclosed and repeated, on either side of the answer's length limit: no quadratic parser."""
    text = unit * (num_chars // len(unit))
    for wrap, task in itertools.product(WRAPS, rewards.PARTS):
        start = time.process_time()
        assert 0 <= rewards.score(wrap.replace("{}", text), sample(task), config()).total <= 1
        assert time.process_time() - start < 0.1


def test_an_answer_past_the_length_limit_is_malformed():
    many = ", ".join(["1 to 2"] * 400)
    assert len(rewards.segments_from(many)) == 400
    assert rewards.segments_from(many + ", " + many) == []
    assert rewards.choice_from("B" + " " * rewards.MAX_ANSWER_CHARS, OPTIONS) is None
