"""Published annotations to records: the counts of the real files, the form of the others, and everything broken."""

import csv
import gzip
import io
import json
import subprocess
import sys

import pytest
import yaml
from conftest import REPO, SHARED, read_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from convert import SOURCES
from records import sources
from records.files import read_samples

PUBLIC = SHARED / "data" / "annotations"
CHARADES = PUBLIC / "charades_sta"
real = pytest.mark.skipif(not PUBLIC.is_dir(), reason="the published annotations are not here (../shared)")


def run(tmp_path, source: str, *annotations, **options) -> tuple[list[dict], dict]:
    """Records and report of the command; every record must be one that data.py reads."""
    out = tmp_path / "out.jsonl"
    args = [source, "--annotations", *map(str, annotations), "--out", str(out)]
    for name, value in options.items():
        args += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    convert.main(args)
    records, report = read_jsonl(out), json.loads((tmp_path / "out.report.json").read_text())
    for video, is_folder in {(record["video"], "fps" in record) for record in records}:
        path = tmp_path / "videos" / video
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if is_folder else path.touch()
    samples = read_samples(str(out), out_of_clip="error", chat=True)
    assert [sample.id for sample in samples] == [record["id"] for record in records]
    counts = [report["rejected"]["rows"], report["excluded"]["rows"]]
    assert report["read"] == report["kept"] + sum(counts) and report["kept"] == len(records)
    assert not list(tmp_path.glob("*.tmp"))
    return records, report


def write(path, *rows) -> str:
    """Rows as JSON lines, as a JSON list (.json) or, of texts, as they are."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text(f"[{', '.join(texts)}]" if path.suffix == ".json" else "\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def error_of(tmp_path, source: str, *annotations, **options) -> str:
    with pytest.raises(SystemExit) as raised:
        run(tmp_path, source, *annotations, **options)
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not list(tmp_path.glob("out.*")), "a failed conversion leaves nothing"
    return message.removeprefix("error: ")


def reasons(report: dict, kind: str = "rejected") -> dict[str, int]:
    return {reason: what["rows"] for reason, what in report[kind]["reasons"].items()}


# ---- the real files ------------------------------------------------------------------------------------------------


@real
def test_charades_sta_test_is_the_published_release(tmp_path):
    """The release in JSON lines differs from the text file in 562 rows: those that end after their video."""
    durations = CHARADES / "charades.json.gz"
    records, report = run(tmp_path, "charades_sta", CHARADES / "charades_sta_test.txt", durations=durations)
    release = [json.loads(line) for line in (CHARADES / "charades_test_release.jsonl").read_text().splitlines()]
    assert [(r["question"], r["duration"], r["video"], r["segments"]) for r in records] == [
        (r["query"], r["duration"], f"{r['vid']}.mp4", r["relevant_windows"]) for r in release
    ]
    assert records[0]["id"] == "charades_sta/test/0" and report["kept"] == 3720
    assert report["repaired"]["rows"] == 562 and report["repaired"]["rules"] == {"clamped_end": 562}
    assert report["repaired"]["where"][0] == "charades_sta_test.txt:20"
    records, report = run(
        tmp_path, "charades_sta", CHARADES / "charades_sta_test.txt", durations=durations, no_repair=True
    )
    assert len(records) == 3158 and reasons(report) == {"clamped_end would be needed (--no-repair)": 562}
    by_row = {record["id"]: record for record in records}
    assert "charades_sta/test/19" not in by_row and by_row["charades_sta/test/20"]["question"]


@real
@pytest.mark.parametrize(
    ("source", "file", "read", "rules", "rejected"),
    [
        ("charades_sta", "charades_sta/charades_sta_train.txt", 12408, {"clamped_end": 1802}, 0),
        ("activitynet", "activitynet_captions/train.json.gz", 37421, {"clamped_end": 29, "swapped": 2}, 2),
        ("activitynet", "activitynet_captions/val_1.json.gz", 17505, {"clamped_end": 5}, 0),
        ("activitynet", "activitynet_captions/val_2.json", 17031, {"clamped_end": 1}, 0),
        ("nextgqa", "nextgqa/val.csv", 3358, {"clamped_end": 3}, 0),
        ("nextgqa", "nextgqa/test.csv", 5553, {"clamped_start": 36, "first_of_equal_options": 1}, 0),
        ("nextqa", "nextqa/val.csv", 4996, {}, 0),
        ("time_r1", "tvgbench/train_2k5.json.gz", 2500, {"clamped_end": 28}, 6),
    ],
)
def test_counts_of_the_real_files(tmp_path, source, file, read, rules, rejected):
    options = {"durations": CHARADES / "charades.json.gz"} if source == "charades_sta" else {}
    if source == "nextgqa":
        options = {"spans": PUBLIC / "nextgqa" / f"gsub_{(PUBLIC / file).stem}.json"}
    records, report = run(tmp_path, source, PUBLIC / file, **options)
    assert (report["read"], report["kept"]) == (read, read - rejected)
    assert report["repaired"]["rules"] == rules and report["repaired"]["rows"] == sum(rules.values())
    assert report["rejected"]["rows"] == rejected and report["excluded"]["rows"] == 0
    assert not any(record["question"] != record["question"].strip() for record in records)
    if file.endswith("train.json.gz"):
        (what,) = report["rejected"]["reasons"].values()
        assert list(what["where"]) == ["train.json.gz:6676", "train.json.gz:23234"]
        assert what["where"]["train.json.gz:6676"] == "a segment must end after it starts, got [34.77, 34.77]"


@real
def test_nextgqa_several_spans_types_and_ids(tmp_path):
    for split, several in (("val", 339), ("test", 591)):
        spans = PUBLIC / "nextgqa" / f"gsub_{split}.json"
        records, _ = run(tmp_path, "nextgqa", PUBLIC / "nextgqa" / f"{split}.csv", spans=spans)
        assert sum(len(record["segments"]) > 1 for record in records) == several
        assert {record["type"] for record in records} == {f"{name}" for name in _next_types() if name[0] != "d"}
    (twice,) = [record for record in records if record["id"] == "nextgqa/test/3842638015_4"]
    assert twice["options"][3:] == ["happy", "happy"] and twice["answer"] == "D"
    records, _ = run(tmp_path, "nextqa", PUBLIC / "nextqa" / "val.csv")
    assert {record["type"] for record in records} == _next_types()
    predictions = json.loads((PUBLIC / "predictions_nextqa" / "HGA-bert-ft-h256-val.json").read_text())
    answers = {record["id"].removeprefix("nextqa/val/"): "ABCDE".index(record["answer"]) for record in records}
    assert answers == {name: prediction["answer"] for name, prediction in predictions.items()}


def _next_types() -> set[str]:
    return {f"causal/C{x}" for x in "WH"} | {f"temporal/T{x}" for x in "NCP"} | {f"descriptive/D{x}" for x in "OLC"}


@real
def test_time_r1_keeps_what_it_publishes_and_rejects_broken_times(tmp_path):
    """[120, 14220] in a video of 158 s is mm:ss read as hh:mm:ss: clamped it would be a truth that nobody wrote."""
    path = PUBLIC / "tvgbench" / "train_2k5.json.gz"
    records, report = run(tmp_path, "time_r1", path)
    assert reasons(report) == {"segment [N, N] leaves the video by more than its length (N s)": 6}
    (what,) = report["rejected"]["reasons"].values()
    assert "segment [120.0, 14220.0]" in what["where"]["train_2k5.json.gz:40"]
    raw = json.loads(gzip.decompress(path.read_bytes()))
    for record in records:
        row = raw[int(record["id"].removeprefix("time_r1/train_2k5/"))]
        assert record["extra"] == {"pred": row["pred"], "difficulty": row["difficulty"]}
    cut = [record for record in records if ":" in record["video"]]
    assert len(cut) == 509 and not any("clip" in record for record in cut)
    clips = [record for record in records if "clip" in record]
    assert len(clips) == 156 and clips[1]["clip"] == [120.6, 131.4]


@real
def test_llamafactory_demo(tmp_path):
    records, _ = run(tmp_path, "llamafactory", PUBLIC / "llamafactory_mllm" / "mllm_video_demo.json")
    assert [record["video"] for record in records] == [f"mllm_demo_data/{x}" for x in ("1.mp4", "2.avi", "3.mp4")]
    assert records[1] == {
        "id": "llamafactory/mllm_video_demo/1",
        "task": "chat",
        "video": "mllm_demo_data/2.avi",
        "question": "What is she doing?",
        "response": "She is cooking.",
    }


# ---- rows in the published form ------------------------------------------------------------------------------------

QVH = {
    "qid": 2579,
    "query": "A girl",
    "duration": 150,
    "vid": "NUsG9BgSes0_210.0_360.0",
    "saliency_scores": [[4, 1, 1]],
}
QVH |= {"relevant_windows": [[82, 138], [140, 150]], "relevant_clip_ids": [41, 42]}
RTL = {"question_id": "a_0", "vid": "bXdq2zI1Ms0", "duration": 73.1, "question": "When does he begin?"}
RTL |= {"answer": "<10.60> <39.84> He begins <5.0> after"}
DIDEMO = {"annotation_id": 19, "video": "54322086@N00.mov", "description": "a dog", "num_segments": 6, "dl_link": ""}
DIDEMO |= {"times": [[5, 5], [0, 1], [0, 1], [5, 5], [5, 5]]}
TVGBENCH = {"path": "./dataset/timer1/videos/tvgbench_data/67db788f.mp4", "question": "what color?", "start": 254.92}
TVGBENCH |= {"answer": "40.58-43.1", "end": 339.55, "duration": 84.63, "qsemtype": "Human Action (Simple)"}
TEMPORAL_R1 = {
    "dataset": "charades",
    "video": "a.mp4",
    "problem": "a dog",
    "solution": [0.25, 1.1],
    "video_length": 20.0,
}
REXTIME = {"qid": "anet_val92", "vid": "v_ZMTi498qnPc", "duration": 100.5, "source": "ActivityNet_val_2"}
REXTIME |= {"question": "What?", "answer": "From <s0> to <e0>, <option>.", "category": "sequential", "ans": "B"}
REXTIME |= {"options": ["a", "b", "c", "d"], "span": [5, 8]}
VIDEOMME = {"video_id": "001", "duration": "short", "domain": "Knowledge", "videoID": "fFjv93ACGo8", "answer": "C"}
VIDEOMME |= {"question_id": "001-1", "task_type": "Counting/Problem", "question": "How many?"}
VIDEOMME |= {"options": ["A. Apples.", "B. Candles.", "C. Berries."]}
MMVU = {
    "id": "validation_1",
    "video": "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Chemistry/0.mp4",
}
MMVU |= {"question_type": "multiple-choice", "metadata": {"subject": "Computer Science"}, "question": "Which?"}
MMVU |= {"choices": {"A": "10.0", "B": "5.0", "C": "12.0", "D": "", "E": ""}, "answer": "B"}
MLVU = {"video": "movie101_66.mp4", "duration": 246, "question": "Which color?", "candidates": ["Yellow", "Red"]}
MLVU |= {"answer": "Red", "question_type": "plotQA"}
VIDEO_R1 = {"problem_id": 2, "problem": "What appears?", "data_type": "video", "problem_type": "multiple choice"}
VIDEO_R1 |= {"options": ["A. x", "B. y"], "solution": "<answer>B</answer>", "path": "./Eval/a.mp4", "process": ""}
VIDEO_R1 |= {"data_source": "LLaVA-Video-178K/30_60_s"}
CHAT = {"messages": [{"role": "user", "content": "<video>Why?"}, {"role": "assistant", "content": "So."}]}
CHAT |= {"videos": ["a.mp4"]}


def same(record: dict, **expected) -> None:
    assert {key: record.get(key) for key in expected} == expected


def test_grounding_in_the_published_forms(tmp_path):
    (record,), _ = run(tmp_path, "qvhighlights", write(tmp_path / "highlight_val_release.jsonl", QVH))
    same(record, id="qvhighlights/highlight_val_release/2579", video="NUsG9BgSes0_210.0_360.0.mp4", duration=150)
    assert record["segments"] == [[82, 138], [140, 150]]
    (record,), _ = run(tmp_path, "anet_rtl", write(tmp_path / "annot_val_1_q229.json", RTL))
    same(record, id="anet_rtl/annot_val_1_q229/a_0", video="v_bXdq2zI1Ms0.mp4", segments=[[10.6, 39.84]])
    (record,), _ = run(tmp_path, "tvgbench", write(tmp_path / "tvgbench.json", TVGBENCH))
    same(record, id="tvgbench/tvgbench/0", video="67db788f.mp4", segments=[[40.58, 43.1]], clip=[254.92, 339.55])
    assert record["type"] == "Human Action (Simple)"
    records, report = run(tmp_path, "temporal_r1", write(tmp_path / "t.json", TEMPORAL_R1, TEMPORAL_R1 | {"id": "x"}))
    assert [record["id"] for record in records] == ["temporal_r1/t/0", "temporal_r1/t/x"]
    assert records[0]["segments"] == [[5.0, 20.0]] and report["repaired"]["rules"] == {"clamped_end": 2}


def test_tacos_counts_in_frames(tmp_path):
    entry = {
        "fps": 25.0,
        "num_frames": 500,
        "timestamps": [[50, 100], [100, 510]],
        "sentences": ["He cuts.", " Stirs."],
    }
    records, report = run(tmp_path, "tacos", write(tmp_path / "val.jsonl", {"s13-d21.avi": entry}))
    same(records[0], video="s13-d21.avi", duration=20.0, segments=[[2.0, 4.0]])
    same(records[1], id="tacos/val/1", question="Stirs.", segments=[[4.0, 20.0]])
    assert report["repaired"]["rules"] == {"clamped_end": 1}


def test_didemo_takes_the_span_of_most_annotators(tmp_path):
    path = write(tmp_path / "val_data.json", DIDEMO, DIDEMO | {"annotation_id": 20, "times": [[1, 2], [0, 0]]})
    records, _ = run(tmp_path, "didemo", path)
    same(records[0], id="didemo/val_data/19", segments=[[25.0, 30.0]], duration=30.0, clip=[0.0, 30.0])
    assert records[0]["extra"]["annotators"][1] == [0.0, 10.0] and records[1]["segments"] == [[5.0, 15.0]]
    durations = write(tmp_path / "durations.jsonl", {"54322086@N00.mov": 28.2})
    records, report = run(tmp_path, "didemo", path, durations=durations)
    same(records[0], segments=[[25.0, 28.2]], duration=28.2, clip=[0.0, 28.2])
    assert report["repaired"]["rules"] == {"clamped_end": 1}


def test_question_answering_in_the_published_forms(tmp_path):
    (record,), _ = run(tmp_path, "rextime", write(tmp_path / "rextime_val.json", REXTIME))
    same(record, id="rextime/val/anet_val92", task="gqa", answer="B", segments=[[5, 8]], type="sequential")
    (record,), _ = run(tmp_path, "videomme", write(tmp_path / "test.jsonl", VIDEOMME))
    same(record, id="videomme/test/001-1", video="fFjv93ACGo8.mp4", type="short/Counting-Problem", answer="C")
    assert record["options"] == ["Apples.", "Candles.", "Berries."] and "duration" not in record
    open_ended = MMVU | {"id": "validation_0", "question_type": "open-ended", "choices": dict.fromkeys("ABCDE", "")}
    (record,), report = run(tmp_path, "mmvu", write(tmp_path / "validation.json", open_ended, MMVU))
    same(record, id="mmvu/validation/validation_1", video="Chemistry/0.mp4", type="Engineering/Computer Science")
    assert record["options"] == ["10.0", "5.0", "12.0"] and record["answer"] == "B"
    assert reasons(report, "excluded") == {"open-ended needs a judge": 1} and not reasons(report)
    assert len(sources.MMVU_DISCIPLINES) == 27
    other = [VIDEO_R1 | {"problem_id": 3, "problem_type": "numerical"}, VIDEO_R1 | {"data_type": "image"}]
    (record,), report = run(tmp_path, "video_r1", write(tmp_path / "eval_mmvu.json", VIDEO_R1, *other))
    same(record, id="video_r1/eval_mmvu/2", video="Eval/a.mp4", answer="B", options=["x", "y"], response=None)
    assert record["type"] == "LLaVA-Video-178K-30_60_s" and report["excluded"]["rows"] == 2
    thought = VIDEO_R1 | {"process": "<think>Hm.</think>"}
    (record,), _ = run(tmp_path, "video_r1", write(tmp_path / "cot.json", thought))
    assert record["response"] == "<think>Hm.</think>\n<answer>B</answer>"


def test_mlvu_folder(tmp_path):
    (tmp_path / "json").mkdir()
    write(tmp_path / "json" / "1_plotQA.json", MLVU)
    write(
        tmp_path / "json" / "9_summary.json", {"video": "v.mp4", "question": "Sum up.", "answer": "...", "duration": 1}
    )
    (record,), report = run(tmp_path, "mlvu", tmp_path / "json")
    same(record, id="mlvu/1_plotQA/0", video="1_plotQA/movie101_66.mp4", duration=246, type="plotQA", answer="B")
    assert reasons(report, "excluded") == {"generation needs a judge": 1}
    (record,), _ = run(tmp_path, "mlvu", write(tmp_path / "test_mcq_gt.json", MLVU | {"question_id": "AR_0"}))
    same(record, id="mlvu/test_mcq_gt/AR_0", video="movie101_66.mp4")


def test_mvbench_folders_bounds_and_frames(tmp_path):
    (tmp_path / "json").mkdir()
    row = {"video": "a.mp4", "question": "What?", "candidates": ["up", "down"], "answer": "down"}
    rows = {"fine_grained_pose": row | {"start": 1, "end": 2}, "episodic_reasoning": row | {"start": 1.5, "end": 9}}
    for task in sources.MVBENCH_FOLDERS:
        bounded = row | {"start": 0, "end": 2.5} if task in sources.MVBENCH_BOUNDS else row
        write(tmp_path / "json" / f"{task}.json", rows.get(task, bounded))
    records, report = run(tmp_path, "mvbench", tmp_path / "json")
    assert len(records) == len(sources.MVBENCH_FOLDERS) == 20 and report["kept"] == 20
    of = {record["id"]: record for record in records}
    same(of["mvbench/action_sequence/0"], video="star/Charades_v1_480/a.mp4", clip=[0, 2.5], type="Action Sequence")
    same(of["mvbench/fine_grained_pose/0"], video="nturgbd/a.mp4", clip=None, fps=None, type="Fine-grained Pose")
    same(of["mvbench/episodic_reasoning/0"], video="tvqa/frames_fps3_hq/a.mp4", clip=[1.5, 9], fps=3, answer="B")
    assert "is none of MVBench's files" in error_of(_empty(tmp_path), "mvbench", write(tmp_path / "x.json", row))


def _empty(tmp_path):
    """The same folder, without what a run before has written."""
    for path in tmp_path.glob("out.*"):
        path.unlink()
    return tmp_path


def test_tempcompass_task_forms_tell_by_their_text(tmp_path):
    choice = {"question": "What?\nA. dunking\nB. passing", "answer": "B. passing"}
    caption = {"question": "Which?\nOption 1: A dog.\nOption 2: A cat.", "answer": "Option 2: A cat."}
    captioning = {"question": "You will\nInformation A: {}\nGenerated Caption:", "answer": "B. dunking"}
    content = {"1034": {"action": [choice, {"question": "Is he?", "answer": "no"}], "speed": [caption, captioning]}}
    odd = {"question": "What?\nA. dunking\nor not", "answer": "A. dunking"}
    content["77_reverse"] = {"direction": [odd, {"question": "What?", "answer": "maybe"}]}
    records, report = run(tmp_path, "tempcompass", write(tmp_path / "multi-choice.jsonl", content))
    assert [(r["type"], r["answer"], r["options"]) for r in records] == [
        ("multi-choice/action", "B", ["dunking", "passing"]),
        ("yes_no/action", "B", ["yes", "no"]),
        ("caption_matching/speed", "B", ["A dog.", "A cat."]),
    ]
    same(records[2], id="tempcompass/multi-choice/1034_speed_0", video="1034.mp4", question="Which?")
    assert reasons(report, "excluded") == {"captioning needs a judge": 1} and report["rejected"]["rows"] == 2


def test_chat_rows_that_no_record_can_hold(tmp_path):
    user, assistant = CHAT["messages"]
    bad = [
        CHAT | {"videos": ["a.mp4", "b.mp4"]},
        CHAT | {"videos": []},
        CHAT | {"images": ["a.png"]},
        CHAT | {"messages": [user, assistant] * 2},
        CHAT | {"messages": [{"role": "system", "content": "Be brief."}, user, assistant]},
        CHAT | {"messages": [user | {"content": "no tag"}, assistant]},
        CHAT | {"messages": [user, assistant | {"content": " "}]},
        CHAT | {"videos": [["frame.png"]]},
        {"messages": CHAT["messages"], "images": ["a.png"]},
    ]
    (record,), report = run(tmp_path, "llamafactory", write(tmp_path / "chat.json", CHAT, *bad))
    same(record, task="chat", question="Why?", response="So.")
    assert reasons(report) == {
        "expected one video, got N videos": 2,
        "expected one video, got N videos and images": 1,
        "expected a turn of the user and one of the assistant, got '...'": 2,
        "the question has N <video> tags, not one": 1,
        "response is missing: a chat record has nothing else to learn from": 1,
        "video must be a text, got '...'": 1,
        "missing key videos": 1,
    }


# ---- repairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "repaired", "rules"),
    [
        ([1, 2], [1, 2], []),
        ([1, 10.0005], [1, 10.0], []),  # rounding
        ([-0.0005, 3], [0.0, 3], []),
        ([1, 10.01], [1, 10.0], ["clamped_end"]),
        ([-0.1, 3], [0.0, 3], ["clamped_start"]),
        ([-0.1, 12], [0.0, 10.0], ["clamped_start", "clamped_end"]),
        ([12, 3], [3, 10.0], ["swapped", "clamped_end"]),
        ([10, 12], [10, 12], []),  # outside: to_sample's business
        (["1", 2], ["1", 2], []),
        ([True, 2], [True, 2], []),
        ([1], [1], []),
        (None, None, []),
    ],
)
def test_repair_of_a_span(span, repaired, rules):
    assert convert.repair_span(span, 10.0) == (repaired, rules)


@pytest.mark.parametrize("span", [[2, 2], [1, 20.1], [-10.1, 3], [25, 1], [1, float("inf")]])
def test_spans_that_no_rule_covers(span):
    with pytest.raises(convert.BadRecord):
        convert.repair_span(span, 10.0)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
times = st.floats() | st.integers(-(10**20), 10**400) | st.floats(-20, 300)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(times, min_size=2, max_size=2), min_size=1, max_size=3), times)
def test_any_span_becomes_a_valid_record_or_is_rejected(windows, duration):
    row = QVH | {"relevant_windows": windows, "duration": duration}
    try:
        record, _, _ = convert.make_record("qvhighlights", row, sources.File("x", 1), repair=True)
    except convert.BadRecord:
        return
    assert all(0 <= start < end <= duration for start, end in record["segments"])


GOOD = {
    "qvhighlights": QVH, "anet_rtl": RTL, "didemo": DIDEMO, "tvgbench": TVGBENCH, "temporal_r1": TEMPORAL_R1,
    "rextime": REXTIME, "videomme": VIDEOMME, "mmvu": MMVU, "mlvu": MLVU, "video_r1": VIDEO_R1, "llamafactory": CHAT,
    "time_r1": {"video": "a.mp4", "duration": 9.0, "timestamp": [1, 2], "sentence": "a", "qid": "my|x|a|b"}
    | {"pred": [1, 2], "video_start": 1.0, "video_end": 10.0, "difficulty": 3.0},
    "mvbench": {"video": "a.mp4", "question": "What?", "candidates": ["up", "down"], "answer": "up"}
    | {"start": 1, "end": 2},
    "nextqa": {"video": "1", "question": "q", "answer": "0", "qid": "1", "type": "CW"}
    | {f"a{i}": "x" for i in range(5)},
    "nextgqa": {"video_id": "1", "question": "q", "answer": "x1", "qid": "1", "type": "TN"}
    | {f"a{i}": f"x{i}" for i in range(5)},
    "charades_sta": "A 1.0 2.0##a dog",
    "tempcompass": ("1", "action", 0, {"question": "Is it?", "answer": "yes"}),
    "activitynet": ("v", {"duration": 9, "timestamps": [[1, 2]], "sentences": ["a"]}, 0),
    "tacos": ("v", {"fps": 2, "num_frames": 18, "timestamps": [[1, 2]], "sentences": ["a"]}, 0),
}  # fmt: skip
FILE = sources.File(
    "action_sequence", 1, {"A": 9.0, "54322086@N00.mov": 28}, {"1": {"duration": 9, "location": {"1": [[1, 2]]}}}
)


@pytest.mark.parametrize("source", SOURCES)
def test_whatever_stands_in_a_row_it_is_a_record_or_a_reason(source):
    convert.make_record(source, GOOD[source], FILE, repair=True)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def broken(data):
        row = GOOD[source]
        parts = list(row) if isinstance(row, tuple) else [row]
        at = next((i for i, part in enumerate(parts) if isinstance(part, dict)), 0)
        if isinstance(parts[at], dict) and data.draw(st.integers(0, 9)):
            keys = data.draw(st.lists(st.sampled_from(sorted(parts[at])), min_size=1, max_size=2))
            parts[at] = parts[at] | {key: data.draw(anything) for key in keys}
            parts[at].pop(data.draw(st.sampled_from(["", *parts[at]])), None)
        else:
            parts[at] = data.draw(st.text() if source == "charades_sta" else anything)
        try:
            changed = tuple(parts) if isinstance(row, tuple) else parts[0]
            record, _, _ = convert.make_record(source, changed, FILE, repair=True)
        except (convert.BadRecord, sources.Excluded):
            return
        json.dumps(record, ensure_ascii=False).encode()

    broken()


# ---- files ---------------------------------------------------------------------------------------------------------

LINES = ("A 1.0 2.0##a dog.", "A 3.0 12##a cat.", "B 1 2##wo\u2028 é \x85?")


@pytest.fixture
def durations(tmp_path):
    return write(tmp_path / "durations.jsonl", {"A": 10.0, "B": {"duration": 5, "subset": "test"}})


@pytest.mark.parametrize("kind", ["plain", "bom", "crlf", "blank", "gz"])
def test_bom_crlf_blank_lines_gzip_and_unicode(tmp_path, durations, kind):
    text = "\n".join(LINES)
    text = {"bom": "\ufeff" + text, "crlf": text.replace("\n", "\r\n") + "\r\n", "blank": f"\n\n{text}\n \n"}.get(
        kind, text
    )
    path = tmp_path / ("test.txt.gz" if kind == "gz" else "test.txt")
    path.write_bytes(gzip.compress(text.encode()) if kind == "gz" else text.encode())
    records, _ = run(tmp_path, "charades_sta", path, durations=durations)
    assert [record["id"][:18] for record in records] == ["charades_sta/test/"] * 3
    assert records[1]["segments"] == [[3.0, 10.0]] and records[2]["question"] == "wo\u2028 é \x85?"


def test_durations_as_published_in_csv(tmp_path):
    path = tmp_path / "Charades_v1_test.csv"
    path.write_text("id,subject,length\nA,x,9.5\nB,y,5\n")
    records, _ = run(tmp_path, "charades_sta", write(tmp_path / "t.txt", *LINES), durations=path)
    assert records[1]["segments"] == [[3.0, 9.5]]
    path.write_text("id,subject\nA,x\n")
    wrong = error_of(_empty(tmp_path), "charades_sta", write(tmp_path / "t.txt", *LINES), durations=path)
    assert wrong == f"{path}: expected the columns id and length (seconds)"


def test_duplicates_and_a_video_without_duration(tmp_path, durations):
    path = write(tmp_path / "t.txt", *LINES, LINES[0], "C 1.0 2.0##a bird.", "D 1.0##a bird.")
    records, report = run(tmp_path, "charades_sta", path, durations=durations)
    assert [record["id"] for record in records] == [f"charades_sta/t/{i}" for i in (0, 1, 2)]
    assert report["rejected"]["reasons"] == {
        "duplicate of '...'": {"rows": 1, "where": {"t.txt:4": "duplicate of 't.txt:1'"}},
        "no duration of video '...' in --durations": {
            "rows": 1,
            "where": {"t.txt:5": "no duration of video 'C' in --durations"},
        },
        "expected VID START END##SENTENCE, got '...'": {
            "rows": 1,
            "where": {"t.txt:6": "expected VID START END##SENTENCE, got 'D 1.0##a bird.'"},
        },
    }
    path = write(tmp_path / "q.jsonl", QVH, QVH, QVH | {"query": "Another"}, QVH | {"qid": 1}, {"foreign": 1})
    records, report = run(tmp_path, "qvhighlights", path)
    assert [record["id"] for record in records] == ["qvhighlights/q/2579", "qvhighlights/q/1"]
    assert reasons(report) == {"duplicate of '...'": 1, "id '...' is that of q.jsonl:N too": 1, "missing key vid": 1}


def test_quoted_line_ends_in_csv(tmp_path):
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, GOOD["nextqa"])
    writer.writeheader()
    writer.writerows([GOOD["nextqa"] | {"question": 'a,\n"b"?'}, GOOD["nextqa"] | {"answer": "5", "qid": "2"}])
    (tmp_path / "val.csv").write_text(table.getvalue() + "short,row\r\n", newline="")
    (record,), report = run(tmp_path, "nextqa", tmp_path / "val.csv")
    assert record["question"] == 'a,\n"b"?' and record["id"] == "nextqa/val/1_1"
    assert list(reasons(report).values()) == [1, 1]
    assert "answer must be an index from 0 to 4, got '5'" in json.dumps(report)


@pytest.mark.parametrize(
    ("source", "content", "reason"),
    [
        ("time_r1", '[{"video": "a.mp4", ', "{path}: not valid JSON: "),
        ("time_r1", '{"video": "a.mp4"}\n{"vid', "{path}:2: not valid JSON: "),
        ("time_r1", "", "{path}: no rows"),
        ("time_r1", "[]", "{path}: no rows"),
        ("time_r1", '[{"vid": "a"}, {"vid": "b"}]', "{path}:1: missing key video (and no other row can be used)"),
        ("time_r1", '["a", 3]', "{path}:1: expected an object, got str"),
        ("activitynet", '[{"vid": "a"}]', "{path}: expected an object, got a list"),
        ("activitynet", '{"v_a": {"duration": 3, "timestamp": [[1, 2]]}}', "{path}:1: missing key sentences"),
        ("activitynet", '{"v_a": {"duration": 3, "sentences": ["a"], "timestamps": []}}', "{path}:1: sentences and"),
        ("activitynet", "{}", "{path}: no rows"),
        ("nextqa", "video,question\n1,why\n", "{path}:2: missing key answer"),
        ("nextqa", "video,question\n", "{path}: no rows"),
        ("nextqa", 'video,answer\n1,"0"x', "{path}:2: not valid CSV: "),
        ("nextqa", 'video,answer\n1,"0', "{path}:2: not valid CSV: unexpected end of data"),
        ("tempcompass", '{"1": {"action": 3}}', "{path}:1: expected an object, got int"),
        ("mmvu", json.dumps([MMVU | {"question_type": "open-ended"}]), "{path}: every row is excluded: open-ended"),
        ("time_r1", b"PAR1\x00", "{path}: Parquet is not read; as JSON: python -c"),
        ("time_r1", b"\xff\xfe[]", "{path}: not UTF-8: "),
        ("time_r1", "[" * 100_000, "{path}: not valid JSON: "),
    ],
)
def test_what_is_not_of_the_format_is_one_line(tmp_path, source, content, reason):
    path = tmp_path / "file.any"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_of(tmp_path, source, path).startswith(reason.format(path=path))


def test_options_that_do_not_fit(tmp_path, durations):
    path = write(tmp_path / "t.txt", *LINES)
    assert error_of(tmp_path, "charades_sta", path) == "charades_sta needs --durations"
    wrong = error_of(tmp_path, "nextqa", path, durations=durations)
    assert wrong == "nextqa has no use for --durations"
    assert "No such file" in error_of(tmp_path, "nextqa", tmp_path / "absent.csv")
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path, "mvbench", tmp_path / "empty").endswith("no .json files in this folder")
    half = tmp_path / "half.txt.gz"
    half.write_bytes(gzip.compress(b"A 1.0 2.0##a dog." * 99)[:-9])
    assert "not a whole gzip file" in error_of(tmp_path, "charades_sta", half, durations=durations)
    (tmp_path / "folder.jsonl").mkdir()
    for out, reason in (
        ("out.json", "must end in .jsonl"),
        ("q.jsonl", "is one of the annotation files"),
        ("folder.jsonl", "is a folder"),
    ):
        own = write(tmp_path / "q.jsonl", QVH)
        with pytest.raises(SystemExit, match=reason):
            convert.main(["qvhighlights", "--annotations", own, "--out", str(tmp_path / out)])
        assert read_jsonl(tmp_path / "q.jsonl") == [QVH] and not list(tmp_path.glob("*.tmp"))


def test_the_command_as_a_user_calls_it(tmp_path):
    """From another folder, into one that is not there yet; --help names every source."""
    write(tmp_path / "val.jsonl", QVH, QVH)
    command = [sys.executable, str(REPO / "convert.py")]
    args = ["qvhighlights", "--annotations", "val.jsonl", "--out", "new/val.jsonl"]
    done = subprocess.run(command + args, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [
        "qvhighlights: new/val.jsonl, new/val.report.json",
        "2 rows read, 1 kept (0 of them repaired), 1 rejected, 0 excluded",
    ]
    assert "duplicate of '...' (val.jsonl:2)" in done.stdout
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {name} " in shown for name in SOURCES)
    done = subprocess.run([*command, "nonsense", *args[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'nonsense'" in done.stderr


@pytest.mark.parametrize("path", sorted((REPO / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_sets_name_their_records(path, tmp_path):
    """Each reads what convert.py is told to write, once records and videos are there."""
    ((entry,),) = yaml.safe_load(path.read_text()).values()
    assert entry["json_path"] in (f"../../data/{path.stem}.jsonl", f"../../data/{path.stem}_train.jsonl")
    for folder in ("configs/data", entry["data_folder"].removeprefix("../../")):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs" / "data" / path.name).write_text(path.read_text())
    record = convert.make_record("qvhighlights", QVH, sources.File("x", 1), repair=True)[0]
    write(tmp_path / entry["json_path"].removeprefix("../../"), record)
    (tmp_path / entry["data_folder"].removeprefix("../../") / record["video"]).touch()
    (sample,) = read_samples(str(tmp_path / "configs" / "data" / path.name))
    assert sample.id == "qvhighlights/x/2579"
