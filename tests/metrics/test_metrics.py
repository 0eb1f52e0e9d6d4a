"""Metrics and answers in plain words: hand-computed numbers, intervals; no model runs here."""

import math
import sys

import numpy as np
import pytest
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from prediction_rows import gqa, tvg

import answers
from metrics import intervals, tasks

sys.path.insert(0, str(REPO / "benchmarks"))
import bench_intervals


def numbered(rows):
    return [row | {"id": f"row/{index}"} for index, row in enumerate(rows)]


def test_grounding_by_hand():
    rows = [tvg([[4, 8]]), tvg([[4, 6]]), tvg([[0, 1], [4, 8]]), tvg([])]  # IoU 1, 0.5, 0 and 0
    found = tasks.score_predictions(numbered(rows))["tasks"]["tvg"]
    expected = {"n": 4, "miou": 37.5, "r1@0.3": 50, "r1@0.5": 50, "r1@0.7": 25, "parse_fail": 25}
    assert {name: found[name] for name in expected} == expected
    assert found["miou_set"] == pytest.approx(100 * (1 + 0.5 + 4 / 5 + 0) / 4)  # the third: 4 s of 5 s
    assert {f"{name}_ci95" for name in [*expected, "miou_set"] if name != "n"} <= set(found)


def test_the_first_segment_meets_the_best_truth_for_iou_and_iop_apart():
    values = tasks.sample_values(gqa("B", [[0, 10], [50, 60]], truth=[[0, 2], [6, 20]]))
    assert values["miou"] == pytest.approx(4 / 20)  # against [0, 2] 2 / 10, against [6, 20] 4 / 20
    assert values["miop"] == pytest.approx(4 / 10)
    assert values["miou_set"] == pytest.approx(6 / 30)  # 6 s of [0, 20] and [50, 60]
    assert values["miop_set"] == pytest.approx(6 / 20)
    apart = tasks.sample_values(gqa("B", [[0, 10]], truth=[[8, 12], [0, 100]]))
    assert apart["miou"] == pytest.approx(2 / 12)  # [0, 100] gives 0.1
    assert apart["miop"] == 1  # [8, 12] gives 0.2


def test_grounded_qa_by_hand():
    rows = [gqa("B", [[4, 6]]), gqa("A", [[4, 6]]), gqa("B", [[0, 20]]), gqa("B", []), gqa(None, [[6, 6]])]
    found = tasks.score_predictions(numbered(rows))["tasks"]["gqa"]
    expected = {
        "n": 5,
        "accuracy": 60,
        "acc_gqa": 20,
        "iop@0.3": 60,
        "iop@0.5": 60,
        "iou@0.3": 40,
        "iou@0.5": 40,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["miop"] == pytest.approx(100 * (1 + 1 + 0.2 + 0 + 1) / 5)  # the last has no length, inside
    assert found["miou"] == pytest.approx(100 * (0.5 + 0.5 + 0.2 + 0 + 0) / 5)
    assert found["parse_fail"] == 40


def test_multiple_choice_and_types():
    rows = [
        {"task": "mcqa", "pred_choice": choice, "answer": "B", "type": kind}
        for choice, kind in (("B", "CW"), ("A", "CW"), (None, "TN"))
    ]
    result = tasks.score_predictions(numbered(rows))
    assert result["tasks"]["mcqa"]["accuracy"] == pytest.approx(100 / 3)
    assert result["tasks"]["mcqa"]["parse_fail"] == pytest.approx(100 / 3)
    assert {kind: block["n"] for kind, block in result["types"]["mcqa"].items()} == {"CW": 2, "TN": 1}
    assert result["types"]["mcqa"]["CW"]["accuracy"] == 50


@pytest.mark.parametrize(
    ("response", "tagged", "tagged_or_text"),
    [
        ("<answer>B</answer>", 1, 1),
        ("B", 0, 1),
        ("B. a cat", 0, 1),
        ("<think>A</think>\nB", 0, 1),
        ("B <answer>A</answer>", 0, 0),  # a block wins over the text around it
        ("<think>B</think>", 0, 0),
        ("", 0, 0),
    ],
)
def test_answer_modes(response, tagged, tagged_or_text):
    row = {
        "id": 0,
        "task": "mcqa",
        "response": response,
        "pred_choice": "B",
        "answer": "B",
        "options": ["a dog", "a cat"],
    }
    assert tasks.sample_values(row)["accuracy"] == tagged
    assert tasks.sample_values(row, "tagged_or_text")["accuracy"] == tagged_or_text


def test_responses_are_scored_raw():
    """Nothing is clipped: official scripts take the prediction as it is, while the reward clips it."""
    values = tasks.sample_values(tvg(None, response="<answer>4 to 40</answer>"))
    assert values["miou"] == pytest.approx(4 / 36)
    both = tasks.sample_values(gqa(None, None, response="<think>x</think><answer>B, 4 to 8</answer>"))
    assert both["acc_gqa"] == 1
    assert both["parse_fail"] == 0


@pytest.mark.parametrize("pred", [[[8, 4]], [[4, math.nan]], [[4, 8], [9, 8]], None])
def test_malformed_stored_segments_are_parse_failures(pred):
    values = tasks.sample_values(tvg(pred))
    assert values["parse_fail"] == 1
    assert values["miou"] == values["miou_set"] == 0


def test_intervals_cover_the_mean_and_repeat():
    rng = np.random.default_rng(1)
    values_NM = rng.normal(5, 2, size=(400, 1))
    low, high = intervals.bootstrap_interval(values_NM)
    half_width = 1.96 * values_NM.std() / 20  # the normal approximation
    assert low[0] == pytest.approx(values_NM.mean() - half_width, abs=0.05)
    assert high[0] == pytest.approx(values_NM.mean() + half_width, abs=0.05)
    assert intervals.bootstrap_interval(values_NM) == (low, high)
    rows = numbered([tvg([[4, 8]])] * 3)
    assert tasks.score_predictions(rows)["tasks"]["tvg"]["miou_ci95"] == [100, 100]


def test_intervals_hold_the_truth_about_as_often_as_they_say(capsys):
    """A skewed metric and a rate, two results that agree on most questions, 150 questions at a time."""
    rng = np.random.default_rng(0)
    base = rng.beta(0.4, 0.6, size=5000)
    tuned = np.where(rng.random(5000) < 0.3, rng.beta(0.8, 0.5, size=5000), base)
    for name, a, b in (("mean IoU", base, tuned), ("R1@0.5", base >= 0.5, tuned >= 0.5)):
        covered = bench_intervals.coverage(100.0 * a, 100.0 * b, n=150, draws=400)
        with capsys.disabled():
            print(f"\n{name}: 95% intervals cover {covered[0]:.3f}, of the paired difference {covered[1]:.3f}")
        assert all(0.92 <= share <= 0.975 for share in covered)  # 400 draws: +- 0.022


def test_paired_interval():
    """Two runs that differ by the same amount on every sample differ for certain, however samples vary."""
    a = list(np.random.default_rng(0).random(50))
    assert intervals.paired_interval(a, [value + 0.25 for value in a]) == pytest.approx((0.25, 0.25, 0.25))
    mean, low, high = intervals.paired_interval([0] * 100, [1] * 60 + [-1] * 40)
    assert mean == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - 1.96 * 0.098, abs=0.03)  # sd of one difference: 0.98
    assert high == pytest.approx(0.2 + 1.96 * 0.098, abs=0.03)
    with pytest.raises(ValueError, match="same samples"):
        intervals.paired_interval([1], [1, 2])


def test_a_paired_difference_is_over_the_questions_that_both_have():
    """Two models by cluster, and several seeds of each, whose questions are drawn for all seeds at once."""
    before, after = {"a": 1.0, "b": 2.0, "c": 9.0}, {"d": 5.0, "b": 5.0, "a": 2.0}
    clusters = {"a": "x", "b": "x", "c": "y"}
    assert intervals.paired_difference(before, after, clusters) == (2.0, 2.0, 2.0)  # one cluster
    assert intervals.paired_difference(before, after) == intervals.paired_interval([1.0, 2.0], [2.0, 5.0])
    seeds = [{"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 0.0}], [{"b": 5.0, "a": 2.0}, {"a": 4.0, "b": 4.0}]
    assert intervals.paired_difference(*seeds) == intervals.crossed_interval(np.array([[1.0, 3.0], [4.0, 1.0]]))
    with pytest.raises(ValueError, match="answered different questions"):
        intervals.paired_difference([before], [after])


# ---- types, several responses, unanswered --------------------------------------------------------------------------


def test_types_are_paths_and_every_level_has_its_row():
    kinds = [("causal/CW", "B"), ("causal/CH", "A"), ("causal/CW", "B"), ("temporal/TN", "A"), ("", "B")]
    rows = [{"task": "mcqa", "pred_choice": choice, "answer": "B", "type": kind} for kind, choice in kinds]
    result = tasks.score_predictions(numbered(rows))
    sizes = {kind: block["n"] for kind, block in result["types"]["mcqa"].items()}
    assert sizes == {"causal": 3, "causal/CH": 1, "causal/CW": 2, "temporal": 1, "temporal/TN": 1}
    assert result["types"]["mcqa"]["causal"]["accuracy"] == pytest.approx(200 / 3)
    assert "accuracy_macro" not in result["tasks"]["mcqa"]  # a row has no type
    macro = tasks.score_predictions(numbered(rows[:4]))["tasks"]["mcqa"]
    assert macro["accuracy"] == 50 and macro["accuracy_macro"] == pytest.approx((200 / 3 + 0) / 2)
    assert "accuracy_macro" not in tasks.score_predictions(numbered(rows[:3]))["tasks"]["mcqa"]  # one type


def test_the_interval_of_the_macro_mean_is_that_of_the_types():
    """Constant types have no spread, however often a resample draws them; unequal ones count alike."""
    right = [{"task": "mcqa", "pred_choice": "B", "answer": "B", "type": kind} for kind in ["a"] * 30 + ["b"] * 3]
    found = tasks.score_predictions(numbered(right))["tasks"]["mcqa"]
    assert (found["accuracy_macro"], found["accuracy_macro_ci95"]) == (100, [100, 100])
    rng = np.random.default_rng(0)
    kinds = ["a"] * 900 + ["b"] * 100
    rows = [{"task": "mcqa", "pred_choice": "AB"[rng.random() < 0.9], "answer": "B", "type": kind} for kind in kinds]
    low, high = tasks.score_predictions(numbered(rows))["tasks"]["mcqa"]["accuracy_macro_ci95"]
    half_width = 1.96 * 100 * math.sqrt(0.9 * 0.1 / 900 + 0.9 * 0.1 / 100) / 2
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.2)


def test_questions_about_one_video_are_drawn_together():
    """Five equal questions a video say as much as one."""
    rng = np.random.default_rng(0)
    spans = [[[4, 8]] if rng.random() < 0.5 else [[4, 6]] for _ in range(80)]
    one = numbered([tvg(span, video=f"{i}.mp4") for i, span in enumerate(spans)])
    five = numbered([row for row in one for _ in range(5)])
    alone = numbered([{key: value for key, value in row.items() if key != "video"} for row in five])
    width = {}
    for name, rows in (("one", one), ("five", five), ("alone", alone)):
        low, high = tasks.score_predictions(rows)["tasks"]["tvg"]["miou_ci95"]
        width[name] = high - low
    assert width["five"] == pytest.approx(width["one"], rel=0.15)
    assert width["alone"] == pytest.approx(width["one"] / math.sqrt(5), rel=0.15)
    a, b = [0.0] * 400, [row["pred_segments"][0][1] / 8 for row in five]
    together = intervals.paired_interval(a, b, clusters=[row["video"] for row in five])
    assert together[2] - together[1] > 1.8 * np.subtract(*intervals.paired_interval(a, b)[:0:-1])


def test_rows_with_and_without_several_responses_go_together():
    """A question without a prediction has no list of them."""
    rows = [tvg(None, responses=["<answer>4 to 8</answer>", "?"]), tvg(None, response="", missing=True, id="m")]
    for some in (rows, rows[::-1]):
        found = tasks.score_predictions(some)["tasks"]["tvg"]
        assert (found["miou"], found["miou_best"], found["num_missing"]) == (25, 50, 1)


def test_several_responses_by_hand():
    responses = [f"<answer>{span}</answer>" for span in ("4 to 8", "4 to 6", "9 to 10")]  # IoU 1, 0.5, 0
    found = tasks.score_predictions([tvg(None, responses=[*responses, "?"])])["tasks"]["tvg"]
    assert (found["n"], found["miou"], found["miou_best"], found["parse_fail"]) == (1, 37.5, 100, 25)
    assert (found["r1@0.7"], found["r1@0.7_best"]) == (25, 100) and "parse_fail_best" not in found
    for bad in ([], "4 to 8", [1]):
        with pytest.raises(ValueError, match="row 1: key 'response"):
            tasks.score_predictions([tvg(None, responses=bad)])


def test_skip_leaves_out_what_has_no_usable_answer():
    """As Video-MME's script, which divides by the answered ones, and NExT-GQA's, which knows no others."""
    rows = numbered([gqa("B", [[4, 6]]), gqa(None, [[4, 6]]), gqa("A", []), gqa(None, [], response="?")])
    rows += [gqa(None, [], response="", missing=True, id="m")]
    wrong = tasks.score_predictions(rows)["tasks"]["gqa"]
    skip = tasks.score_predictions(rows, unanswered="skip")["tasks"]["gqa"]
    assert (wrong["n"], wrong["accuracy"], wrong["parse_fail"], wrong["num_missing"]) == (5, 20, 80, 1)
    assert (skip["n"], skip["num_skipped"], skip["parse_fail"]) == (3, 2, pytest.approx(200 / 3))
    assert skip["accuracy"] == pytest.approx(100 / 3)  # a choice without a span is an answer to the question
    several = tvg(None, responses=["?", "<answer>4 to 8</answer>"])
    assert tasks.score_predictions([several], unanswered="skip")["tasks"]["tvg"]["n"] == 1
    nothing = tasks.score_predictions(rows[3:4], unanswered="skip")["tasks"]["gqa"]
    assert nothing == {"num_unreadable": 0, "num_missing": 0, "num_skipped": 1, "n": 0}
    with pytest.raises(ValueError, match="unanswered: 'drop' is none of wrong, skip"):
        tasks.score_predictions([], unanswered="drop")


# ---- answers in plain words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a cat", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (B) a cat.", "B"),
        ("Best option: (B)", "B"),
        ("Answer: B", "B"),
        ("a cat", "B"),
        ("<think>A or B?</think> The final answer is: A", "A"),
        ("The answer is B. a dog", None),  # the letter of one option with the text of another
        ("A dog or a cat", None),
        ("A or B", None),
        ("A, B", None),
        ("The answer is a", None),  # cut off before its text
        ("The answer is not B", None),
        ("**B**", "B"),
        ("The answer is: **B**", "B"),
        (r"\boxed{B}", "B"),
        ("B) something else", "B"),
        ("B\nIt meows.", "B"),
        ("Answer: (B)\nExplanation: A barks.", "B"),
        ("The correct option is B. Because it meows.", "B"),
        ("Based on the video, the correct answer is B.", "B"),
        ("Answer: A. Or rather, the answer is B.", None),
        ("The answer is C.", None),
        ("<answer>The answer is B.</answer>", "B"),  # the form asked for is no worse than none
        ("<answer>**B**</answer>", "B"),
        (r"<answer>\boxed{B}</answer>", "B"),
        ("<answer>A or B</answer>", None),
    ],
)
def test_a_choice_in_plain_words(response, choice):
    assert answers.parse_response(response, ["a dog", "a cat"], "tagged_or_text")[0] == choice


@pytest.mark.parametrize(
    ("response", "segments"),
    [
        ("3.5 to 12", [(3.5, 12)]),
        ("From 3.5 seconds to 12.0 seconds.", [(3.5, 12)]),
        ("The given query happens in 24.3 - 30.4 seconds.", [(24.3, 30.4)]),
        ("It happens between 3 and 7 seconds, not from 8 to 9.", [(3, 7)]),
        ("The video lasts from 0 to 30 seconds. It happens from 12 to 20 seconds.", []),  # undecided
        ("from 2 to 5 people, from 10 to 20 seconds", [(10, 20)]),
        ("It is not from 3 to 7 seconds.", []),
        ("<think>First. Perhaps from 3 to 7 seconds, or", []),  # a thought that was cut off
        ("from 3 to 7 minutes", []),
        ("at 5-10% of it", []),
        ("3,5 to 7,5", []),
        ("from -3 to 7", []),
        ("[12.5s, 20.3s]", [(12.5, 20.3)]),
        ("The answer is (3, 7).", [(3, 7)]),
        ("It starts at 3 seconds and ends at 7 seconds.", [(3, 7)]),
        ('```json\n{"start_time": 3, "end_time": 7, "label": "x"}\n```', [(3, 7)]),
        ("between 3s and 7s", [(3, 7)]),
        ("from 0:24 to 0:30.", [(24, 30)]),
        ("from 9 to 3", []),
        ("at 3 seconds", []),
        ("the 2nd person of 3", []),
        ("<answer>It is from 3 to 7</answer>", [(3, 7)]),
        ("<answer>From 3.5 to 12</answer>", [(3.5, 12)]),
        ("<answer>from 3 to 7, or from 4 to 8</answer>", []),
        ("It happens from 3~7 s.", [(3, 7)]),
    ],
)
def test_a_segment_in_plain_words(response, segments):
    assert answers.parse_response(response, None, "tagged_or_text")[1] == segments


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.:-– tobewnads()AB\n", max_size=60))
def test_any_text_is_parsed_without_an_error(text):
    choice, segments = answers.parse_response(text, ["a dog", "a cat"], "tagged_or_text")
    assert choice in (None, "A", "B") and all(0 <= start <= end < math.inf for start, end in segments)


def test_long_texts_take_no_time():
    """Nothing backtracks: a million characters of near-matches."""
    for text in ("the best " * 100_000, "between 3 " * 100_000, "3 " * 500_000, "3-" * 500_000, "3." * 500_000):
        answers.parse_response(text, ["a dog", "a cat"], "tagged_or_text")
