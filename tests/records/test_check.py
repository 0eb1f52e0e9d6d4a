"""`python data.py check` and its manifest: every file classified, every bad record named, nothing stops it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import failing_readers
import pytest
from conftest import REPO, SHARED, make_cfg, make_policy, metrics_of, read_prompts, write_data
from PIL import Image

import train_grpo
from records import files, manifest
from records.check import main as check_main
from records.files import read_samples
from records.manifest import Manifest
from video import readers, workers

CLIPS = SHARED / "data" / "videos"
TVG = {"id": "a", "task": "tvg", "video": "v.mp4", "duration": 10.0, "question": "When?", "segments": [[1, 2.5]]}


def check(*args, workers: int = 1) -> int:
    return check_main(["check", *map(str, args), "--workers", str(workers), "--timeout", "60"])


def read_lines(path) -> dict[str, dict]:
    """The manifest's lines by id."""
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def clip(world):
    """A clip of the small world, and the record that it belongs to."""
    record = json.loads((world / "tvg_train.jsonl").read_text().splitlines()[0])
    return world / "videos" / record["video"], record["duration"]


@pytest.fixture
def no_pool(monkeypatch):
    """Files are opened in this process, which is faster for a few of them."""
    real = workers.Workers
    monkeypatch.setattr(manifest, "Workers", lambda function, num, timeout: real(function, 0, timeout))


def write(path, *records) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# ---- real files ----------------------------------------------------------------------------------------------------

UNUSABLE = {
    "moviepy/result.webm": "an empty file",
    "moviepy/-video-with-dash-.mp4": "1x1",
    "moviepy/bitmap.mp4": "1x1",
    "pytorch_torchcodec/nasa_13013.mp4.audio.mp3": "no video stream",
}
DETAILS = {
    "moviepy/no_duration.webm": {"frames": 74, "codec": "vp9"},
    "pytorch_torchcodec/av1_video.mkv": {"frames": 125, "codec": "av1", "duration": 5.0},
    "pytorch_torchcodec/nasa_13013.mp4": {"frames": 390, "width": 480, "height": 270, "vfr": False},
    "moviepy/video_with_failing_audio.mp4": {"frames": 280},
    "dmlc_decord/corrupted.mp4": {"frames": 28},
    **{f"dmlc_decord/video_{degrees}.mov": {"rotation": degrees} for degrees in (0, 90, 180, 270)},
}


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no ../shared: real clips are not part of the repository")
def test_every_real_file_is_classified_without_noise(tmp_path):
    """As a user types it: exit code, summary, and nothing of what decoders print."""
    out = tmp_path / "manifest.jsonl"
    command = [sys.executable, "data.py", "check", str(CLIPS), "--manifest", str(out), "--timeout", "60"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (1, "")
    lines = read_lines(out)
    assert lines.keys() == {str(path.relative_to(CLIPS)) for path in CLIPS.rglob("*") if path.is_file()}
    for name, line in lines.items():
        is_video = not name.endswith((".md", ".json")) and name not in UNUSABLE
        assert line["ok"] == is_video, name
        assert bool(line["reason"]) != is_video and UNUSABLE.get(name, "") in line["reason"], name
        assert bool(line["warning"]) == (name == "dmlc_decord/corrupted.mp4"), name
        assert (line["size"], line["mtime"]) == manifest.file_state(str(CLIPS / name)), name
        if is_video:
            assert line["duration"] == pytest.approx(line["frames"] / line["fps"], rel=0.01)
    for name, expected in DETAILS.items():
        assert {key: lines[name][key] for key in expected} == expected, name
    assert (lines["dmlc_decord/video_90.mov"]["width"], lines["dmlc_decord/video_90.mov"]["height"]) == (320, 568)
    num_bad = sum(not line["ok"] for line in lines.values())
    *listed, total = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert total == f"{len(lines)} records: {len(lines) - num_bad} good, {num_bad} bad, 1 with a warning"
    assert [line.split(": ")[0] for line in listed] == ["bad"] * num_bad + ["warning"]
    assert "     2  no video stream" in result.stdout.splitlines()


def test_odd_files_of_a_folder(tmp_path, clip, capsys, no_pool):
    """Text, nothing, a dangling link, a cut file; folders in folders; a good clip is left good."""
    folder = tmp_path / "clips" / "deep"
    folder.mkdir(parents=True)
    shutil.copy(clip[0], folder / "good.mp4")
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    (folder / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "cut.mp4").write_bytes(clip[0].read_bytes()[:600])
    out = tmp_path / "manifest.jsonl"
    assert check(tmp_path / "clips", "--manifest", out) == 1
    lines = read_lines(out)
    assert {name for name, line in lines.items() if line["ok"]} == {"deep/good.mp4"}
    assert lines["deep/empty.mp4"]["reason"] == "an empty file"
    assert "No such file" in lines["deep/dangling.mp4"]["reason"] and lines["deep/dangling.mp4"]["size"] is None
    assert "5 records: 1 good, 4 bad, 0 with a warning" in capsys.readouterr().out


# ---- records -------------------------------------------------------------------------------------------------------


def test_good_records_exit_with_zero(world, tmp_path, capsys, no_pool):
    out = tmp_path / "manifest.jsonl"
    sets = [world / "tvg_train.yaml", world / "tvg_validation.yaml"]
    assert check(*sets, "--manifest", out) == 0
    samples = [sample for path in sets for sample in read_samples(str(path))]
    lines = read_lines(out)
    assert list(lines) == [sample.id for sample in samples]
    assert all(lines[sample.id]["path"] == sample.video for sample in samples)
    assert all(lines[s.id]["duration"] == pytest.approx(s.duration, abs=0.01) for s in samples)
    assert capsys.readouterr().out == f"{len(samples)} records: {len(samples)} good, 0 bad, 0 with a warning\n"


def test_bad_records_are_listed_with_row_and_key_and_the_rest_is_checked(tmp_path, clip, capsys, no_pool):
    (tmp_path / "videos").mkdir()
    shutil.copy(clip[0], tmp_path / "videos" / "v.mp4")
    good = TVG | {"duration": clip[1]}
    rows = [
        good,
        '{"id": "b", "task"',
        good | {"id": "c", "segmets": 1},
        good | {"id": "d", "segments": [[3, 2]]},
        "[1]",
        good,
        good | {"id": "e", "video": "w.mp4"},
        good | {"id": "f", "fps": 4},
        good | {"id": "g", "video": "."},
        '{"id": "\\ud800"}',
        good | {"id": "h"},
    ]
    source, out = write(tmp_path / "a.jsonl", *rows), tmp_path / "manifest.jsonl"
    assert check(source, "--manifest", out) == 1
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [f"a.jsonl:{i}" for i in range(1, 12)]
    assert [line["ok"] for line in lines] == [True] + 9 * [False] + [True]
    expected = {
        2: "not valid JSON",
        3: "unknown key segmets",
        4: "a segment must end after it starts, got [3, 2]",
        5: "expected an object, got list",
        6: "id: 'a' is that of a.jsonl:1 too",
        7: "No such file",
        8: "fps is for a folder of frames, but video is a file",
        9: "video is a folder of frames: fps is missing",
        10: "not UTF-8: half a surrogate pair",
    }
    for row, reason in expected.items():
        assert lines[row - 1]["reason"].startswith(reason), row
        (named,) = [line for line in printed if line.startswith((f"bad: a.jsonl:{row} ", f"bad: a.jsonl:{row}: "))]
        assert reason in named
    assert [line["id"] for line in lines] == ["a", None, "c", "d", None, "a", "e", "f", "g", None, "h"]
    assert "11 records: 2 good, 9 bad, 0 with a warning" in printed


@pytest.mark.parametrize(
    ("record", "reason", "warning"),
    [
        ({}, "", ""),
        ({"duration": 20.9}, "", ""),  # 0.9 s more than in the file
        ({"duration": 25.0}, "", "duration is 25 s in the record, 20.00 s in the file"),
        ({"duration": 10.0}, "", "duration is 10 s in the record, 20.00 s in the file"),
        ({"duration": 30.0, "segments": [[2, 5], [25, 28]]}, "segment [25, 28] lies outside the video (20.00 s)", ""),
        ({"duration": 30.0, "segments": [[19, 22]]}, "segment [19, 22] lies outside the video (20.00 s)", ""),
        ({"duration": 20.8, "segments": [[19, 20.8]]}, "", ""),
        ({"clip": [5, 15], "duration": 10.0, "segments": [[8, 10]]}, "", ""),
        ({"clip": [5, 25], "duration": 20.0, "segments": [[8, 9]]}, "", "duration is 20 s in the record, 15.00 s"),
        ({"clip": [5, 25], "duration": 20.0, "segments": [[16, 19]]}, "segment [16, 19] lies outside the video", ""),
        ({"clip": [21, 25], "duration": 4.0}, "clip [21, 25] starts after the video's end (20.00 s)", ""),
    ],
)
def test_times_that_do_not_fit_the_file(tmp_path, monkeypatch, no_pool, record, reason, warning):
    """The file is said to last 20 s; up to 1 s or 5% of that nobody minds."""
    described = dict.fromkeys(manifest.FILE_FIELDS) | {"ok": True, "reason": None, "duration": 20.0}
    monkeypatch.setattr("video.frames.check_video", lambda path, fps: described)
    (tmp_path / "v.mp4").touch()
    source, out = write(tmp_path / "a.jsonl", TVG | {"duration": 20.0} | record), tmp_path / "manifest.jsonl"
    assert check(source, "--manifest", out) == bool(reason)
    line = read_lines(out)["a"]
    assert line["reason"].startswith(reason) and bool(line["reason"]) == bool(reason)
    assert line["warning"].startswith(warning) and bool(line["warning"]) == bool(warning)


def test_a_record_without_a_duration_takes_that_of_its_file(world, tmp_path, clip, capsys, monkeypatch, no_pool):
    """They were refused. Training reads each header once, or none where the manifest has the duration."""
    shutil.copy(clip[0], tmp_path / "v.mp4")
    row = {key: value for key, value in TVG.items() if key != "duration"}
    gqa = row | {"id": "c", "task": "gqa", "options": ["x", "y"], "answer": "A", "segments": [[1, 2], [3, 99.5]]}
    cut = row | {"id": "d", "clip": [1, 4], "duration": None}
    source = write(tmp_path / "a.jsonl", row, TVG | {"id": "b", "duration": 9.0}, gqa, cut)
    opened, read = [], readers.read_duration
    monkeypatch.setattr(files, "read_duration", lambda *file: opened.append(file) or read(*file))
    samples = read_samples(source)
    assert [sample.duration for sample in samples] == pytest.approx([clip[1], 9.0, clip[1], 3.0])
    assert samples[2].segments == ((1.0, 2.0), (3.0, samples[2].duration))
    assert opened == [(f"{tmp_path}/v.mp4", None)]
    told = capsys.readouterr().out
    assert f"{source}: 2 records without a duration take that of their file\n" in told
    assert "1 segments clamped to their video" in told
    with pytest.raises(ValueError, match=r"a\.jsonl:3: segments \[\[1.0, 2.0\], \[3.0, 99.5\]\] end after the video"):
        read_samples(source, "error")
    assert check(source, "--manifest", tmp_path / "m.jsonl") == 1  # a segment far outside of its file
    told = capsys.readouterr().out
    assert "2 records without a duration take that of their file\n" in told
    assert "segment [3, 99.5] lies outside the video" in told
    opened.clear()
    samples = read_samples(source, manifest=str(tmp_path / "m.jsonl"))
    assert [sample.id for sample in samples] == ["a", "b", "d"] and not opened
    assert samples[0].duration == pytest.approx(clip[1])


@pytest.mark.parametrize("content", [None, b"", b"not a video"])
def test_a_file_that_tells_no_duration_is_named(tmp_path, content, no_pool, capsys):
    """By file, row and key; where the manifest calls the file bad, its record is dropped as any other."""
    if content is not None:
        (tmp_path / "w.mp4").write_bytes(content)
    bad = {key: value for key, value in TVG.items() if key != "duration"} | {"id": "b", "video": "w.mp4"}
    (tmp_path / "v.mp4").touch()
    source = write(tmp_path / "a.jsonl", TVG, bad)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: duration is missing in the record, and .*w\.mp4: "):
        read_samples(source)
    assert check(source, "--manifest", tmp_path / "m.jsonl") == 1
    with pytest.raises(ValueError, match="no samples"):
        read_samples(source, manifest=str(tmp_path / "m.jsonl"))
    assert "2 records dropped, 0 kept" in capsys.readouterr().out


def test_a_folder_of_frames_lasts_as_long_as_its_images(tmp_path):
    """Eight images at four a second."""
    (tmp_path / "v").mkdir()
    for i in range(8):
        Image.new("RGB", (56, 28)).save(tmp_path / "v" / f"frame_{i:06d}.png")
    record = {"id": "a", "task": "tvg", "video": "v", "fps": 4, "question": "When?", "segments": [[0.5, 1.5]]}
    assert read_samples(write(tmp_path / "a.jsonl", record))[0].duration == 2.0


def test_a_folder_of_frames_is_a_video(world, tmp_path, no_pool):
    """Eight images at four a second: checked, read and made a prompt of."""
    (tmp_path / "v").mkdir()
    for i in range(1, 9):
        Image.new("RGB", (56, 28), (20 * i, 0, 0)).save(tmp_path / "v" / f"frame_{i:06d}.png")
    record = TVG | {"video": "v", "fps": 4, "duration": 2.0, "segments": [[0.5, 1.5]]}
    source, out = write(tmp_path / "a.jsonl", record), tmp_path / "manifest.jsonl"
    assert check(source, "--manifest", out) == 0
    line = read_lines(out)["a"]
    assert (line["frames"], line["duration"], line["fps"], line["width"]) == (8, 2.0, 4.0, 56)
    (sample,) = read_samples(source, manifest=str(out))
    assert (sample.video, sample.fps) == (f"{tmp_path}/v", 4.0)
    policy = make_policy(world)
    (prompt,) = read_prompts(world, policy.tokenizer, [sample])
    assert prompt.video.frame_times == pytest.approx([0, 0.5, 1.25, 1.75], abs=0.26)


def test_one_file_is_opened_once(tmp_path, monkeypatch, no_pool):
    opened = []
    described = {"ok": True, "reason": "", "duration": 10.0}
    monkeypatch.setattr("video.frames.check_video", lambda *file: opened.append(file) or described)
    for name in ("v.mp4", "w.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "frames").mkdir()
    more = [{"id": f"{i}", "video": name} for i, name in enumerate(("v.mp4", "w.mp4", "v.mp4"))]
    more += [{"id": f"f{fps}", "video": "frames", "fps": fps} for fps in (2, 4.0)]
    assert check(write(tmp_path / "a.jsonl", *(TVG | record for record in more))) == 0
    files = [("v.mp4", None), ("w.mp4", None), ("frames", 2.0), ("frames", 4.0)]
    assert opened == [(f"{tmp_path}/{name}", fps) for name, fps in files]


def test_lists_of_data_sets_and_other_folders_of_videos(world, tmp_path, capsys, no_pool):
    """All records of a list are checked, whatever part of them is trained on; --videos replaces the list's folders."""
    (tmp_path / "clips").mkdir()
    sets = tmp_path / "sets.yaml"
    one = f"{{json_path: {world}/tvg_train.jsonl, data_folder: DIR, sampling_strategy: 'first:1'}}"
    sets.write_text(f"datasets: [{one}, {one}]\n".replace("DIR", str(world / "videos")))
    num = len((world / "tvg_train.jsonl").read_text().splitlines())
    assert check(sets) == 0 and f"{num} records: {num} good" in capsys.readouterr().out
    assert check(sets, "--videos", tmp_path / "clips") == 1
    assert f"{num} records: 0 good, {num} bad" in capsys.readouterr().out
    sets.write_text(sets.read_text().replace(str(world / "videos"), "nowhere"))
    assert check(sets, "--videos", world / "videos") == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["nowhere.jsonl"], r"error: data file nowhere\.jsonl not found"),
        (["a.jsonl", "--videos", "nowhere"], "error: --videos nowhere: no such folder"),
        (["a.jsonl", "--manifest", "nowhere/m.jsonl"], "error: --manifest nowhere/m.jsonl: no such folder"),
        (["b.json"], r"error: b\.json: not valid JSON"),
        (["empty"], "error: empty: no records"),
    ],
)
def test_what_cannot_be_checked_at_all_is_one_line(tmp_path, monkeypatch, args, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "a.jsonl", TVG)
    write(tmp_path / "b.json", "{")
    with pytest.raises(SystemExit, match=reason):
        check(*args)


def test_a_reader_that_dies_or_hangs_is_a_reason(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("video.frames.check_video", failing_readers.check_video)
    source = write_data(world, tmp_path / "data", 5, {1: "killed", 3: "hangs"})
    out = tmp_path / "manifest.jsonl"
    assert check_main(["check", source, "--manifest", str(out), "--workers", "2", "--timeout", "3"]) == 1
    reasons = {name: line["reason"] for name, line in read_lines(out).items() if not line["ok"]}
    assert reasons == {"r1": "the process that read it died (signal 9)", "r3": "took more than 3 s"}
    assert "     1  took more than N s" in capsys.readouterr().out


def test_a_manifest_appears_when_it_is_complete(tmp_path, clip, monkeypatch, no_pool):
    shutil.copy(clip[0], tmp_path / "v.mp4")
    source, out = write(tmp_path / "a.jsonl", TVG | {"duration": clip[1]}), tmp_path / "manifest.jsonl"
    out.write_text("before\n")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        check(source, "--manifest", out)
    assert out.read_text() == "before\n"


# ---- data.manifest -------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(world, tmp_path, no_pool, capsys):
    """A data set with bad files, a malformed record and a repeated id, and its manifest."""
    source = write_data(world, tmp_path / "data", 10, {2: b"", 5: b"no video", 6: b"no video"})
    text = Path(source).read_text()
    Path(source).write_text(text + "{torn\n" + text.partition("\n")[0] + "\n")
    out = tmp_path / "manifest.jsonl"
    assert check(source, "--manifest", out) == 1
    capsys.readouterr()
    return source, str(out)


def test_bad_rows_are_dropped_with_a_count_by_reason(checked, capsys):
    source, out = checked
    with pytest.raises(ValueError, match=r"data\.jsonl:11: not valid JSON"):
        read_samples(source)
    samples = read_samples(source, manifest=out)
    assert [sample.id for sample in samples] == [f"r{i}" for i in (0, 1, 3, 4, 7, 8, 9)]
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{source}: 5 records dropped, 7 kept (data.manifest): 2 x ")
    assert "1 x an empty file" in printed.out and "1 x id: '...' is that of data.jsonl:N too" in printed.out
    assert printed.err == ""


def test_a_record_that_is_not_in_the_manifest_is_an_error(checked):
    source, out = checked
    text = Path(source).read_text()
    Path(source).write_text(text + text.partition("\n")[0].replace('"r0"', '"new"') + "\n")
    with pytest.raises(ValueError) as raised:
        read_samples(source, manifest=out)
    assert str(raised.value) == (
        f"{out} does not know 1 records of {source}, the first: new (data.jsonl:13); "
        f"`python data.py check {source} --manifest {out}` writes it anew"
    )


def test_a_malformed_row_that_the_manifest_does_not_know_is_an_error(checked):
    """Nor is a row dropped that was malformed at the check, and is another one now."""
    source, out = checked
    lines = Path(source).read_text().split("\n")
    lines[10] = '{"id": "r9"'
    write(Path(source), *lines)
    with pytest.raises(ValueError, match=r"data\.jsonl:11: not valid JSON"):
        read_samples(source, manifest=out)
    lines[10] = lines[0].replace('"r0"', '"mended"')
    write(Path(source), *lines)
    with pytest.raises(ValueError, match=r"does not know 1 records .* mended \(data\.jsonl:11\)"):
        read_samples(source, manifest=out)


def test_files_that_changed_or_went_since_the_check_are_counted(checked, capsys):
    source, out = checked
    videos = Path(source).parent / "videos"
    (videos / "0.mp4").unlink()
    target = (videos / "3.mp4").resolve().read_bytes()
    (videos / "3.mp4").unlink()
    (videos / "3.mp4").write_bytes(target + b"more")
    assert len(read_samples(source, manifest=out)) == 7
    assert capsys.readouterr().err.startswith(
        f"WARNING: 2 files of {source} are gone or not the ones that were checked"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not found; `python data.py check` writes it"),
        ("{", r":1: not valid JSON"),
        ("[]", r":1: expected an object, got list"),
        ('{"id": "a"}', ":1: not a line of a manifest: no codec"),
    ],
)
def test_what_is_no_manifest_is_named(tmp_path, text, reason):
    path = tmp_path / "m.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        Manifest(str(path))


def test_a_run_takes_a_manifest_and_replaces_what_vanished_since(world, checked, tmp_path, capsys):
    source, out = checked
    (Path(source).parent / "videos" / "8.mp4").unlink()
    train = (f"data.train={source}", f"data.manifest={out}", "run.steps=2", "data.max_bad_share=1")
    train_grpo.train(make_cfg(world, tmp_path, *train))
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["r8"] and "No such file" in rows[0]["reason"]
    assert sum(row["data/num_replaced"] for row in metrics_of(tmp_path / "run")) >= 1
    assert "5 records dropped, 7 kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: data\.manifest nowhere\.jsonl not found"):
        train_grpo.train(make_cfg(world, tmp_path, *train, "data.manifest=nowhere.jsonl", f"run.dir={tmp_path}/b"))
