"""Selection from end to end: statistics, resuming, rules applied again, other scores, bad input, and training on it."""

import dataclasses
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SHARED, make_cfg, read_jsonl, write_data
from safetensors.torch import load_file, save_file

import config
import select_data
import train_grpo
from records.files import read_samples
from records.record import Sample, to_record
from rewards import parses
from runtime.arguments import from_command_line

FINAL = ("scores.jsonl", "selected.jsonl", "rejected.jsonl", "summary.json", "histogram.png")
TRAIN_2K5 = SHARED / "data" / "annotations" / "tvgbench" / "train_2k5.json.gz"


def arguments(folder, *overrides: str) -> list[str]:
    """A command line without a model: small batches, run folder and cache under `folder`."""
    sizes = ["rollout.group_size=4", "rollout.max_new_tokens=12", "rollout.micro_batch_size=5"]
    where = [f"run.dir={folder}/run", f"data.cache_dir={folder}/cache"]
    return ["--config", "configs/tiny_select.yaml", "video.min_pixels=3136", *sizes, *where, *overrides]


def files_of(folder) -> dict[str, bytes]:
    return {name: (folder / "run" / name).read_bytes() for name in FINAL}


def fails(argv) -> str:
    """What the command says, in one line, when it refuses."""
    with pytest.raises(SystemExit) as raised:
        select_data.main(argv)
    message = str(raised.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture(scope="module", autouse=True)
def quick_plots():
    """Histograms take a second each and are drawn in test_selection.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_data, "plot", lambda items, reasons, cfg, path: path.write_text(str(list(reasons))))
        yield


@pytest.fixture(scope="module")
def model(sft_run) -> str:
    return f"model.path={sft_run}/final"


@pytest.fixture(scope="module")
def train(world, tmp_path_factory) -> str:
    """Records of all three tasks, two sources, and one video that cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for task, num in (("tvg", 12), ("mcqa", 5), ("gqa", 5)):
        rows = [json.loads(line) for line in (world / f"{task}_train.jsonl").read_text().splitlines()[:num]]
        for i, row in enumerate(rows):
            record = row | {"video": str(world / "videos" / row["video"])}
            lines.append(json.dumps(record | ({"source": "other", "extra": {"note": "é"}} if i % 3 == 2 else {})))
    (folder / "broken.mp4").write_bytes(b"")
    lines.insert(7, json.dumps(json.loads(lines[0]) | {"id": "tiny/broken", "video": "broken.mp4"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return f"data.train={folder}/data.jsonl"


@pytest.fixture(scope="module")
def whole(model, train, tmp_path_factory):
    """Folder of a selection in one go."""
    folder = tmp_path_factory.mktemp("whole")
    select_data.main(arguments(folder, model, train))
    return folder


# ---- what is written -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_responses(whole, train):
    """In the order of the data; rewards follow from the parts, the statistics from the rewards, by numpy."""
    rows = read_jsonl(whole / "run" / "scores.jsonl")
    assert [row["id"] for row in rows] == [sample.id for sample in read_samples(train.partition("=")[2])]
    assert [row["id"] for row in rows if "error" in row] == ["tiny/broken"] and len(rows) == 23
    parts_of = {"tvg": ["iou"], "mcqa": ["answer"], "gqa": ["answer", "iou"]}
    for row in (row for row in rows if "error" not in row):
        assert list(row["parts"]) == ["format", *parts_of[row["task"]]]
        expected = np.mean([row["parts"][name] for name in parts_of[row["task"]]], axis=0)
        assert row["rewards"] == pytest.approx(expected) and len(row["rewards"]) == 4
        statistics = (np.mean(expected), np.std(expected, ddof=1), np.max(expected))
        assert (row["mean"], row["std"], row["best"]) == pytest.approx(statistics, abs=1e-12)
        assert 4 <= row["sampled_tokens"] <= 4 * 12 and row["prompt_tokens"] > 20
        assert row["parse_fail"] >= row["truncated"] * 4 and row["parse_fail"] in range(5)
    assert any(row.get("std", 0) > 0.1 for row in rows) and any(row.get("parse_fail", 0) > 0 for row in rows)
    assert {row["source"] for row in rows} == {"tiny", "other"}


def test_kept_is_what_the_rule_says_of_the_stored_rewards(whole):
    """The rule once more, from scores.jsonl by plain numpy; every item is kept or rejected, once."""
    expected = []
    for row in read_jsonl(whole / "run" / "scores.jsonl"):
        r = np.array(row.get("rewards", [0.0, 0.0]))
        varied = r.min() < r.max() if row["task"] == "mcqa" else r.std(ddof=1) >= 0.1 and r.max() >= 0.5
        expected += [row["id"]] if varied else []
    selected, rejected = (read_jsonl(whole / "run" / f"{name}.jsonl") for name in ("selected", "rejected"))
    assert [row["id"] for row in selected] == expected and 0 < len(expected) < 22
    assert len(selected) + len(rejected) == 23 and not {r["id"] for r in rejected} & set(expected)
    (broken,) = [row for row in rejected if row["reason"] == "unreadable"]
    assert broken["id"] == "tiny/broken" and "broken.mp4" in broken["error"]


def test_selected_records_are_the_same_samples_elsewhere(whole, train):
    """Read as any data file: the samples of the source, statistics added; videos are found from the run folder."""
    source = {sample.id: sample for sample in read_samples(train.partition("=")[2])}
    scores = {row["id"]: row for row in read_jsonl(whole / "run" / "scores.jsonl")}
    samples = read_samples(str(whole / "run" / "selected.jsonl"))
    for sample in samples:
        row, before = scores[sample.id], source[sample.id]
        statistics = {f"reward_{name}": row[name] for name in ("mean", "std", "best")}
        assert sample == dataclasses.replace(before, extra=(before.extra or {}) | statistics)
        assert os.path.isabs(sample.video)
    assert any(sample.extra.get("note") == "é" for sample in samples)


def test_the_summary_says_what_it_was_made_with(whole):
    summary = json.loads((whole / "run" / "summary.json").read_text())
    assert summary["spec"]["video"]["fps"] == 2.0 and summary["spec"]["model"]["path"].endswith("/final")
    assert summary["spec"]["packages"]["torch"] and summary["select"]["rule"] == "mixed"
    counts = summary["counts"]
    assert counts["all"]["items"] == 23 and counts["all"]["unreadable"] == 1
    assert {"tvg/tiny", "tvg/other", "mcqa/tiny", "gqa/tiny"} <= set(counts)
    rows = [row for row in read_jsonl(whole / "run" / "scores.jsonl") if "error" not in row]
    assert summary["responses"]["num"] == 88
    for key in ("sampled_tokens", "prompt_tokens"):
        assert summary["responses"][key] == sum(row[key] for row in rows)
    fails = sum(row["parse_fail"] for row in rows)
    assert summary["responses"]["frac_parse_fail"] == pytest.approx(fails / 88)


def test_a_batch_keeps_no_patches(model, train, tmp_path, patches_held):
    """They are on the device: those of the batch before must not be there any more."""
    select_data.main(arguments(tmp_path, model, train, "run.self_check=false"))
    assert len(patches_held) == 22 and patches_held.count(1) == 5 and max(patches_held) <= 5


def test_one_prefill_serves_all_responses(model, train, tmp_path, monkeypatch):
    """Each video is embedded and its prompt run once, whatever K is."""
    seen = []

    def embed_each(policy, prompts):
        seen.extend(prompt.sample.id for prompt in prompts)
        return original(policy, prompts)

    original = select_data.Policy.embed_each
    monkeypatch.setattr(select_data.Policy, "embed_each", embed_each)
    select_data.main(arguments(tmp_path, model, train, "rollout.group_size=3"))
    assert len(seen) == len(set(seen)) == 22


def test_parse_failures_are_answers_that_cannot_be_read():
    """Whatever the layout around them, which is a matter of the part `format`."""
    sample = Sample("a", "gqa", "", "?", duration=9.0, options=("x", "y"), answer="B", segments=((1.0, 2.0),))
    texts = {"<answer>B, 1 to 2</answer>": True, "B, 1 to 2": False, "<answer>B</answer>": False}
    texts |= {"<answer>1 to 2</answer>": False, "no <answer>b. 0:01 - 0:02</answer> layout": True}
    assert {text: parses(text, sample) for text in texts} == texts


# ---- resuming ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import select_data
from records import jsonl
from runtime.resumable import DoneBatches
places, argv = sys.argv[1].split(","), sys.argv[2:]
add, write_text, num = DoneBatches.add, jsonl.write_text, 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def killed_add(self, number, rows):
    global num
    num += 1
    if where == f"torn {num}":
        with open(self.run.dir / "scores.0.jsonl", "a") as file:
            file.write('{"batch": %d, "rows": [{"id": "tiny' % number)
        die()
    add(self, number, rows)
    if where == f"after {num}":
        die()
def killed_write(path, text):
    if where == "merging" and path.name == "scores.jsonl":
        path.with_name(path.name + ".tmp").write_text(text[:100])
        die()
    write_text(path, text)
    if where == "merged" and path.name == "scores.jsonl":
        die()
DoneBatches.add, jsonl.write_text = killed_add, killed_write
for where in places:
    if os.fork() == 0:
        select_data.main(argv)
        os._exit(0)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (where, status)
"""


def test_killed_and_resumed_is_uninterrupted_byte_for_byte(whole, model, train, tmp_path):
    """Processes that go on where the one before killed itself: within a line, after one, around the end; then ours."""
    argv = arguments(tmp_path, model, train)
    places = "torn 1,after 1,torn 2,after 2,merging,merged"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", KILLED, places, *argv]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "scores.0.jsonl").is_file() and not (tmp_path / "run" / "selected.jsonl").exists()
    select_data.main(argv)
    assert files_of(tmp_path) == files_of(whole)
    assert not list((tmp_path / "run").glob("scores.*.jsonl"))


def test_what_is_done_is_not_done_again(whole, model, train, tmp_path, monkeypatch):
    """Three of five batches stand in files of two processes, one line torn: two are scored, and what was unreadable."""
    rows = read_jsonl(whole / "run" / "scores.jsonl")
    batches = [rows[i : i + 5] for i in range(0, 23, 5)]
    (tmp_path / "run").mkdir()
    by = {"weights": "w", "code_hash": "c"}
    monkeypatch.setattr(select_data.Policy, "fingerprint", lambda policy: "w")
    monkeypatch.setattr(select_data, "code_hash", lambda: "c")
    lines = [json.dumps({"batch": i, "by": by, "rows": batch}) + "\n" for i, batch in enumerate(batches)]
    (tmp_path / "run" / "scores.0.jsonl").write_text(lines[4] + lines[0])
    (tmp_path / "run" / "scores.7.jsonl").write_text(lines[2] + lines[3][:50])
    cfg, _, _ = from_command_line(config.SelectConfig, arguments(tmp_path, model, train), "", "")
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(cfg))
    scored = []

    def score_prompts(policy, prompts, *args):
        scored.extend(prompt.sample.id for prompt in prompts)
        return original(policy, prompts, *args)

    original = select_data.score_prompts
    monkeypatch.setattr(select_data, "score_prompts", score_prompts)
    select_data.main(arguments(tmp_path, model, train))
    again = [i for i, batch in enumerate(batches) if i in (1, 3) or any("error" in row for row in batch)]
    assert len(again) < 5
    assert scored == [row["id"] for number in again for row in batches[number] if "error" not in row]
    names = ("scores.jsonl", "selected.jsonl", "rejected.jsonl")
    assert [files_of(tmp_path)[name] for name in names] == [files_of(whole)[name] for name in names]


@pytest.mark.slow
def test_two_processes_select_as_one(whole, model, train, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    command = [sys.executable, *launcher, "select_data.py", *arguments(tmp_path, model, train)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("items kept") == 1
    names = ("scores.jsonl", "selected.jsonl", "rejected.jsonl")
    assert [files_of(tmp_path)[name] for name in names] == [files_of(whole)[name] for name in names]


@pytest.mark.slow
def test_killed_from_outside_at_any_time(whole, model, train, tmp_path):
    """Processes started one after the other and killed after some seconds, until one gets to its end."""
    command = [sys.executable, "select_data.py", *arguments(tmp_path, model, train)]
    for seconds in (4.0, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0):
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
    select_data.main(command[2:])
    names = ("scores.jsonl", "selected.jsonl", "rejected.jsonl")
    assert [files_of(tmp_path)[name] for name in names] == [files_of(whole)[name] for name in names]


# ---- rules applied again, scores from elsewhere --------------------------------------------------------------------


@pytest.fixture
def again(whole, tmp_path, monkeypatch):
    """A copy of the finished folder, in which nothing may be sampled."""
    (tmp_path / "run").mkdir()
    for name in ("scores.jsonl", "config.yaml", "env.json"):
        (tmp_path / "run" / name).write_bytes((whole / "run" / name).read_bytes())
    monkeypatch.setattr(select_data, "load_policy", None)
    return tmp_path


def test_another_rule_needs_no_sampling(again, model, train, capsys):
    before = (again / "run" / "scores.jsonl").read_bytes()
    select_data.main(arguments(again, model, train, "select.rule=random", "select.budget=6"))
    first = read_jsonl(again / "run" / "selected.jsonl")
    assert len(first) == 6 and "6 of 23 items kept" in capsys.readouterr().out
    select_data.main(arguments(again, model, train, "select.rule=top_variance", "select.budget=6"))
    second = read_jsonl(again / "run" / "selected.jsonl")
    assert len(second) == 6 and first != second
    assert sum(x["extra"]["reward_std"] for x in second) > sum(x["extra"]["reward_std"] for x in first)
    assert (again / "run" / "scores.jsonl").read_bytes() == before
    assert "top_variance" in (again / "run" / "config.yaml").read_text()


def test_settings_that_change_no_score_may_change(again, model, train):
    select_data.main(arguments(again, model, train, "data.workers=1", "data.max_bad_share=0.5"))


@pytest.mark.parametrize("override", ["model.path=elsewhere", "video.fps=1.0", "prompt.tvg='Q: {question}'"])
@pytest.mark.parametrize("finished", [True, False])
def test_scores_of_another_setting_are_refused(again, model, train, override, finished):
    if not finished:
        (again / "run" / "scores.jsonl").rename(again / "run" / "scores.0.jsonl")
    message = fails(arguments(again, model, train, override))
    assert f"differs in {override.partition('=')[0]} (" in message and "give another run.dir" in message


def test_named_scores_are_refused_or_allowed_by_key(whole, model, train, tmp_path):
    """The same file serves another data file with the same items, and other settings only where they are named."""
    (tmp_path / "videos").mkdir()
    records = [to_record(sample) for sample in read_samples(train.partition("=")[2])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    scores = [f"select.scores={whole}/run/scores.jsonl", f"data.train={tmp_path}/data.jsonl"]
    select_data.main(arguments(tmp_path, model, train, *scores))
    assert files_of_selected(tmp_path) == files_of_selected(whole)
    changed = ["video.fps=1.0", "rewards.overlap=timestamp_iou"]
    elsewhere = [*scores, *changed, f"run.dir={tmp_path}/other"]
    message = fails(arguments(tmp_path, model, train, *elsewhere))
    assert "another rewards.overlap (iou there, timestamp_iou now), video.fps (2.0 there, 1.0 now);" in message
    assert message.endswith("select.allow=[rewards.overlap,video.fps] takes it all the same")
    message = fails(arguments(tmp_path, model, train, *elsewhere, "select.allow=[video]"))
    assert "rewards.overlap" in message and "video.fps" not in message
    select_data.main(arguments(tmp_path, model, train, *elsewhere, "select.allow=[video,rewards.overlap]"))
    assert (tmp_path / "other" / "selected.jsonl").read_bytes() == (tmp_path / "run" / "selected.jsonl").read_bytes()


def test_scores_of_other_weights_under_the_same_name_are_refused(sft_run, train, tmp_path):
    """Every sixteenth tensor changed a little; without the folder, nothing contradicts the scores."""
    folder = tmp_path / "model"
    shutil.copytree(sft_run / "final", folder)
    argv = arguments(tmp_path, f"model.path={folder}", train, "rollout.group_size=2", "select.rule=random")
    select_data.main([*argv, "select.budget=4"])
    before = files_of(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name in sorted(weights)[::16]:
        weights[name] = weights[name] + 1e-4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = fails([*argv, "select.budget=4"])
    assert f"scores.jsonl was made with other weights than {folder} has now" in message
    named = [f"select.scores={tmp_path}/run/scores.jsonl", f"run.dir={tmp_path}/other", "select.budget=4"]
    assert "other weights" in fails([*argv, *named])
    select_data.main([*argv, *named, "select.allow=[model.path]"])
    shutil.rmtree(folder)
    select_data.main([*argv, "select.budget=4"])
    assert files_of(tmp_path) == before


def files_of_selected(folder):
    return [row["id"] for row in read_jsonl(folder / "run" / "selected.jsonl")]


def published(folder, rows) -> list[str]:
    """A data file without videos, and the command for it: each record's own scores."""
    records = [
        {
            "id": name,
            "task": "tvg",
            "video": "gone.mp4",
            "duration": 10.0,
            "question": "?",
            "segments": [[1, 2]],
            **more,
        }
        for name, more in rows.items()
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    where = [f"data.train={folder}/data.jsonl", f"select.scores={folder}/data.jsonl"]
    return arguments(folder, *where, "select.rule=mean_range")


def test_published_difficulties_need_neither_model_nor_videos(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(select_data, "load_policy", None)
    difficulty = {"a": 5, "b": 10.0, "c": 70, "d": 99.5}
    argv = published(tmp_path, {name: {"extra": {"difficulty": x}} for name, x in difficulty.items()})
    select_data.main(argv)
    assert [(row["id"], row["extra"]["reward_mean"]) for row in read_jsonl(tmp_path / "run" / "selected.jsonl")] == [
        ("b", 0.1),
        ("c", 0.7),
    ]
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "run" / "rejected.jsonl")}
    assert reasons == {"a": "too_hard", "d": "too_easy"}
    assert "nobody knows which model" in capsys.readouterr().out
    message = fails([*argv, "select.rule=mixed"])
    assert message == "error: select.rule=mixed needs at least 2 rewards of every item, 'a' has 1"


@pytest.mark.skipif(
    not TRAIN_2K5.is_file(), reason="no ../shared: published annotations are not part of the repository"
)
def test_time_r1s_published_predictions(tmp_path):
    """Its difficulties are 100 x the IoU of one prediction; the band, counted by numpy; in seconds, without videos."""
    rows = json.loads(gzip.decompress(TRAIN_2K5.read_bytes()))
    records = {}
    for row in rows:
        start, end = row["timestamp"]
        more = {
            "duration": row["duration"],
            "segments": [[start, min(end, row["duration"])]],
            "question": row["sentence"],
        }
        records[row["qid"]] = more | {"extra": {"difficulty": row["difficulty"]}, "source": row["qid"].split("|")[1]}
    argv = published(tmp_path, records)
    started = time.perf_counter()
    select_data.main(argv)
    assert time.perf_counter() - started < 20
    difficulty = np.array([row["difficulty"] for row in rows])
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["counts"]["all"]
    assert counts["items"] == 2500 and counts["too_hard"] == (difficulty < 10).sum() == 179
    assert counts["too_easy"] == (difficulty > 70).sum() == 72 and counts["kept"] == 2249


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["select.rulee=mixed"], ["select.rulee", "did you mean select.rule?"]),
        (["select.rule=random"], ["select.rule=random needs select.budget"]),
        (["rollout.group_size=1"], ["select.rule=mixed needs a variance", "rollout.group_size=1"]),
        (["rollout.group_size=0"], ["rollout.group_size must be above 0"]),
        (["select.low=0.8"], ["select.low and select.high", "0.8"]),
        (["select.min_std=-1"], ["select.min_std must be at least 0"]),
        (["select.allow=video"], ["select.allow must be a list"]),
        (["select.allow=[video]"], ["select.allow is for select.scores"]),
        (["data.max_bad_share=2"], ["data.max_bad_share"]),
        (["data.train=nowhere.jsonl"], ["data file nowhere.jsonl not found"]),
        (["select.scores=nowhere.jsonl"], ["select.scores nowhere.jsonl not found"]),
        (["model.path=./nowhere"], ["model.path ./nowhere"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_named(train, tmp_path, overrides, named):
    message = fails(arguments(tmp_path, train, *overrides))
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "b", "rewards": [0.1', ":2: "),
        ('["b"]', ":2: expected an object, got list"),
        ('{"id": "a", "rewards": [0.5]}', ":2: the id 'a' stands in a row before it"),
        ('{"id": "x", "rewards": [0.5]}', ":2: the id 'x' is not in data.train"),
        ('{"id": "b", "rewards": []}', ":2: rewards must be a list of numbers from 0 to 1"),
        ('{"id": "b", "rewards": [NaN]}', ":2: rewards must be"),
        ('{"id": "b", "rewards": [7]}', ":2: rewards must be"),
        ('{"id": "b", "extra": {"difficulty": 101}}', ":2: rewards must be"),
        ('{"id": "b"}', ":2: rewards must be"),
        ("", "no scores of 1 of the 2 items, the first: 'b'"),
    ],
)
def test_a_bad_score_file_is_named_with_its_row(tmp_path, line, told):
    argv = published(tmp_path, {"a": {}, "b": {}})
    (tmp_path / "s.jsonl").write_text('{"id": "a", "rewards": [0.2, 0.4]}\n' + line)
    message = fails([*argv, f"select.scores={tmp_path}/s.jsonl"])
    assert f"{tmp_path}/s.jsonl" in message and told in message


def test_a_rule_that_keeps_nothing_says_why_and_leaves_no_selection(again, model, train):
    select_data.main(arguments(again, model, train))
    message = fails(arguments(again, model, train, "select.rule=mean_range", "select.low=0.99", "select.high=0.99"))
    assert "select.rule=mean_range keeps none of 23 items: 1 unreadable (" in message and "too_hard (" in message
    assert not (again / "run" / "selected.jsonl").exists() and not (again / "run" / "summary.json").exists()
    assert len(read_jsonl(again / "run" / "rejected.jsonl")) == 23 and (again / "run" / "histogram.png").is_file()


def test_an_untrained_model_answers_nothing(world, train, tmp_path):
    message = fails(arguments(tmp_path, f"model.path={world}/model", train, "rollout.group_size=2"))
    assert "22 unparsed (no response has an answer that can be read)" in message


def test_videos_that_cannot_be_read_end_it_past_a_share_only(world, model, tmp_path):
    """And what was done until then is kept, for a second try with another limit."""
    train = f"data.train={write_data(world, tmp_path / 'data', 12, {1: b'', 2: b'text', 9: b''})}"
    message = fails(arguments(tmp_path, model, train, "data.max_bad_share=0.005"))
    assert "of the 12 samples asked for could not be read, more than data.max_bad_share=0.005" in message
    assert "r1, " in message
    select_data.main(arguments(tmp_path, model, train, "data.max_bad_share=0.3"))
    rows = read_jsonl(tmp_path / "run" / "rejected.jsonl")
    assert [row["id"] for row in rows if row["reason"] == "unreadable"] == ["r1", "r2", "r9"]


def test_changed_data_are_noticed(again, model, train, monkeypatch):
    lines = (again / "run" / "scores.jsonl").read_text().splitlines(keepends=True)
    (again / "run" / "scores.jsonl").write_text("".join(lines[:-1]))
    assert "no scores of 1 of the 23 items" in fails(arguments(again, model, train))
    (again / "run" / "scores.jsonl").unlink()
    rows, by = [json.loads(line) for line in lines[1:6]], {"weights": "w", "code_hash": select_data.code_hash()}
    monkeypatch.undo()
    monkeypatch.setattr(select_data.Policy, "fingerprint", lambda policy: "w")
    (again / "run" / "scores.0.jsonl").write_text(json.dumps({"batch": 0, "by": by, "rows": rows}) + "\n")
    message = fails(arguments(again, model, train))
    assert "scores.0.jsonl:1: batch 0 is of other samples than the data has now" in message


def test_a_folder_of_something_else_is_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("precious")
    assert "exists and is not of a selection" in fails(arguments(tmp_path, train))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_typo_in_scores_costs_nothing_that_is_there(whole, model, train, tmp_path):
    """Neither the batches of a run that was stopped nor the results of another rule, nor a copy that somebody made."""
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "selected.jsonl", "rejected.jsonl", "summary.json", "histogram.png"):
        (tmp_path / "run" / name).write_bytes((whole / "run" / name).read_bytes())
    for name in ("scores.0.jsonl", "scores.backup.jsonl"):
        (tmp_path / "run" / name).write_text("precious")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "config.yaml"}
    assert "not found" in fails(arguments(tmp_path, model, train, "select.scores=typo.jsonl"))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_a_typo_in_the_first_command_does_not_block_the_folder(model, train, tmp_path):
    assert "not found" in fails(arguments(tmp_path, model, "data.train=typo.yaml"))
    select_data.main(arguments(tmp_path, model, train))
    assert (tmp_path / "run" / "selected.jsonl").is_file()


def test_scores_of_another_truth_are_refused(again, model, train):
    """The same ids with other segments: rewards against the old truth would have stood beside the new one."""
    path = Path(train.partition("=")[2])
    before = path.read_text()
    rows = read_jsonl(path)
    row = next(row for row in rows if row.get("segments"))
    row["segments"] = [[0.0, row["duration"] / 2]]
    try:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert f"{row['id']!r} was scored with another question or truth" in fails(arguments(again, model, train))
    finally:
        path.write_text(before)


@pytest.mark.parametrize("content", ["", "[", "a: [1"])
def test_a_broken_configuration_is_named(again, model, train, content):
    (again / "run" / "config.yaml").write_text(content)
    assert "config.yaml is not a configuration" in fails(arguments(again, model, train))


# ---- training on it ------------------------------------------------------------------------------------------------


def test_a_selection_is_trained_on_from_easy_to_hard(whole, world, taught, tmp_path):
    data = (f"data.train={whole}/run/selected.jsonl", "data.order=curriculum", "run.steps=1", "data.batch_size=3")
    train_grpo.train(make_cfg(world, tmp_path, *taught, *data))
    means = {row["id"]: row["extra"]["reward_mean"] for row in read_jsonl(whole / "run" / "selected.jsonl")}
    seen = [means[row["id"]] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert seen == sorted(means.values(), reverse=True)[:3]
