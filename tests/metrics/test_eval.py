"""Evaluation runs: stopped and gone on with, several answers, several processes, and the comparison of results."""

import gc
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO, read_jsonl, write_data

import eval
import policy
from metrics import predictions, tasks
from runtime import resumable


def args_of(world, folder, *overrides, model=None):
    """Command-line words of a short evaluation of three tasks; `folder` is its run folder."""
    words = [f"model.path={model or world / 'model'}", f"data.test={world}/mix_test.yaml", "data.cache_dir="]
    words += [f"run.dir={folder}", "prompt.think=false", "prompt.system_plain=", "eval.max_new_tokens=4"]
    return ["run", *words, "eval.batch_size=4", "data.workers=0", *overrides]


def ids_of(path):
    return [row["id"] for row in read_jsonl(path)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of an evaluation that nothing stopped."""
    folder = tmp_path_factory.mktemp("eval") / "whole"
    eval.main(args_of(world, folder))
    return folder


# ---- stopping and going on -----------------------------------------------------------------------------------------


def stop_after(monkeypatch, num):
    """Let `num` batches be answered and written, then fail while the next one's line is half-written."""
    add, done = resumable.DoneBatches.add, []

    def failing(self, number, rows):
        if len(done) == num:
            with open(self.path, "ab") as file:
                file.write(b'{"batch": %d, "rows": [{"id": "\xc3' % number)
            raise KeyboardInterrupt
        done.append(number)
        add(self, number, rows)

    monkeypatch.setattr(resumable.DoneBatches, "add", failing)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_gone_on_with_is_uninterrupted(world, whole, tmp_path, monkeypatch, num):
    """A torn line is cut off and its batch answered again; nothing is lost or repeated, in the order of the data."""
    with monkeypatch.context() as patched:
        stop_after(patched, num)
        with pytest.raises(KeyboardInterrupt):
            eval.main(args_of(world, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "predictions.jsonl").exists()
    eval.main([*args_of(world, tmp_path / "parts"), "--resume"])
    left = [(folder / "predictions.jsonl").read_bytes() for folder in (whole, tmp_path / "parts")]
    assert left[0] == left[1]
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, tmp_path / "parts")]
    assert found[0] == found[1]
    assert not list((tmp_path / "parts").glob("answers.*"))


def test_a_batch_keeps_no_patches(world, tmp_path, patches_held):
    """They are on the device: those of the batch before must not be there any more."""
    eval.main(args_of(world, tmp_path / "run", "run.self_check=false"))
    num = len(read_jsonl(tmp_path / "run" / "predictions.jsonl"))
    assert patches_held == [1 + i % 4 for i in range(num)] and num > 8


def test_what_is_done_is_not_answered_again(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            eval.main(args_of(world, tmp_path / "parts"))
    added, add = [], resumable.DoneBatches.add
    monkeypatch.setattr(resumable.DoneBatches, "add", lambda self, n, rows: (added.append(n), add(self, n, rows)))
    eval.main([*args_of(world, tmp_path / "parts"), "--resume"])
    num = len(ids_of(tmp_path / "parts" / "predictions.jsonl"))
    assert added == list(range(2, -(-num // 4)))


def test_the_configuration_reaches_the_answers(world, sft_run, tmp_path):
    """Longer answers, a plain answer taken, unanswered ones left out, another seed: each changes what it says."""
    names = {"a": (), "b": ("run.seed=1",), "c": ("eval.temperature=0.01",), "d": ("eval.max_new_tokens=7",)}
    rows = {}
    for name, more in names.items():
        words = ("eval.num_answers=2", "eval.temperature=1.5", *more)
        eval.main(args_of(world, tmp_path / name, *words, model=sft_run / "final"))
        rows[name] = read_jsonl(tmp_path / name / "predictions.jsonl")
    spec = {name: json.loads((tmp_path / name / "metrics.json").read_text())["spec"]["decoding"] for name in names}
    assert (spec["b"]["seed"], spec["c"]["temperature"], spec["d"]["max_new_tokens"]) == (1, 0.01, 7)
    responses = {name: [row["responses"] for row in rows[name]] for name in names}
    assert responses["a"] != responses["b"]
    assert sum(a != b for a, b in responses["c"]) < sum(a != b for a, b in responses["a"])
    assert max(row["num_tokens"] for row in rows["a"]) <= 2 * 4 < max(row["num_tokens"] for row in rows["d"])


def test_answer_modes_reach_the_metrics(world, tmp_path, monkeypatch):
    """Every response is a plain A: wrong or no answer when tagged, an answer otherwise."""
    prediction = predictions.prediction
    plain = lambda sample, texts, answer: prediction(sample, ["A"] * len(texts), answer)  # noqa: E731
    monkeypatch.setattr(predictions, "prediction", plain)
    found = {}
    for name, more in (("tagged", ()), ("text", ("eval.answer=tagged_or_text",)), ("skip", ("eval.unanswered=skip",))):
        eval.main(args_of(world, tmp_path / name, f"data.test={world}/mcqa_test.yaml", *more))
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())["tasks"]["mcqa"]
    assert found["tagged"]["parse_fail"] == 100 and found["text"]["parse_fail"] == 0 < found["text"]["accuracy"]
    assert found["skip"]["n"] == 0 and found["skip"]["num_skipped"] == found["tagged"]["n"]


def test_rows_are_in_the_order_of_the_data(world, whole):
    names = [entry["json_path"] for entry in yaml.safe_load((world / "mix_test.yaml").read_text())["datasets"]]
    assert ids_of(whole / "predictions.jsonl") == [i for name in names for i in ids_of(world / name)]


def test_a_finished_run_is_not_run_again(world, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predictions, "generate", None)
    before = (whole / "metrics.json").read_bytes()
    eval.main([*args_of(world, whole), "--resume"])
    assert "is finished" in capsys.readouterr().out and (whole / "metrics.json").read_bytes() == before
    with pytest.raises(SystemExit, match="exists; give --resume to go on"):
        eval.main(args_of(world, whole))


def test_going_on_with_other_questions_or_another_config_is_refused(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            eval.main(args_of(world, tmp_path / "parts"))
    with pytest.raises(SystemExit, match=r"differs in eval.batch_size \(4 there, 8 now\)"):
        eval.main([*args_of(world, tmp_path / "parts", "eval.batch_size=8"), "--resume"])
    with monkeypatch.context() as patched:
        patched.setattr(eval, "code_hash", lambda: "edited")
        with pytest.raises(
            SystemExit, match=r"answers.0.jsonl:1: answers by other code_hash \(\w+ there, edited now\)"
        ):
            eval.main([*args_of(world, tmp_path / "parts"), "--resume"])
        patched.undo()
        patched.setattr(policy.Policy, "fingerprint", lambda policy: "trained on")
        with pytest.raises(SystemExit, match="answers by other weights"):
            eval.main([*args_of(world, tmp_path / "parts"), "--resume"])
    (part,) = (tmp_path / "parts").glob("answers.*.jsonl")
    answered, question = part.read_bytes(), read_jsonl(world / "tvg_test.jsonl")[0]["question"]
    for content, reason in (
        (answered.replace(question.encode(), b"another one", 1), "batch 0 is of other samples than"),
        (b'{"batch": 0}\n', "not a line of answers"),
        (b"[]\n", "expected an object, got list"),
        (b"{\n", "not valid JSON"),
    ):
        part.write_bytes(content)
        with pytest.raises(SystemExit, match=f"answers.0.jsonl:1: {reason}"):
            eval.main([*args_of(world, tmp_path / "parts"), "--resume"])


def test_a_video_that_could_not_be_read_is_tried_again(world, tmp_path, monkeypatch):
    """What failed may have been mounted since; a good batch beside it is kept."""
    data = write_data(world, tmp_path / "data", 8, {1: b"no video"})
    words = args_of(world, tmp_path / "parts", f"data.test={data}")
    with monkeypatch.context() as patched:
        patched.setattr(resumable.DoneBatches, "gather", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            eval.main(words)
    good = read_jsonl(world / "tvg_train.jsonl")[1]["video"]
    (tmp_path / "data" / "videos" / "1.mp4").write_bytes((world / "videos" / good).read_bytes())
    eval.main([*words, "--resume"])
    rows = read_jsonl(tmp_path / "parts" / "predictions.jsonl")
    assert len(rows) == 8 and not any("error" in row for row in rows)


def test_too_many_unreadable_videos_end_an_evaluation(world, tmp_path):
    data = write_data(world, tmp_path / "data", 12, dict.fromkeys(range(11), b"no video"))
    with pytest.raises(SystemExit, match=r"error: 11 of the 12 .* data.max_bad_share=0.1 of them; the first: r0, "):
        eval.main(args_of(world, tmp_path / "x", f"data.test={data}", "eval.batch_size=12"))


def test_a_folder_in_use_is_refused(world, tmp_path):
    """Of two runs in one folder one would lose its answers; a run that has died holds nothing."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    (tmp_path / "x").mkdir()
    command = [sys.executable, "-c", f"{code}; time.sleep(60)", str(tmp_path / "x" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for words in ([], ["--resume"]):
            with pytest.raises(SystemExit, match="is in use by another process"):
                eval.main([*args_of(world, tmp_path / "x"), *words])
        process.kill()
    eval.main(args_of(world, tmp_path / "x"))


@pytest.mark.slow
def test_killed_ten_times_at_random_is_uninterrupted(world, tmp_path):
    """Twice within the start, eight times within or between batches."""
    rng, folder = random.Random(0), tmp_path / "killed"
    more = ("eval.batch_size=1", "eval.max_new_tokens=16")
    command = [sys.executable, "eval.py", *args_of(world, folder, *more), "--resume"]

    def size():
        return sum(path.stat().st_size for path in folder.glob("answers.*.jsonl"))

    for kill in range(10):
        process, before = subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL), size()
        deadline = time.monotonic() + (120 if kill > 1 else rng.uniform(0, 6))
        while size() == before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15) if kill > 1 else 0)
        assert process.poll() is None, "finished before it could be killed: give it more to do"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert size() and not (folder / "predictions.jsonl").exists()
    subprocess.run(command, cwd=REPO, check=True, timeout=300)
    eval.main(args_of(world, tmp_path / "whole", *more))
    left = [(path / "predictions.jsonl").read_bytes() for path in (folder, tmp_path / "whole")]
    assert left[0] == left[1]


@pytest.mark.slow
def test_two_processes_answer_as_one_and_go_on_where_one_stopped(world, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            eval.main(args_of(world, tmp_path / "two"))
    gc.collect()  # an interrupted run of this process holds its folder as long as it lives
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    command = [*launcher, "eval.py", *args_of(world, tmp_path / "two"), "--resume"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    left = [(folder / "predictions.jsonl").read_bytes() for folder in (whole, tmp_path / "two")]
    assert left[0] == left[1]


# ---- floors --------------------------------------------------------------------------------------------------------


def test_the_best_constant_answers_of_the_training_set_stand_beside_the_model(world, tmp_path, monkeypatch, capsys):
    """Two training questions say 20% to 60%; the test set's own best would be 50% to 100%."""
    rows = {"train": [(10, [2, 6]), (20, [4, 12])], "test": [(10, [5, 10]), (10, [5, 10])]}
    clip = read_jsonl(world / "tvg_train.jsonl")[0]
    (tmp_path / "videos").symlink_to(world / "videos")
    for name, spans in rows.items():
        records = [clip | {"id": f"{name}{i}", "duration": d, "segments": [s]} for i, (d, s) in enumerate(spans)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [f"data.test={tmp_path}/test.jsonl", f"data.floor={tmp_path}/train.jsonl"]
    eval.main(args_of(world, tmp_path / "x", *words))
    assert "floor of tvg, always 20% to 60% of the clip: n 2 miou 12.50 " in capsys.readouterr().out
    found = json.loads((tmp_path / "x" / "metrics.json").read_text())
    assert found["floor"]["tvg"]["miou"] == 12.5  # 1 s of 8
    assert found["tasks"]["tvg"].keys() | {"constant"} == found["floor"]["tvg"].keys()
    for floor, reason in (
        ("", "data.floor names no training set"),
        (f"{world}/mcqa_train.yaml", "has no record of it"),
    ):
        eval.main(args_of(world, tmp_path / "y", words[0], f"data.floor={floor}"))
        assert re.search(f"no floor of tvg: .*{reason}\n", capsys.readouterr().out)
        assert json.loads((tmp_path / "y" / "metrics.json").read_text())["floor"] == {}
        shutil.rmtree(tmp_path / "y")
    monkeypatch.setattr(
        "runtime.arguments.check_floor", lambda data: pytest.fail("a finished evaluation needs no floor")
    )
    eval.main([*args_of(world, tmp_path / "x", *words), "--resume"])


def test_what_cannot_be_read_of_a_training_set_ends_no_evaluation(world, tmp_path, capsys):
    """One malformed row of the training set ended an evaluation, and so did a record without its duration and video."""
    clip = read_jsonl(world / "tvg_train.jsonl")[0] | {"duration": 10, "segments": [[2, 6]]}
    without = {key: value for key, value in clip.items() if key != "duration"} | {"video": "gone.mp4"}
    rows = [json.dumps(clip), "{", json.dumps(clip | {"segments": [[3]]}), json.dumps(without), json.dumps(clip)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    words = [f"data.test={world}/tvg_test.yaml", f"data.floor={tmp_path}/train.jsonl"]
    eval.main(args_of(world, tmp_path / "x", *words))
    told = capsys.readouterr().out
    assert told.count("left out") == 1
    assert f"floor: 3 of 5 records of {tmp_path}/train.jsonl left out, the first: row 2: not valid JSON: " in told
    assert json.loads((tmp_path / "x" / "metrics.json").read_text())["floor"]["tvg"]["constant"]["span"] == [0.2, 0.6]


def test_blind_answers_are_of_another_clip_and_stand_apart(world, whole, tmp_path, monkeypatch, capsys):
    """Stopped in the middle of them and gone on with; the sighted answers are those of a run without."""
    words = args_of(world, tmp_path / "x", "eval.blind=true")
    num = -(-len(ids_of(whole / "predictions.jsonl")) // 4)
    with monkeypatch.context() as patched:
        stop_after(patched, num + 2)
        with pytest.raises(KeyboardInterrupt):
            eval.main(words)
    added, add = [], resumable.DoneBatches.add
    with monkeypatch.context() as patched:
        patched.setattr(resumable.DoneBatches, "add", lambda self, n, rows: (added.append(n), add(self, n, rows)))
        eval.main([*words, "--resume"])
    assert added == list(range(2, num))
    assert not list((tmp_path / "x").glob("answers*"))
    assert (tmp_path / "x" / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    sighted, blind = (read_jsonl(tmp_path / "x" / f"predictions{end}.jsonl") for end in ("", "_blind"))
    used = {"response", "pred_choice", "pred_segments", "num_tokens", "num_truncated", "video_tokens", "frames_cut"}
    for a, b in zip(sighted, blind, strict=True):
        assert {k: v for k, v in a.items() if k not in used} == {
            k: v for k, v in b.items() if k not in used | {"shown"}
        }
        assert b["shown"] != a["video"]
    shown = {row["shown"]: row["video_tokens"] for row in blind}
    own = {row["video"]: row["video_tokens"] for row in sighted}
    assert all(own[video] == tokens for video, tokens in shown.items())
    found = json.loads((tmp_path / "x" / "metrics.json").read_text())
    assert found["tasks"] == json.loads((whole / "metrics.json").read_text())["tasks"]
    assert found["blind"]["predictions"] == "predictions_blind.jsonl"
    assert found["blind"]["tasks"] == tasks.score_predictions(blind)["tasks"]


def test_blind_results_are_compared_with_sighted_ones_only_when_asked(world, whole, tmp_path, capsys):
    eval.main(args_of(world, tmp_path / "x", "eval.blind=true", "run.self_check=false"))
    out = str(tmp_path / "blind.json")
    eval.main(["score", str(tmp_path / "x" / "predictions_blind.jsonl"), "--out", out])
    eval.main(["compare", str(whole), str(tmp_path / "x")])  # its sighted answers
    allowed = ["--allow", "blind"]
    with pytest.raises(SystemExit, match=r"different specifications: blind \(None, True\)\. --allow KEY"):
        eval.main(["compare", str(tmp_path / "x"), out])
    capsys.readouterr()
    eval.main(["compare", str(tmp_path / "x"), out, *allowed])
    assert "tvg: n" in capsys.readouterr().out


# ---- several answers -----------------------------------------------------------------------------------------------


def test_several_answers_are_sampled_by_id_and_scored_by_mean_and_best(world, tmp_path):
    """A question's answers do not depend on the batch that it stands in."""
    more = ("eval.num_answers=3", "eval.temperature=2.0")
    eval.main(args_of(world, tmp_path / "a", *more))
    eval.main(args_of(world, tmp_path / "b", *more, "eval.batch_size=3"))
    a, b = (read_jsonl(tmp_path / name / "predictions.jsonl") for name in "ab")
    assert [row["responses"] for row in a] == [row["responses"] for row in b]
    assert all(len(row["responses"]) == 3 and "response" not in row for row in a)
    assert any(len(set(row["responses"])) > 1 for row in a)
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["spec"]["decoding"]["num_answers"] == 3 and "miou_best" in found["tasks"]["tvg"]
    assert found["responses"]["tokens"] == sum(row["num_tokens"] for row in a)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["eval.num_answers=3"], r"eval.temperature must be above 0 \(0: one greedy answer\), got 0.0"),
        (["eval.temperature=-1"], "eval.temperature must be at least 0, got -1.0"),
        (["eval.num_answers=0"], "eval.num_answers must be above 0, got 0"),
        (["eval.batch_size=0"], "eval.batch_size must be above 0, got 0"),
        (["eval.every=1"], "unknown key eval.every"),
    ],
)
def test_values_that_make_no_sense_are_refused(world, tmp_path, overrides, reason):
    with pytest.raises(SystemExit, match=reason):
        eval.main(args_of(world, tmp_path / "x", *overrides))


# ---- specification and comparison ----------------------------------------------------------------------------------


def test_the_specification_says_how_the_numbers_came_about(whole):
    found = json.loads((whole / "metrics.json").read_text())
    spec, rows = found["spec"], read_jsonl(whole / "predictions.jsonl")
    assert spec["num_samples"] == len(rows) and spec["video"]["fps"] == 2.0
    assert spec["prompt"]["think"] is False and len(spec["prompt_hash"]) == 12
    assert spec["decoding"]["max_new_tokens"] == 4 and spec["packages"]["torch"]
    assert found["videos"]["tokens_mean"] > 0
    assert found["responses"]["tokens"] == sum(row["num_tokens"] for row in rows)
    truncated = np.mean([row["num_truncated"] for row in rows])
    assert found["responses"]["frac_truncated"] == pytest.approx(truncated)


@pytest.fixture(scope="module")
def two_results(world, whole, sft_run, tmp_path_factory):
    """metrics.json of the world's random model and of one that was tuned a little."""
    folder = tmp_path_factory.mktemp("eval") / "tuned"
    eval.main(args_of(world, folder, model=sft_run / "final"))
    return [str(path / "metrics.json") for path in (whole, folder)]


def test_compare_is_paired_by_sample(two_results, capsys):
    eval.main(["compare", *two_results])
    lines = capsys.readouterr().out.splitlines()
    a, b = (json.loads(Path(path).read_text())["tasks"] for path in two_results)
    assert [line.partition(":")[0] for line in lines if ": n " in line] == list(a)
    row = lines[next(i for i, line in enumerate(lines) if line.startswith("mcqa: n")) + 2].split()
    assert row[:3] == ["accuracy", f"{a['mcqa']['accuracy']:.2f}", f"{b['mcqa']['accuracy']:.2f}"]
    assert float(row[3]) == pytest.approx(b["mcqa"]["accuracy"] - a["mcqa"]["accuracy"], abs=0.011)


def write_result(folder, accuracies, **spec):
    """A result of so many questions, right where the number is 1; None: no answer."""
    folder.mkdir()
    choices = {1: "B", 0: "A", None: None}
    rows = [
        {"id": i, "task": "mcqa", "pred_choice": choices[right], "answer": "B", "video": f"{i // 2}.mp4"}
        for i, right in accuracies.items()
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"spec": {"answer": "tagged", "unanswered": "wrong"} | spec, "predictions": "predictions.jsonl"}
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder)


def shown(capsys, name):
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} ")]
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]


def test_compare_by_hand(tmp_path, capsys):
    """Ten questions become right and five wrong, in another order of rows: +10 of 50, and an interval around that."""
    a = {i: int(i < 25) for i in range(50)}
    b = dict(sorted({i: int(5 <= i < 35) for i in range(50)}.items(), reverse=True))
    eval.main(["compare", write_result(tmp_path / "a", a), write_result(tmp_path / "b", b)])
    first, second, difference, low, high = shown(capsys, "accuracy")
    assert (first, second, difference) == (50, 60, 10) and low < 0 < 10 < high
    eval.main(["compare", str(tmp_path / "b"), str(tmp_path / "a")])
    assert shown(capsys, "accuracy")[2] == -10
    better = write_result(tmp_path / "c", {i: int(right or i in (30, 40)) for i, right in a.items()})
    eval.main(["compare", str(tmp_path / "a"), better, str(tmp_path / "b")])
    numbers = shown(capsys, "accuracy")
    assert numbers[:4] == [50, 54, 60, 4] and numbers[4] >= 0 and numbers[6] == 10


def test_compare_pairs_what_both_have_scored(tmp_path, capsys):
    """With skip each result's own metric is over what it answered, the difference over what both did."""
    skip = {"unanswered": "skip"}
    a = write_result(tmp_path / "a", {0: 1, 1: 0, 2: None, 3: 1}, **skip)
    b = write_result(tmp_path / "b", {0: 1, 1: 1, 2: 0, 3: None}, **skip)
    eval.main(["compare", a, b])
    assert shown(capsys, "accuracy")[:3] == [66.67, 66.67, 50]
    other = write_result(tmp_path / "c", {7: 1})
    with pytest.raises(SystemExit, match="two results have no sample in common"):
        eval.main(["compare", write_result(tmp_path / "d", {0: 1}), other])


def test_compare_refuses_other_specifications_and_names_the_keys(world, whole, tmp_path, capsys):
    other = args_of(world, tmp_path / "other", "prompt.mcqa='Q: {question}'", "video.fps=1.0")
    eval.main(other)
    results = [str(whole / "metrics.json"), str(tmp_path / "other" / "metrics.json")]
    with pytest.raises(SystemExit) as stop:
        eval.main(["compare", *results])
    message = str(stop.value)
    assert "prompt.mcqa (" in message and "video.fps (2.0, 1.0)" in message and "prompt_hash" not in message
    assert "model" not in message and "--allow KEY" in message
    with pytest.raises(SystemExit, match=r"video\.fps"):
        eval.main(["compare", *results, "--allow", "prompt"])
    capsys.readouterr()
    eval.main(["compare", *results, "--allow", "prompt", "--allow", "video"])
    assert "tvg: n" in capsys.readouterr().out


def test_compare_refuses_another_test_set(world, whole, tmp_path):
    eval.main(args_of(world, tmp_path / "other", f"data.test={world}/tvg_test.yaml"))
    with pytest.raises(SystemExit, match=r"data_hash .*num_samples"):
        eval.main(["compare", str(whole / "metrics.json"), str(tmp_path / "other" / "metrics.json")])


def test_compare_names_files_that_it_cannot_use(whole, tmp_path):
    good, bad = str(whole / "metrics.json"), tmp_path / "bad.json"
    with pytest.raises(SystemExit, match="at least two results"):
        eval.main(["compare", good])
    for content, reason in (("{", "not a metrics.json"), ("[]", "not a metrics.json"), ("{}", "not a metrics.json")):
        bad.write_text(content)
        with pytest.raises(SystemExit, match=f"{bad}: {reason}"):
            eval.main(["compare", good, str(bad)])
    bad.write_text((whole / "metrics.json").read_text())
    with pytest.raises(SystemExit, match=f"{bad}: its predictions are not there"):
        eval.main(["compare", good, str(bad)])


def test_scored_again_is_compared_as_it_was(whole, two_results, tmp_path, capsys):
    """The specification goes with the predictions, and a changed way to score them is a difference."""
    tagged, text = tmp_path / "tagged.json", tmp_path / "text.json"
    eval.main(["score", str(whole / "predictions.jsonl"), "--out", str(tagged)])
    eval.main(["score", str(whole / "predictions.jsonl"), "--out", str(text), "--answer", "tagged_or_text"])
    eval.main(["compare", two_results[1], str(tagged)])
    with pytest.raises(SystemExit, match="answer \\('tagged', 'tagged_or_text'\\)"):
        eval.main(["compare", two_results[1], str(text)])


def test_published_predictions_are_scored_against_the_records(world, whole, tmp_path, capsys):
    """A record without a prediction is a wrong answer, and counted; with `skip` it is left out. The order is free."""
    records, predictions = world / "mcqa_test.jsonl", tmp_path / "p.jsonl"
    truth = read_jsonl(records)
    rows = [{"id": row["id"], "pred_choice": row["answer"]} for row in truth[:0:-1]]  # all but the first
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for mode in ("wrong", "skip"):
        words = ["--data", str(records), "--unanswered", mode]
        eval.main(["score", str(predictions), "--out", str(tmp_path / f"{mode}.json"), *words])
        found[mode] = json.loads((tmp_path / f"{mode}.json").read_text())["tasks"]["mcqa"]
    num = len(truth)
    assert found["wrong"]["n"] == num and found["wrong"]["num_missing"] == found["skip"]["num_missing"] == 1
    assert found["wrong"]["accuracy"] == pytest.approx(100 * (num - 1) / num)
    assert (found["skip"]["n"], found["skip"]["num_skipped"], found["skip"]["accuracy"]) == (num - 1, 1, 100)
    assert "1 with no prediction" in capsys.readouterr().out
    eval.main(["compare", str(tmp_path / "wrong.json"), str(tmp_path / "wrong.json")])
    for extra, reason in (({"id": "nobody"}, "is not in"), (rows[0], "is repeated")):
        predictions.write_text("".join(json.dumps(row) + "\n" for row in [*rows, extra]))
        with pytest.raises(SystemExit, match=f"row {num}: key 'id': .* {reason}"):
            eval.main(["score", str(predictions), "--out", str(tmp_path / "x.json"), "--data", str(records)])


def test_values_are_percent_of_the_mean(whole):
    """metrics.json is the mean over predictions.jsonl of what one row is worth."""
    found = json.loads((whole / "metrics.json").read_text())["tasks"]
    rows = read_jsonl(whole / "predictions.jsonl")
    for task, values in found.items():
        mine = [tasks.sample_values(row) for row in rows if row["task"] == task]
        assert values["parse_fail"] == pytest.approx(100 * np.mean([value["parse_fail"] for value in mine]))
