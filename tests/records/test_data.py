"""Records in, samples out: what is accepted, what is refused and where; and the data order."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import batch_indices
from records.files import read_samples
from records.record import BadRecord, Sample, to_sample

TVG = {"id": "a", "task": "tvg", "video": "v.mp4", "duration": 10.0, "question": "When?", "segments": [[1, 2.5]]}
MCQA = {"id": "b", "task": "mcqa", "video": "v.mp4", "question": "Which?", "options": ["x", "y", "z"], "answer": "C"}
GQA = MCQA | {"id": "c", "task": "gqa", "duration": 8, "segments": [[0, 1], [3, 8]]}
TEMPORAL_R1 = {"dataset": "charades", "video": "v.mp4", "problem": "a dog"}
TEMPORAL_R1 |= {"solution": [0.25, 0.5], "video_length": 20.0}
ABSENT = object()


@pytest.fixture
def folder(tmp_path):
    """A folder with an (empty) video beside the records; reading records opens no video."""
    (tmp_path / "v.mp4").touch()
    return tmp_path


def write(path, *records) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_sets(folder, *entries: str) -> str:
    path = folder / "sets.yaml"
    path.write_text("datasets:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
    return str(path)


def tvg_records(num: int, name: str = "a") -> list[dict]:
    return [TVG | {"id": f"{name}{i}"} for i in range(num)]


# ---- records -------------------------------------------------------------------------------------------------------


def test_records_of_all_tasks(folder):
    tvg, mcqa, gqa = read_samples(write(folder / "a.jsonl", TVG, MCQA, GQA))
    video = str(folder / "v.mp4")
    assert tvg == Sample("a", "tvg", video, "When?", duration=10.0, segments=((1.0, 2.5),))
    assert mcqa == Sample("b", "mcqa", video, "Which?", options=("x", "y", "z"), answer="C")
    assert (gqa.segments, gqa.duration, gqa.answer) == (((0.0, 1.0), (3.0, 8.0)), 8.0, "C")


def test_optional_fields(folder):
    """Times of a clip count from its start, and its length stands in for a missing duration."""
    more = {"clip": [2, 12], "type": "causal", "response": "<answer>1 to 2</answer>", "source": "somewhere"}
    record = {k: v for k, v in TVG.items() if k != "duration"} | more | {"question": "  When?\n"}
    (sample,) = read_samples(write(folder / "a.jsonl", record))
    assert (sample.clip, sample.duration, sample.type) == ((2.0, 12.0), 10.0, "causal")
    assert sample.response == "<answer>1 to 2</answer>" and sample.question == "When?"


def test_further_columns_go_under_extra(folder):
    extra = {"ground_truth": [1, {"a": None}], "level": 2, "": ""}
    tvg, mcqa = read_samples(write(folder / "a.jsonl", TVG | {"extra": extra}, MCQA | {"extra": None}))
    assert tvg.extra == extra and mcqa.extra is None
    with pytest.raises(BadRecord, match="extra: the key 1 is not a text"):
        to_sample(TVG | {"extra": {1: 2}}, folder)
    with pytest.raises(ValueError, match=r"unknown key level; valid are .*; further columns go under extra$"):
        read_samples(write(folder / "b.jsonl", TVG | {"level": 2}))


def test_chat_records_are_for_those_who_ask_for_them(folder):
    """They have a response to imitate and no truth: whoever scores answers must not get one."""
    chat = {"id": "d", "task": "chat", "video": "v.mp4", "question": "Why?", "response": "So.", "segments": "unread"}
    path = write(folder / "a.jsonl", TVG, chat)
    _, sample = read_samples(path, chat=True)
    assert (sample.task, sample.response, sample.segments, sample.options) == ("chat", "So.", None, None)
    with pytest.raises(ValueError, match=r"a\.jsonl: 'd' is a chat record: no answer can be scored by it"):
        read_samples(path)


def test_what_a_task_does_not_use_is_not_read(folder):
    tvg, mcqa = read_samples(write(folder / "a.jsonl", TVG | {"answer": "Z"}, MCQA | {"segments": "none"}))
    assert tvg.answer is None and mcqa.segments is None


def test_a_video_is_looked_for_once(folder, monkeypatch):
    """Every look may be a request to a file server, and every process looks at every record."""
    path, looked, stat = write(folder / "a.jsonl", *(TVG | {"id": str(i)} for i in range(5))), [], os.stat

    def counting(name, **kwargs):
        looked.append(str(name))
        return stat(name, **kwargs)

    monkeypatch.setattr(os, "stat", counting)
    read_samples(path)
    assert looked.count(str(folder / "v.mp4")) == 5


def test_blank_lines_and_unicode(folder):
    """U+2028 is no line end in JSON, but str.splitlines cut the record there."""
    (first, second) = read_samples(write(folder / "a.jsonl", "", TVG | {"question": "wo\u2028 é \x85?"}, " ", MCQA))
    assert first.question == "wo\u2028 é \x85?" and second.id == "b"


def test_videos_beside_the_file_or_in_its_videos_folder(folder):
    (folder / "videos").mkdir()
    shutil.move(folder / "v.mp4", folder / "videos")
    (sample,) = read_samples(write(folder / "a.jsonl", TVG))
    assert sample.video == str(folder / "videos" / "v.mp4")


@pytest.mark.parametrize(
    ("record", "change", "reason"),
    [
        (TVG, {"id": ABSENT}, "id is missing or not a text"),
        (TVG, {"id": 7}, "id is missing or not a text"),
        (TVG, {"video": ABSENT}, "video is missing or not a text"),
        (TVG, {"question": "  "}, "question is missing or not a text"),
        (TVG, {"question": "<|video_pad|>?"}, "question: '<|video_pad|>?' holds a placeholder of the model's vision"),
        (TVG, {"response": "a <|image_pad|>"}, "response: 'a <|image_pad|>' holds a placeholder of the model's"),
        (MCQA, {"options": ["x", "<|video_pad|>", "z"]}, "options: '<|video_pad|>' holds a placeholder of the model's"),
        (TVG, {"task": ABSENT}, "task is missing or not a text"),
        (TVG, {"task": "qa"}, "task must be one of tvg, mcqa, gqa, chat, got 'qa'"),
        (TVG, {"segmets": []}, "unknown key segmets; valid are answer, clip, duration"),
        (TVG, {"duration": ABSENT}, "duration is missing"),
        (TVG, {"duration": 0}, "duration must be seconds above 0, got 0"),
        (TVG, {"duration": "10"}, "duration must be seconds above 0, got '10'"),
        (TVG, {"duration": True}, "duration must be seconds above 0, got True"),
        (TVG, {"duration": float("nan")}, "duration must be seconds above 0, got nan"),
        (TVG, {"segments": ABSENT}, "segments must be a list of [start, end], got None"),
        (TVG, {"segments": []}, "segments must be a list of [start, end], got []"),
        (TVG, {"segments": [1, 2]}, "a segment must be [start, end] in seconds, got 1"),
        (TVG, {"segments": [[1]]}, "a segment must be [start, end] in seconds, got [1]"),
        (TVG, {"segments": [[1, "2"]]}, "a segment must be [start, end] in seconds, got [1, '2']"),
        (TVG, {"segments": [[1, float("inf")]]}, "a segment must be [start, end] in seconds, got [1, inf]"),
        (TVG, {"segments": [[2, 2]]}, "a segment must end after it starts, got [2, 2]"),
        (TVG, {"segments": [[1, 2], [3, 2]]}, "a segment must end after it starts, got [3, 2]"),
        (TVG, {"segments": [[10, 12]]}, "segment [10, 12] lies outside the video (10.0 s)"),
        (TVG, {"segments": [[-2, -1]]}, "segment [-2, -1] lies outside the video (10.0 s)"),
        (TVG, {"clip": [3, 3]}, "clip must be [start, end] in seconds with start < end, got [3, 3]"),
        (TVG, {"clip": [-1, 3]}, "clip must be [start, end] in seconds with start < end, got [-1, 3]"),
        (TVG, {"clip": 3}, "clip must be [start, end] in seconds with start < end, got 3"),
        (TVG, {"response": ["no"]}, "response must be a text, got ['no']"),
        (TVG, {"extra": ["no"]}, "extra must be an object, got ['no']"),
        (TVG, {"extra": {"level": 1, "segments": 2}}, "extra: the key segments is taken"),
        (TVG, {"extra": {"source": "x"}}, "extra: the key source is taken"),
        (TVG, {"extra": {"completions": 1}}, "extra: the key completions is taken"),
        (MCQA, {"options": ABSENT}, "options must be a list of 2 to 26 texts, got None"),
        (MCQA, {"options": ["x"]}, "options must be a list of 2 to 26 texts, got ['x']"),
        (MCQA, {"options": ["x", 2]}, "options must be a list of 2 to 26 texts, got ['x', 2]"),
        (MCQA, {"options": ["x"] * 27}, "options must be a list of 2 to 26 texts, got"),
        (MCQA, {"answer": ABSENT}, "answer must be one of A, B, C, got None"),
        (MCQA, {"answer": "D"}, "answer must be one of A, B, C, got 'D'"),
        (MCQA, {"answer": "c"}, "answer must be one of A, B, C, got 'c'"),
        (MCQA, {"answer": "AB"}, "answer must be one of A, B, C, got 'AB'"),
        (MCQA, {"answer": ""}, "answer must be one of A, B, C, got ''"),
        (MCQA, {"answer": 2}, "answer must be one of A, B, C, got 2"),
        (GQA, {"answer": "D"}, "answer must be one of A, B, C, got 'D'"),
        (GQA, {"segments": [[7, 7]]}, "a segment must end after it starts, got [7, 7]"),
        (GQA, {"duration": ABSENT}, "duration is missing"),
        (TVG, {"task": "chat"}, "response is missing: a chat record has nothing else to learn from"),
        (TVG, {"task": "chat", "response": " "}, "response is missing: a chat record has nothing else to learn from"),
    ],
)
def test_a_malformed_record_is_named_by_file_row_and_reason(folder, record, change, reason):
    bad = {key: value for key, value in (record | change).items() if value is not ABSENT}
    path = write(folder / "a.jsonl", TVG | {"id": "first"}, bad)
    with pytest.raises(ValueError) as raised:
        read_samples(path)
    assert str(raised.value).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": ', "not valid JSON"),
        ("{'id': 1}", "not valid JSON"),
        ("[1, 2]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ('"text"', "expected an object, got str"),
    ],
)
def test_a_line_that_is_no_object_is_named(folder, line, reason):
    path = write(folder / "a.jsonl", TVG, "", line)
    with pytest.raises(ValueError) as raised:
        read_samples(path)
    assert str(raised.value).startswith(f"{path}:3: {reason}")


def test_repeated_ids_and_no_records_are_errors(folder):
    with pytest.raises(ValueError, match=r"a\.jsonl: two records with the id 'a'"):
        read_samples(write(folder / "a.jsonl", TVG, MCQA, TVG))
    with pytest.raises(ValueError, match=r"b\.jsonl: no samples"):
        read_samples(write(folder / "b.jsonl"))
    (folder / "c.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:1: not UTF-8"):
        read_samples(str(folder / "c.jsonl"))


# ---- segments that leave the clip ----------------------------------------------------------------------------------


def outside_records() -> list[dict]:
    segments = ([[1, 2]], [[8, 10.7]], [[-0.5, 3], [4, 5]], [[0, 10]], [[9, 10], [9.5, 11]])
    return [TVG | {"id": f"a{i}", "segments": value} for i, value in enumerate(segments)]


def test_out_of_clip_clamp(folder, capsys):
    samples = read_samples(write(folder / "a.jsonl", *outside_records()), "clamp")
    expected = [[(1, 2)], [(8, 10)], [(0, 3), (4, 5)], [(0, 10)], [(9, 10), (9.5, 10)]]
    assert [list(sample.segments) for sample in samples] == expected
    assert f"{folder}/a.jsonl: 3 segments clamped to their video, 0 records dropped" in capsys.readouterr().out


def test_out_of_clip_drop(folder, capsys):
    samples = read_samples(write(folder / "a.jsonl", *outside_records()), "drop")
    assert [sample.id for sample in samples] == ["a0", "a3"]
    assert f"{folder}/a.jsonl: 0 segments clamped to their video, 3 records dropped" in capsys.readouterr().out


def test_out_of_clip_error(folder, capsys):
    path = write(folder / "a.jsonl", *outside_records())
    with pytest.raises(ValueError) as raised:
        read_samples(path, "error")
    assert str(raised.value) == f"{path}:2: segments [[8, 10.7]] end after the video (10.0 s)"
    assert len(read_samples(write(folder / "a.jsonl", TVG, GQA), "error")) == 2
    assert capsys.readouterr().out == ""


# ---- Temporal-R1's files -------------------------------------------------------------------------------------------


def test_temporal_r1_rows(folder):
    """`solution` is a share of `video_length`: 0.25 to 0.5 of 20 s are 5 to 10 s."""
    rows = [TEMPORAL_R1, TEMPORAL_R1 | {"solution": [[0.0, 0.1], [0.9, 1.0]], "id": "x"}, TVG]
    (folder / "a.json").write_text(json.dumps(rows))
    first, second, ours = read_samples(str(folder / "a.json"))
    assert first == Sample("charades/1", "tvg", str(folder / "v.mp4"), "a dog", duration=20.0, segments=((5.0, 10.0),))
    assert (second.id, second.segments) == ("x", ((0.0, 2.0), (18.0, 20.0)))
    assert ours.id == "a"
    (folder / "b.json").write_text(json.dumps([TEMPORAL_R1 | {"solution": [0.9, 1.05]}]))
    assert read_samples(str(folder / "b.json"))[0].segments == ((18.0, 20.0),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"solution": ABSENT}, "missing key solution"),
        ({"video_length": ABSENT}, "missing key video_length"),
        ({"video": ABSENT}, "missing key video"),
        ({"solution": 0.3}, "solution must be [start, end] in [0, 1], got 0.3"),
        ({"solution": []}, "solution must be [start, end] in [0, 1], got []"),
        ({"solution": ["a", "b"]}, "solution must be [start, end] in [0, 1], got ['a', 'b']"),
        ({"solution": [[0.1, 0.2, 0.3]]}, "solution must be [start, end] in [0, 1], got [[0.1, 0.2, 0.3]]"),
        ({"solution": [0.5, 0.25]}, "a segment must end after it starts, got [10.0, 5.0]"),
        ({"solution": [1.2, 1.3]}, "segment [24.0, 26.0] lies outside the video (20.0 s)"),
        ({"video_length": -1}, "duration must be seconds above 0, got -1"),
    ],
)
def test_a_malformed_temporal_r1_row_is_named(folder, change, reason):
    bad = {key: value for key, value in (TEMPORAL_R1 | change).items() if value is not ABSENT}
    path = folder / "a.json"
    path.write_text(json.dumps([TEMPORAL_R1, bad]))
    with pytest.raises(ValueError) as raised:
        read_samples(str(path))
    assert str(raised.value) == f"{path}:2: {reason}"


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("{}", "expected a list of records")])
def test_a_broken_json_file_is_named(folder, text, reason):
    (folder / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: {reason}"):
        read_samples(str(folder / "a.json"))


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("all", "0123456789"),
        ("first:3", "012"),
        ("end:3", "789"),
        ("first:25%", "012"),  # 2.5 records, rounded up as Temporal-R1 does
        ("end:25%", "789"),
        ("first:100%", "0123456789"),
        ("first:99", "0123456789"),
        ("end:0", ""),
    ],
)
def test_sampling_strategies(folder, strategy, kept):
    write(folder / "a.jsonl", *tvg_records(10))
    write(folder / "b.jsonl", TVG | {"id": "last"})
    other = "json_path: b.jsonl, data_folder: ., sampling_strategy: all"
    path = write_sets(folder, f'json_path: a.jsonl, data_folder: ., sampling_strategy: "{strategy}"', other)
    assert [sample.id for sample in read_samples(path)] == [f"a{digit}" for digit in kept] + ["last"]


def test_random_sampling_is_a_function_of_the_seed(folder):
    write(folder / "a.jsonl", *tvg_records(40))
    path = write_sets(folder, 'json_path: a.jsonl, data_folder: ., sampling_strategy: "random:20%"')
    ids = [[sample.id for sample in read_samples(path, seed=seed)] for seed in range(3)]
    assert [len(set(chosen)) for chosen in ids] == [8, 8, 8] and len(set(map(tuple, ids))) == 3
    assert ids[0] == [sample.id for sample in read_samples(path, seed=0)]
    order = [f"a{i}" for i in range(40)]
    assert all(chosen == sorted(chosen, key=order.index) for chosen in ids)


@pytest.mark.parametrize(
    "strategy", ["some", "first", "first:", "first:x", "first:-1", "all:3", "random:x%", "end:inf%"]
)
def test_another_strategy_is_an_error(folder, strategy):
    write(folder / "a.jsonl", TVG)
    path = write_sets(folder, f'json_path: a.jsonl, data_folder: ., sampling_strategy: "{strategy}"')
    with pytest.raises(ValueError, match=r"sets.yaml: a\.jsonl: sampling_strategy '.*' is not all, first:N"):
        read_samples(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: [", "not valid YAML"),
        ("sets: []", "expected a list under the key datasets"),
        ("datasets: []", "expected a list under the key datasets"),
        ("- a.jsonl", "expected a list under the key datasets"),
        ("datasets: [a.jsonl]", r"datasets\[0\]: expected json_path and data_folder, got 'a.jsonl'"),
        ("datasets: [null]", r"datasets\[0\]: expected json_path and data_folder, got None"),
        ("datasets: [{json_path: a.jsonl}]", r"datasets\[0\]: data_folder is missing or not a text"),
        ("datasets: [{json_path: 3, data_folder: .}]", r"datasets\[0\]: json_path is missing or not a text"),
        ("datasets: [{json_path: a, data_folder: ., folder: .}]", r"datasets\[0\]: unknown key folder"),
    ],
)
def test_a_broken_list_of_data_sets_is_named(folder, text, reason):
    (folder / "sets.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"sets\.yaml: {reason}"):
        read_samples(str(folder / "sets.yaml"))


def test_paths_count_from_the_folder_of_the_list(folder, monkeypatch):
    (folder / "lists").mkdir()
    (folder / "clips").mkdir()
    shutil.move(folder / "v.mp4", folder / "clips")
    write(folder / "a.jsonl", TVG)
    write_sets(folder / "lists", "json_path: ../a.jsonl, data_folder: ../clips")
    monkeypatch.chdir(folder)
    (sample,) = read_samples("lists/sets.yaml")
    assert (folder / sample.video).samefile(folder / "clips" / "v.mp4")
    write_sets(folder / "lists", f"json_path: {folder}/a.jsonl, data_folder: {folder}/clips")
    (sample,) = read_samples("lists/sets.yaml")
    assert sample.video == str(folder / "clips" / "v.mp4")


def test_what_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl not found; give another path"):
        read_samples(str(folder / "nowhere.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"not found; `python tiny.py` writes the embedded default"):
        read_samples("tiny_world/nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"data file .*nowhere\.jsonl not found"):
        read_samples(write_sets(folder, "json_path: nowhere.jsonl, data_folder: ."))
    write(folder / "a.jsonl", TVG, MCQA | {"video": "w.mp4"}, GQA | {"video": "w.mp4"})
    with pytest.raises(FileNotFoundError, match=r"sets\.yaml: video folder .*nowhere not found"):
        read_samples(write_sets(folder, "json_path: a.jsonl, data_folder: nowhere"))
    with pytest.raises(FileNotFoundError, match=r"2 of 3 videos not found, the first: .*w\.mp4 \(.*a\.jsonl:2\)"):
        read_samples(str(folder / "a.jsonl"))


# ---- order ---------------------------------------------------------------------------------------------------------


@given(num=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_batches_run_through_whole_epochs(num, batch, seed):
    """Every epoch is a permutation, wherever batches begin and end; a step's batch is a function of its number."""
    steps = 3 * num // batch + 1
    flat = [i for step in range(steps) for i in batch_indices(num, batch, step, seed)]
    for epoch in range(len(flat) // num):
        assert sorted(flat[epoch * num : (epoch + 1) * num]) == list(range(num))
    one_by_one = [i for step in range(len(flat)) for i in batch_indices(num, 1, step, seed)]
    assert flat == one_by_one
    assert batch_indices(num, batch, steps - 1, seed) == flat[(steps - 1) * batch :]


def test_epochs_and_seeds_differ():
    epochs = [batch_indices(20, 20, step, seed) for step in range(3) for seed in range(3)]
    assert len(set(map(tuple, epochs))) == 9
