"""Rewards: hand-computed overlaps, parser tables, what must not pay, and totality; no model and no video."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rewards

OPTIONS = ["a dog", "a cat", "two birds", "nobody"]


def config(think: bool = True, gate: bool = True) -> SimpleNamespace:
    """The recipe's weights: grounding 0.5 / 0.5, multiple choice 0.5 / 0.5, grounded QA 0.2 / 0.4 / 0.4."""
    weights = {
        "tvg": SimpleNamespace(format=0.5, answer=0.0, iou=0.5),
        "mcqa": SimpleNamespace(format=0.5, answer=0.5, iou=0.0),
        "gqa": SimpleNamespace(format=0.2, answer=0.4, iou=0.4),
    }
    section = SimpleNamespace(format_gates_task=gate, overlap="iou", **weights)
    return SimpleNamespace(prompt=SimpleNamespace(think=think), rewards=section)


def sample(task: str, **fields) -> SimpleNamespace:
    """A record whose true span is 20% of its video: 4 to 8 s of 20 s; option B is right."""
    row = {"options": OPTIONS, "answer": "B", "segments": [(4.0, 8.0)], "duration": 20.0}
    return SimpleNamespace(task=task, **(row | fields))


def thought(answer: str) -> str:
    return f"<think>I look.</think><answer>{answer}</answer>"


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


@pytest.mark.parametrize("bad", [(7, 3), (math.nan, 3), (1, math.inf)])
def test_overlap_refuses_what_is_no_segment(bad):
    with pytest.raises(ValueError, match="not a segment"):
        rewards.temporal_iou([bad], [(0, 1)])
    with pytest.raises(ValueError, match="not a segment"):
        rewards.temporal_iop([(0, 1)], [bad])


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1])), max_size=6)


@given(spans, spans)
def test_overlap_equals_counting_unit_cells(pred, truth):
    cells = [{second for start, end in side for second in range(start, end)} for side in (pred, truth)]
    both, either = cells[0] & cells[1], cells[0] | cells[1]
    assert rewards.temporal_iou(pred, truth) == pytest.approx(len(both) / len(either) if either else 0)
    assert rewards.temporal_iou(pred, truth) == rewards.temporal_iou(truth, pred)
    if cells[0]:
        assert rewards.temporal_iop(pred, truth) == pytest.approx(len(both) / len(cells[0]))


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


WHOLE_VIDEO = 0.5 + 0.5 * 0.2


# What each of these paid under the released reward (true span = 20% of the video) and what it pays here.
@pytest.mark.parametrize(
    ("text", "paid_here"),
    [
        (thought('{"start_time": "x", "end_time": "y"}'), 0),  # well-formed nonsense: 0.5
        (thought("soon"), 0),  # 0.5
        (thought('{"start_time": "8.0", "end_time": "4.0"}'), 0),  # a reversed span: 0.5
        (
            thought('{"start_time": "4.0", "end_time": "400.0"}'),
            0.5 + 0.5 * 4 / 16,
        ),  # past the end: 0.51; clipped
        (
            thought('{"start_time": "30", "end_time": "40"}'),
            0.5,
        ),  # wholly outside: 0.5; a well-formed wrong answer
        (thought('{"start_time": "0", "end_time": "20"}'), WHOLE_VIDEO),  # 0.6: honest, its IoU is 0.2
        (
            "<think><answer>4 to 8</answer></think><answer>12 to 16</answer>",
            0,
        ),  # right inside the thinking: 1.0
        ("<think></think><answer>4 to 8</answer>", 0),  # an empty think block: 1.0
        ("<think> \n</think><answer>4 to 8</answer>", 0),  # 1.0
        (thought("4 to 8"), 1),  # what should pay
    ],
)
def test_what_the_released_reward_paid_for(text, paid_here):
    assert rewards.score(text, sample("tvg"), config()).total == pytest.approx(paid_here)


def test_the_right_answer_inside_the_thinking_does_not_count_even_without_the_gate():
    """The released reward took its IoU from the first answer block, so this paid 1.0."""
    text = "<think><answer>4 to 8</answer></think><answer>12 to 16</answer>"
    assert rewards.score(text, sample("tvg"), config(gate=False)).total == 0


def test_a_truth_without_length_is_not_an_error_here():
    """The loader refuses such a record; the reward, being total, gives no IoU, as the released one."""
    reward = rewards.score(thought("4 to 4"), sample("tvg", segments=[(4.0, 4.0)]), config())
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


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
JSON = ["{", "}", "[", "]", '"', ":", '"start_time"', '"segments"', "NaN", "1e999", "```"]
WORDS = [
    "B",
    "(B)",
    "a cat",
    "3",
    "7.5",
    " to ",
    "-",
    ",",
    ";",
    " and ",
    "12:61",
    "0:03",
    "10s",
    "\n",
    "\ud800",
    "٣",
]
pieces = st.sampled_from(TAGS + JSON + WORDS)
texts = st.one_of(st.text(), st.lists(pieces, max_size=30).map("".join))


@settings(max_examples=300)
@given(texts, st.booleans(), st.booleans())
@example("[" * 3000, True, True)
def test_any_text_gives_finite_numbers_between_0_and_1(text, think, gate):
    for task in rewards.PARTS:
        for whole in (text, f"<answer>{text}</answer>", thought(text)):
            reward = rewards.score(whole, sample(task), config(think, gate))
            assert tuple(reward.parts) == rewards.PARTS[task]
            assert all(math.isfinite(x) and 0 <= x <= 1 for x in (reward.total, *reward.parts.values()))


@pytest.mark.parametrize(
    "unit",
    [
        *TAGS,
        *JSON,
        "<answer></answer>",
        "<",
        '{"a":',
        "9",
        "1:",
        "3 to 7,",
        " and ",
        " ",
        "3 - ",
        "B, ",
        "B. ",
        "\\",
    ],
)
@pytest.mark.parametrize("num_chars", [3900, 100_000])
def test_hostile_strings_complete(unit, num_chars):
    """Nested, unclosed and repeated input on either side of the answer's length limit."""
    text = unit * (num_chars // len(unit))
    for task in rewards.PARTS:
        for whole in (text, f"<answer>{text}</answer>", thought(text), thought("3 to 7" + text)):
            assert 0 <= rewards.score(whole, sample(task), config()).total <= 1


def test_an_answer_past_the_length_limit_is_malformed():
    many = ", ".join(["1 to 2"] * 400)
    assert len(rewards.segments_from(many)) == 400
    assert rewards.segments_from(many + ", " + many) == []
    assert rewards.choice_from("B" + " " * rewards.MAX_ANSWER_CHARS, OPTIONS) is None
