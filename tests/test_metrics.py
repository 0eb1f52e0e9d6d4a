"""Metrics: hand-computed numbers, published tables, intervals and error messages; no model runs here."""

import csv
import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import metrics
import plain

sys.path.insert(0, str(REPO / "benchmarks"))
import bench_intervals

ANNOTATIONS = Path(__file__).resolve().parents[2] / "shared" / "data" / "annotations"
needs_annotations = pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason=f"no {ANNOTATIONS}")


def tvg(pred, truth=((4, 8),), **fields):
    return {"id": "x", "task": "tvg", "pred_segments": pred, "segments": truth, "duration": 20.0} | fields


def gqa(choice, pred, truth=((4, 8),), **fields):
    row = {
        "id": "x",
        "task": "gqa",
        "pred_choice": choice,
        "pred_segments": pred,
        "answer": "B",
        "segments": truth,
    }
    return row | {"duration": 20.0} | fields


def numbered(rows):
    return [row | {"id": f"row/{index}"} for index, row in enumerate(rows)]


def test_grounding_by_hand():
    rows = [tvg([[4, 8]]), tvg([[4, 6]]), tvg([[0, 1], [4, 8]]), tvg([])]  # IoU 1, 0.5, 0 and 0
    found = metrics.score_predictions(numbered(rows))["tasks"]["tvg"]
    expected = {"n": 4, "miou": 37.5, "r1@0.3": 50, "r1@0.5": 50, "r1@0.7": 25, "parse_fail": 25}
    assert {name: found[name] for name in expected} == expected
    assert found["miou_set"] == pytest.approx(100 * (1 + 0.5 + 4 / 5 + 0) / 4)  # the third: 4 s of 5 s
    assert {f"{name}_ci95" for name in [*expected, "miou_set"] if name != "n"} <= set(found)


def test_the_first_segment_meets_the_best_truth_for_iou_and_iop_apart():
    values = metrics.sample_values(gqa("B", [[0, 10], [50, 60]], truth=[[0, 2], [6, 20]]))
    assert values["miou"] == pytest.approx(4 / 20)  # against [0, 2] 2 / 10, against [6, 20] 4 / 20
    assert values["miop"] == pytest.approx(4 / 10)
    assert values["miou_set"] == pytest.approx(6 / 30)  # 6 s of [0, 20] and [50, 60]
    assert values["miop_set"] == pytest.approx(6 / 20)
    apart = metrics.sample_values(gqa("B", [[0, 10]], truth=[[8, 12], [0, 100]]))
    assert apart["miou"] == pytest.approx(2 / 12)  # [0, 100] gives 0.1
    assert apart["miop"] == 1  # [8, 12] gives 0.2


def test_grounded_qa_by_hand():
    rows = [gqa("B", [[4, 6]]), gqa("A", [[4, 6]]), gqa("B", [[0, 20]]), gqa("B", []), gqa(None, [[6, 6]])]
    found = metrics.score_predictions(numbered(rows))["tasks"]["gqa"]
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
    result = metrics.score_predictions(numbered(rows))
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
    assert metrics.sample_values(row)["accuracy"] == tagged
    assert metrics.sample_values(row, "tagged_or_text")["accuracy"] == tagged_or_text


def test_responses_are_scored_raw():
    """Nothing is clipped: official scripts take the prediction as it is, while the reward clips it."""
    values = metrics.sample_values(tvg(None, response="<answer>4 to 40</answer>"))
    assert values["miou"] == pytest.approx(4 / 36)
    both = metrics.sample_values(gqa(None, None, response="<think>x</think><answer>B, 4 to 8</answer>"))
    assert both["acc_gqa"] == 1
    assert both["parse_fail"] == 0


@pytest.mark.parametrize("pred", [[[8, 4]], [[4, math.nan]], [[4, 8], [9, 8]], None])
def test_malformed_stored_segments_are_parse_failures(pred):
    values = metrics.sample_values(tvg(pred))
    assert values["parse_fail"] == 1
    assert values["miou"] == values["miou_set"] == 0


def test_intervals_cover_the_mean_and_repeat():
    rng = np.random.default_rng(1)
    values_NM = rng.normal(5, 2, size=(400, 1))
    low, high = metrics.bootstrap_interval(values_NM)
    half_width = 1.96 * values_NM.std() / 20  # the normal approximation
    assert low[0] == pytest.approx(values_NM.mean() - half_width, abs=0.05)
    assert high[0] == pytest.approx(values_NM.mean() + half_width, abs=0.05)
    assert metrics.bootstrap_interval(values_NM) == (low, high)
    rows = numbered([tvg([[4, 8]])] * 3)
    assert metrics.score_predictions(rows)["tasks"]["tvg"]["miou_ci95"] == [100, 100]


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
    assert metrics.paired_interval(a, [value + 0.25 for value in a]) == pytest.approx((0.25, 0.25, 0.25))
    mean, low, high = metrics.paired_interval([0] * 100, [1] * 60 + [-1] * 40)
    assert mean == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - 1.96 * 0.098, abs=0.03)  # sd of one difference: 0.98
    assert high == pytest.approx(0.2 + 1.96 * 0.098, abs=0.03)
    with pytest.raises(ValueError, match="same samples"):
        metrics.paired_interval([1], [1, 2])


# ---- types, several responses, unanswered --------------------------------------------------------------------------


def test_types_are_paths_and_every_level_has_its_row():
    kinds = [("causal/CW", "B"), ("causal/CH", "A"), ("causal/CW", "B"), ("temporal/TN", "A"), ("", "B")]
    rows = [{"task": "mcqa", "pred_choice": choice, "answer": "B", "type": kind} for kind, choice in kinds]
    result = metrics.score_predictions(numbered(rows))
    sizes = {kind: block["n"] for kind, block in result["types"]["mcqa"].items()}
    assert sizes == {"causal": 3, "causal/CH": 1, "causal/CW": 2, "temporal": 1, "temporal/TN": 1}
    assert result["types"]["mcqa"]["causal"]["accuracy"] == pytest.approx(200 / 3)
    assert "accuracy_macro" not in result["tasks"]["mcqa"]  # a row has no type
    macro = metrics.score_predictions(numbered(rows[:4]))["tasks"]["mcqa"]
    assert macro["accuracy"] == 50 and macro["accuracy_macro"] == pytest.approx((200 / 3 + 0) / 2)
    assert "accuracy_macro" not in metrics.score_predictions(numbered(rows[:3]))["tasks"]["mcqa"]  # one type


def test_the_interval_of_the_macro_mean_is_that_of_the_types():
    """Constant types have no spread, however often a resample draws them; unequal ones count alike."""
    right = [{"task": "mcqa", "pred_choice": "B", "answer": "B", "type": kind} for kind in ["a"] * 30 + ["b"] * 3]
    found = metrics.score_predictions(numbered(right))["tasks"]["mcqa"]
    assert (found["accuracy_macro"], found["accuracy_macro_ci95"]) == (100, [100, 100])
    rng = np.random.default_rng(0)
    kinds = ["a"] * 900 + ["b"] * 100
    rows = [{"task": "mcqa", "pred_choice": "AB"[rng.random() < 0.9], "answer": "B", "type": kind} for kind in kinds]
    low, high = metrics.score_predictions(numbered(rows))["tasks"]["mcqa"]["accuracy_macro_ci95"]
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
        low, high = metrics.score_predictions(rows)["tasks"]["tvg"]["miou_ci95"]
        width[name] = high - low
    assert width["five"] == pytest.approx(width["one"], rel=0.15)
    assert width["alone"] == pytest.approx(width["one"] / math.sqrt(5), rel=0.15)
    a, b = [0.0] * 400, [row["pred_segments"][0][1] / 8 for row in five]
    together = metrics.paired_interval(a, b, clusters=[row["video"] for row in five])
    assert together[2] - together[1] > 1.8 * np.subtract(*metrics.paired_interval(a, b)[:0:-1])


def test_rows_with_and_without_several_responses_go_together():
    """A question without a prediction has no list of them."""
    rows = [tvg(None, responses=["<answer>4 to 8</answer>", "?"]), tvg(None, response="", missing=True, id="m")]
    for some in (rows, rows[::-1]):
        found = metrics.score_predictions(some)["tasks"]["tvg"]
        assert (found["miou"], found["miou_best"], found["num_missing"]) == (25, 50, 1)


def test_several_responses_by_hand():
    responses = [f"<answer>{span}</answer>" for span in ("4 to 8", "4 to 6", "9 to 10")]  # IoU 1, 0.5, 0
    found = metrics.score_predictions([tvg(None, responses=[*responses, "?"])])["tasks"]["tvg"]
    assert (found["n"], found["miou"], found["miou_best"], found["parse_fail"]) == (1, 37.5, 100, 25)
    assert (found["r1@0.7"], found["r1@0.7_best"]) == (25, 100) and "parse_fail_best" not in found
    for bad in ([], "4 to 8", [1]):
        with pytest.raises(ValueError, match="row 1: key 'response"):
            metrics.score_predictions([tvg(None, responses=bad)])


def test_skip_leaves_out_what_has_no_usable_answer():
    """As Video-MME's script, which divides by the answered ones, and NExT-GQA's, which knows no others."""
    rows = numbered([gqa("B", [[4, 6]]), gqa(None, [[4, 6]]), gqa("A", []), gqa(None, [], response="?")])
    rows += [gqa(None, [], response="", missing=True, id="m")]
    wrong = metrics.score_predictions(rows)["tasks"]["gqa"]
    skip = metrics.score_predictions(rows, unanswered="skip")["tasks"]["gqa"]
    assert (wrong["n"], wrong["accuracy"], wrong["parse_fail"], wrong["num_missing"]) == (5, 20, 80, 1)
    assert (skip["n"], skip["num_skipped"], skip["parse_fail"]) == (3, 2, pytest.approx(200 / 3))
    assert skip["accuracy"] == pytest.approx(100 / 3)  # a choice without a span is an answer to the question
    several = tvg(None, responses=["?", "<answer>4 to 8</answer>"])
    assert metrics.score_predictions([several], unanswered="skip")["tasks"]["tvg"]["n"] == 1
    nothing = metrics.score_predictions(rows[3:4], unanswered="skip")["tasks"]["gqa"]
    assert nothing == {"num_unreadable": 0, "num_missing": 0, "num_skipped": 1, "n": 0}
    with pytest.raises(ValueError, match="unanswered: 'drop' is none of wrong, skip"):
        metrics.score_predictions([], unanswered="drop")


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
        ("<answer>The answer is B.</answer>", None),  # who uses the tags is held to the form asked for
    ],
)
def test_a_choice_in_plain_words(response, choice):
    assert plain.parse_response(response, ["a dog", "a cat"], "tagged_or_text")[0] == choice


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
        ("<answer>It is from 3 to 7</answer>", []),
    ],
)
def test_a_segment_in_plain_words(response, segments):
    assert plain.parse_response(response, None, "tagged_or_text")[1] == segments


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.:-– tobewnads()AB\n", max_size=60))
def test_any_text_is_parsed_without_an_error(text):
    choice, segments = plain.parse_response(text, ["a dog", "a cat"], "tagged_or_text")
    assert choice in (None, "A", "B") and all(0 <= start <= end < math.inf for start, end in segments)


def test_long_texts_take_no_time():
    """Nothing backtracks: a million characters of near-matches."""
    for text in ("the best " * 100_000, "between 3 " * 100_000, "3 " * 500_000, "3-" * 500_000, "3." * 500_000):
        plain.parse_response(text, ["a dog", "a cat"], "tagged_or_text")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_score_command(tmp_path, capsys):
    rows = [{"id": 1, "task": "mcqa", "response": "B", "answer": "B"}, tvg([]), tvg([[4, 8]], id="y")]
    out = tmp_path / "metrics.json"
    path = write_rows(tmp_path / "predictions.jsonl", rows)
    evaluation.main(["score", str(path), "--out", str(out), "--answer", "tagged_or_text"])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["spec"]["answer"] == "tagged_or_text" and found["spec"]["num_samples"] == 3
    assert found["tasks"]["mcqa"]["accuracy"] == 100
    assert found["tasks"]["tvg"]["miou"] == 50
    assert "1 without a usable answer counted as wrong" in capsys.readouterr().out
    for words, accuracy in (([], 100), (["--answer", "tagged"], 0)):  # as before, if nothing else is said
        evaluation.main(["score", str(path), "--out", str(out), *words])
        assert json.loads(out.read_text(encoding="utf-8"))["tasks"]["mcqa"]["accuracy"] == accuracy
    other = write_rows(tmp_path / "other.jsonl", rows)  # those metrics are not of these predictions
    evaluation.main(["score", str(other), "--out", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["tasks"]["mcqa"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "row 2: not a JSON object"),
        ('\n\n"x"', "row 4: not a JSON object"),  # blank lines are passed over
        ("[1]", "row 2: not a JSON object"),
        (json.dumps({"task": "tvg"}), "row 2: key 'id'"),
        (
            json.dumps({"id": 7, "task": "tvg", "pred_segments": [[1, 2]], "segments": [[1, 2]]}),
            "row 2: key 'id'",
        ),
        (json.dumps({"id": 8}), "row 2: key 'task'"),
        (json.dumps({"id": 8, "task": "vqa"}), "row 2: key 'task'"),
        (json.dumps({"id": 8, "task": "mcqa", "answer": "B"}), "row 2: key 'pred_choice'"),
        (json.dumps({"id": 8, "task": "mcqa", "pred_choice": "B"}), "row 2: key 'answer'"),
        (json.dumps({"id": 8, "task": "mcqa", "pred_choice": 1, "answer": "B"}), "row 2: key 'pred_choice'"),
        (json.dumps({"id": 8, "task": "mcqa", "pred_choice": "b", "answer": "B"}), "row 2: key 'pred_choice'"),
        (json.dumps({"id": 8, "task": "mcqa", "response": "b", "options": 5, "answer": "B"}), "row 2: key 'options'"),
        (json.dumps({"id": 8, "task": "mcqa", "pred_choice": "B", "answer": 1}), "row 2: key 'answer'"),
        (json.dumps({"id": 8, "task": "mcqa", "response": 1, "answer": "B"}), "row 2: key 'response'"),
        (json.dumps({"id": 8, "task": "tvg", "segments": [[1, 2]]}), "row 2: key 'pred_segments'"),
        (
            json.dumps({"id": 8, "task": "tvg", "pred_segments": [[1, 2, 3]], "segments": [[1, 2]]}),
            "'pred_segments'",
        ),
        (
            json.dumps({"id": 8, "task": "tvg", "pred_segments": [1, 2], "segments": [[1, 2]]}),
            "'pred_segments'",
        ),
        (json.dumps({"id": 8, "task": "tvg", "pred_segments": [[1, 2]]}), "row 2: key 'segments'"),
        (
            json.dumps({"id": 8, "task": "tvg", "pred_segments": [[1, 2]], "segments": []}),
            "row 2: key 'segments'",
        ),
        (
            json.dumps({"id": 8, "task": "tvg", "pred_segments": [], "segments": [[2, 1]]}),
            "row 2: key 'segments'",
        ),
    ],
)
def test_bad_rows_are_named_in_one_line(tmp_path, bad, named):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(tvg([[4, 8]], id=7)) + "\n" + bad + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["score", str(path), "--out", str(tmp_path / "metrics.json")])
    message = str(stop.value)
    assert message.startswith(f"{path}: row ")
    assert named in message
    assert "\n" not in message
    assert not (tmp_path / "metrics.json").exists()


def test_bad_files_and_modes_are_named(tmp_path):
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.touch()
    for path, reason in ((missing, "No such file"), (empty, "no rows"), (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit, match=f"^{path}: {reason}"):
            evaluation.main(["score", str(path), "--out", str(tmp_path / "metrics.json")])
    good, out = write_rows(tmp_path / "good.jsonl", [tvg([[4, 8]])]), tmp_path / "missing" / "metrics.json"
    with pytest.raises(SystemExit, match=f"^{out}.*: No such file"):
        evaluation.main(["score", str(good), "--out", str(out)])
    with pytest.raises(ValueError, match="tagged_or_text"):
        metrics.score_predictions([], answer="text")


@needs_annotations
@pytest.mark.parametrize(
    ("low", "high", "published"),
    [
        (0, 1, (2.1, 21.3, 21.2, 10.6, 21.3, 21.2, 10.6)),
        (0.25, 0.75, (3.2, 23.7, 28.4, 17.1, 19.4, 25.9, 13.6)),
    ],
)
def test_nextgqa_official_scorer(low, high, published):
    spans = json.loads((ANNOTATIONS / "nextgqa" / "gsub_val.json").read_text(encoding="utf-8"))
    with open(ANNOTATIONS / "nextgqa" / "val.csv", encoding="utf-8", newline="") as file:
        questions = list(csv.DictReader(file))
    rows = []
    for index, question in enumerate(questions):
        options, video = [question[f"a{number}"] for number in range(5)], spans[question["video_id"]]
        pred, truth = (
            [[low * video["duration"], high * video["duration"]]],
            video["location"][question["qid"]],
        )
        answer = "ABCDE"[options.index(question["answer"])]
        rows.append(gqa("ABCDE"[index % 5], pred, truth, answer=answer, id=index))
    found = metrics.score_predictions(rows)["tasks"]["gqa"]
    names = ("acc_gqa", "miop", "iop@0.3", "iop@0.5", "miou", "iou@0.3", "iou@0.5")
    assert found["n"] == 3358
    assert tuple(round(found[name], 1) for name in names) == published
    # the official scorer skips what has no prediction: the mean over the others, where ours counts them as wrong
    part = [row | ({"response": "", "missing": True} if i % 3 == 0 else {}) for i, row in enumerate(rows)]
    official = metrics.score_predictions([row for row in part if "missing" not in row])["tasks"]["gqa"]
    skip = metrics.score_predictions(part, unanswered="skip")["tasks"]["gqa"]
    ours = metrics.score_predictions(part)["tasks"]["gqa"]
    assert [skip[name] for name in names] == [official[name] for name in names]
    assert (skip["n"], skip["num_skipped"], ours["num_missing"], ours["n"]) == (2238, 1120, 1120, 3358)
    assert ours["miou"] == pytest.approx(official["miou"] * 2238 / 3358)


@needs_annotations
def test_charades_timechat_official_scorer():
    """280 of the 500 predictions are empty and count as 0."""
    folder = ANNOTATIONS / "predictions_charades_timechat"
    truth = json.loads((folder / "example_gt_file.json").read_text(encoding="utf-8"))["annotations"]
    predictions = json.loads((folder / "example_pred_file.json").read_text(encoding="utf-8"))
    truth_of = {str(row["id"]): [row["timestamp"]] for row in truth}
    rows = [tvg(pred["timestamp"], truth_of[key], id=key) for key, pred in predictions.items()]
    found = metrics.score_predictions(rows)["tasks"]["tvg"]
    assert (found["n"], found["parse_fail"]) == (500, 56)
    assert [round(found[f"r1@{threshold}"], 4) for threshold in (0.3, 0.5, 0.7)] == [9.0, 3.4, 1.4]
    assert found["miou"] == pytest.approx(6.2998, abs=5e-5)


@needs_annotations
def test_nextqa_published_accuracy():
    """HGA on the validation set: causal 46.26, temporal 50.74, descriptive 59.33, all 49.74."""
    path = ANNOTATIONS / "predictions_nextqa" / "HGA-bert-ft-h256-val.json"
    predictions = json.loads(path.read_text(encoding="utf-8"))
    with open(ANNOTATIONS / "nextqa" / "val.csv", encoding="utf-8", newline="") as file:
        kind_of = {f"{row['video']}_{row['qid']}": row["type"][0] for row in csv.DictReader(file)}
    rows = [
        {"id": key, "task": "mcqa", "type": kind_of[key]}
        | {"pred_choice": "ABCDE"[row["prediction"]], "answer": "ABCDE"[row["answer"]]}
        for key, row in predictions.items()
    ]
    result = metrics.score_predictions(rows)
    assert round(result["tasks"]["mcqa"]["accuracy"], 2) == 49.74
    by_type = {kind: round(block["accuracy"], 2) for kind, block in result["types"]["mcqa"].items()}
    assert by_type == {"C": 46.26, "T": 50.74, "D": 59.33}


@needs_annotations
def test_time_r1_published_ious():
    """The training set's `difficulty` is 100 x the IoU of its published prediction, all 2,500 of them."""
    rows = json.loads(gzip.decompress((ANNOTATIONS / "tvgbench" / "train_2k5.json.gz").read_bytes()))
    scored = [metrics.sample_values(tvg([row["pred"]], [row["timestamp"]]))["miou"] for row in rows]
    assert len(rows) == 2500
    assert [100 * value for value in scored] == pytest.approx([row["difficulty"] for row in rows], abs=1e-6)
