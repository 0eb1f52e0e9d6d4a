"""`eval.py score`: its files and messages, and tables that others have published, from their predictions."""

import csv
import gzip
import json

import pytest
from conftest import SHARED
from prediction_rows import gqa, tvg

import eval as evaluation
from metrics import tasks

ANNOTATIONS = SHARED / "data" / "annotations"
needs_annotations = pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason=f"no {ANNOTATIONS}")


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
        ("{", "row 2: not valid JSON"),
        ('\n\n"x"', "row 4: expected an object"),  # blank lines are passed over
        ("[1]", "row 2: expected an object"),
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
    assert message.startswith(f"error: {path}: row ")
    assert named in message
    assert "\n" not in message
    assert not (tmp_path / "metrics.json").exists()


def test_bad_files_and_modes_are_named(tmp_path):
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.touch()
    for path, reason in ((missing, "No such file"), (empty, "no rows"), (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit, match=f"^error: {path}: {reason}"):
            evaluation.main(["score", str(path), "--out", str(tmp_path / "metrics.json")])
    good, out = write_rows(tmp_path / "good.jsonl", [tvg([[4, 8]])]), tmp_path / "missing" / "metrics.json"
    with pytest.raises(SystemExit, match=f"^error: {out}.*: No such file"):
        evaluation.main(["score", str(good), "--out", str(out)])
    with pytest.raises(ValueError, match="tagged_or_text"):
        tasks.score_predictions([], answer="text")


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
    found = tasks.score_predictions(rows)["tasks"]["gqa"]
    names = ("acc_gqa", "miop", "iop@0.3", "iop@0.5", "miou", "iou@0.3", "iou@0.5")
    assert found["n"] == 3358
    assert tuple(round(found[name], 1) for name in names) == published
    # the official scorer skips what has no prediction: the mean over the others, where ours counts them as wrong
    part = [row | ({"response": "", "missing": True} if i % 3 == 0 else {}) for i, row in enumerate(rows)]
    official = tasks.score_predictions([row for row in part if "missing" not in row])["tasks"]["gqa"]
    skip = tasks.score_predictions(part, unanswered="skip")["tasks"]["gqa"]
    ours = tasks.score_predictions(part)["tasks"]["gqa"]
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
    found = tasks.score_predictions(rows)["tasks"]["tvg"]
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
    result = tasks.score_predictions(rows)
    assert round(result["tasks"]["mcqa"]["accuracy"], 2) == 49.74
    by_type = {kind: round(block["accuracy"], 2) for kind, block in result["types"]["mcqa"].items()}
    assert by_type == {"C": 46.26, "T": 50.74, "D": 59.33}


@needs_annotations
def test_time_r1_published_ious():
    """The training set's `difficulty` is 100 x the IoU of its published prediction, all 2,500 of them."""
    rows = json.loads(gzip.decompress((ANNOTATIONS / "tvgbench" / "train_2k5.json.gz").read_bytes()))
    scored = [tasks.sample_values(tvg([row["pred"]], [row["timestamp"]]))["miou"] for row in rows]
    assert len(rows) == 2500
    assert [100 * value for value in scored] == pytest.approx([row["difficulty"] for row in rows], abs=1e-6)
