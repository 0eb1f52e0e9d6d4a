"""The built-in reward: what pays, what must not; no model and no video."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_samples import OPTIONS, OVERLAPS, THINK, config, sample, thought

import answers
import rewards
from config import GrpoConfig, load
from records.files import read_samples


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
        assert answers.parse_segments(text) == segments
    if task != "tvg":
        assert answers.parse_choice(text, OPTIONS) == letter
