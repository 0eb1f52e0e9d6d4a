"""Floors by hand: the best constant answer of a training set, on the test set, and the clips that are swapped."""

import json
import random

import numpy as np
import pytest
from clips import grey, write_clip
from conftest import SHARED

import convert
from metrics import blind
from metrics.blind import best_constant, best_span, floor_of, swap_clips
from records import files
from records.files import check_floor
from records.record import Sample
from rewards import temporal_iou

PUBLIC = SHARED / "data" / "annotations"
real = pytest.mark.skipif(not PUBLIC.is_dir(), reason="the published annotations are not here (../shared)")


def tvg(duration, *segments, id="a", video="a.mp4", **fields):
    return Sample(id, "tvg", video, "When?", duration, segments=segments, **fields)


def mcqa(answer, id="a", video="a.mp4", **fields):
    return Sample(id, "mcqa", video, "Which?", options=("w", "x", "y", "z"), answer=answer, **fields)


def write(path, *records):
    path.write_text("".join(json.dumps({"id": str(i)} | record) + "\n" for i, record in enumerate(records)))
    return str(path)


def grounding(duration, *segments):
    return {"task": "tvg", "video": "a.mp4", "question": "When?", "duration": duration, "segments": segments}


def choice(answer):
    return {"task": "mcqa", "video": "a.mp4", "question": "Which?", "options": ["w", "x", "y", "z"], "answer": answer}


# ---- the constant answer -------------------------------------------------------------------------------------------


def test_the_best_span_by_hand():
    """20% to 60% earns 1, 1 and 1/3; an end at 80% would earn 2/3 three times, a start at 40% less than that."""
    assert best_span([tvg(10.0, (2, 6)), tvg(20.0, (4, 12)), tvg(100.0, (40, 80))]) == (0.2, 0.6)
    assert best_span([tvg(50.0, (0, 50))]) == (0.0, 1.0)


def test_of_several_true_segments_the_best_counts():
    """70% to 90% is one of the segments of all three; no other span is."""
    several = [tvg(10.0, (1, 2), (7, 9)), tvg(10.0, (7, 9)), tvg(20.0, (14, 18), (2, 8), (9, 10))]
    assert best_span(several) == (0.7, 0.9)


def test_the_best_span_is_that_of_all_spans():
    """Against the reward's own IoU of each of the 5,050 spans."""
    rng = random.Random(0)
    train = []
    for _ in range(6):
        times = sorted(rng.sample(range(31), 4))
        train.append(tvg(30.0, (times[0], times[1]), (times[2], times[3])))

    def earned(start, end):
        span = [(30 * start / 100, 30 * end / 100)]
        return np.mean([max(temporal_iou(span, [true]) for true in sample.segments) for sample in train])

    best = max(earned(start, end) for start in range(100) for end in range(start + 1, 101))
    start, end = best_span(train)
    assert earned(100 * start, 100 * end) == pytest.approx(best)


def test_the_most_frequent_letter_is_chosen_and_the_first_of_equals():
    assert best_constant([mcqa(letter) for letter in "CBBAC"]) == {"choice": "B"}
    assert best_constant([mcqa(letter) for letter in "DADB"]) == {"choice": "D"}


def test_floors_of_a_test_set_by_hand(tmp_path):
    """The training set says 20% to 60%, and B; of the test set come IoUs of 1, 0 and 0.5, and one B in four."""
    spans = [grounding(10, [2, 6]), grounding(20, [4, 12])]
    train = write(tmp_path / "train.jsonl", *spans, *map(choice, "ABB"))
    spans = [grounding(100, [20, 60]), grounding(100, [60, 100]), grounding(100, [20, 40])]
    tests = write(tmp_path / "test.jsonl", *spans, *map(choice, "BAAC"))
    found = floor_of(train, files.read_samples(tests, need_videos=False))
    assert found["tvg"]["constant"] == {"data": train, "span": [0.2, 0.6]}
    values = [found["tvg"][name] for name in ("n", "miou", "r1@0.3", "r1@0.5", "r1@0.7", "parse_fail")]
    assert values == pytest.approx([3, 50, 200 / 3, 200 / 3, 100 / 3, 0])
    assert found["mcqa"]["constant"] == {"data": train, "choice": "B"} and found["mcqa"]["accuracy"] == 25
    assert found["tvg"]["miou_ci95"][0] <= 50 <= found["tvg"]["miou_ci95"][1]


def test_the_floor_of_grounded_questions_by_hand(tmp_path):
    """Always B, 20% to 60%: the letter is right twice, and IoP is 0.5 with one of those and 0 with the other."""
    grounded = lambda letter, duration, span: choice(letter) | grounding(duration, span) | {"task": "gqa"}  # noqa: E731
    train = write(tmp_path / "train.jsonl", grounded("B", 10, [2, 6]), grounded("B", 10, [2, 6]))
    rows = [grounded("B", 100, [20, 40]), grounded("B", 100, [70, 90]), grounded("A", 100, [20, 60])]
    found = floor_of(train, files.read_samples(write(tmp_path / "test.jsonl", *rows), need_videos=False))["gqa"]
    assert found["constant"] == {"data": train, "choice": "B", "span": [0.2, 0.6]}
    values = [found[name] for name in ("accuracy", "acc_gqa", "miop", "miou")]
    assert values == pytest.approx([200 / 3, 100 / 3, 50, 50])


def test_the_command_prints_a_row_for_each_task(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", grounding(10, [2, 6]), choice("C"))
    tests = write(tmp_path / "test.jsonl", grounding(100, [20, 60]), choice("A"), choice("C"))
    blind.main([train, tests])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("floor of tvg, always 20% to 60% of the clip: n 1 miou 100.00 ")
    assert lines[0].endswith("r1@0.3 100.00 r1@0.5 100.00 r1@0.7 100.00")
    assert lines[1:] == ["floor of mcqa, always C: n 2 accuracy 50.00"]
    with pytest.raises(SystemExit, match="has no record of a task of"):
        blind.main([write(tmp_path / "other.jsonl", choice("A")), write(tmp_path / "t.jsonl", grounding(9, [2, 6]))])
    with pytest.raises(SystemExit, match=r"error: data file nowhere.jsonl not found"):
        blind.main(["nowhere.jsonl", tests])


def test_a_floor_needs_no_videos_and_not_every_record(tmp_path, capsys):
    """A malformed row and a record whose duration nothing tells ended an evaluation, where a floor can do without."""
    bare = {key: value for key, value in grounding(10, [0, 9]).items() if key != "duration"}
    outside = grounding(10, [0, 9]) | {"segments": [[20, 30]]}
    train = write(tmp_path / "train.jsonl", grounding(10, [2, 6]), outside, bare, choice("B"), choice("E"))
    tests = files.read_samples(write(tmp_path / "test.jsonl", grounding(100, [20, 60]), choice("B")), need_videos=False)
    found = floor_of(train, tests)
    assert found["tvg"]["constant"] == {"data": train, "span": [0.2, 0.6]} and found["tvg"]["miou"] == 100
    assert found["mcqa"]["constant"] == {"data": train, "choice": "B"}
    line = "row 2: segment [20, 30] lies outside the video (10 s)"
    assert capsys.readouterr().out == f"floor: 3 of 5 records of {train} left out, the first: {line}\n"
    write(tmp_path / "train.jsonl", bare)
    assert floor_of(train, tests) == {}
    told = capsys.readouterr().out
    assert "floor: 1 of 1 records of " in told and "row 1: duration is missing in the record, and its file has" in told


def test_a_record_without_a_duration_takes_that_of_its_file(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", grey(range(50)), fps=5)  # 10 s
    bare = {key: value for key, value in grounding(10, [2, 6]).items() if key != "duration"}
    train = write(tmp_path / "train.jsonl", bare)
    tests = files.read_samples(write(tmp_path / "test.jsonl", grounding(100, [20, 60])), need_videos=False)
    assert floor_of(train, tests)["tvg"]["constant"]["span"] == [0.2, 0.6]
    assert capsys.readouterr().out == f"{train}: 1 records without a duration take that of their file\n"


def test_a_missing_training_set_is_named_with_what_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "data"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text("datasets: [{json_path: ../../data/x_train.jsonl, data_folder: ../../data/videos}]")
    for data, words in {
        "configs/data/x.yaml": ["data.floor names data/x_train.jsonl,", "FILES --out data/x_train.jsonl`"],
        "data/x.jsonl": ["data.floor names data/x.jsonl,", "--out data/x.jsonl`"],
        "configs/y.yaml": ["data.floor names configs/y.yaml,", "give another path"],
        "configs": ["data.floor names configs,", "give another path"],
        "tiny_world/mix_train.yaml": ["data.floor names tiny_world/mix_train.yaml,", "`python tiny.py` writes it"],
    }.items():
        with pytest.raises(FileNotFoundError) as raised:
            check_floor(data)
        assert all(word in str(raised.value) for word in [*words, "`data.floor=`"]), raised.value
    write(tmp_path / "there.jsonl", choice("A"))
    check_floor("there.jsonl")


@real
def test_the_floor_of_charades_sta(tmp_path):
    """The numbers that docs/evaluation.md quotes: always the first half earns more than some trained models."""
    folder = PUBLIC / "charades_sta"
    for split in ("train", "test"):
        words = ["charades_sta", "--annotations", str(folder / f"charades_sta_{split}.txt")]
        words += ["--durations", str(folder / "charades.json.gz"), "--out", str(tmp_path / f"{split}.jsonl")]
        convert.main(words)
    tests = files.read_samples(str(tmp_path / "test.jsonl"), need_videos=False)
    found = floor_of(str(tmp_path / "train.jsonl"), tests)["tvg"]
    assert found["constant"]["span"] == [0.0, 0.47]
    values = [round(found[name], 2) for name in ("n", "miou", "r1@0.3", "r1@0.5", "r1@0.7")]
    assert values == [3720, 30.47, 49.30, 26.94, 11.24]


# ---- swapped clips -------------------------------------------------------------------------------------------------


def test_every_clip_is_swapped_for_the_nearest_in_duration_of_another_video():
    """In the order of durations: a 10 s, twice b 12 s, c 30 s, d 33 s."""
    samples = [
        tvg(30.0, (1, 2), id="1", video="c.mp4"),
        tvg(12.0, (1, 2), id="2", video="b.mp4", clip=(0.0, 12.0)),
        tvg(10.0, (1, 2), id="3", video="a.mp4"),
        tvg(12.5, (1, 2), id="4", video="b.mp4", clip=(20.0, 32.5)),
        tvg(33.0, (1, 2), id="5", video="d.mp4"),
        mcqa("A", id="6", video="a.mp4"),  # which does not say how long it is
    ]
    swapped = swap_clips(samples)
    assert [sample.video[0] for sample in swapped] == ["d", "a", "b", "a", "c", "b"]
    assert swapped[2].clip == (0.0, 12.0) and swapped[1].clip is None
    for before, after in zip(samples, swapped):
        assert (after.id, after.question, after.segments, after.answer, after.duration) == (
            before.id,
            before.question,
            before.segments,
            before.answer,
            before.duration,
        )
    assert {sample.id: sample.video for sample in swap_clips(samples[::-1])} == {s.id: s.video for s in swapped}


def test_clips_without_durations_are_swapped_too():
    assert [s.video for s in swap_clips([mcqa("A", video="a"), mcqa("B", video="b"), mcqa("C", video="a")])] == list(
        "bab"
    )
    with pytest.raises(ValueError, match=r"eval.blind=true needs clips of at least two videos"):
        swap_clips([mcqa("A"), mcqa("B")])
