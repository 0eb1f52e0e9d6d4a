"""The run folder: never overwritten, resumed under its own configuration alone; signals."""

import errno
import json
import os
import platform
import signal

import pytest
import torch
from small_runs import YAML, open_run, prepared, take_step

from runtime import checkpoint, engine
from runtime.checkpoint import write_list
from runtime.environment import code_hash, environment

# ---- folder --------------------------------------------------------------------------------------------------------


def test_a_new_folder_holds_configuration_and_environment_first(tmp_path):
    run = open_run(tmp_path / "a" / "b")
    assert (run.dir / "config.yaml").read_text() == YAML
    assert json.loads((run.dir / "env.json").read_text()).keys() == environment().keys()
    assert (run.start_step, run.state, run.checkpoint) == (0, {}, None)


def test_an_existing_folder_is_never_overwritten(tmp_path):
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 1.0})
    files = {path: path.read_bytes() for path in run.dir.iterdir()}
    with pytest.raises(FileExistsError, match=r"run\.dir .*a exists; give --resume to go on, or another run\.dir"):
        open_run(tmp_path / "a")
    assert {path: path.read_bytes() for path in run.dir.iterdir()} == files
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "empty")


def test_resuming_needs_the_same_configuration(tmp_path):
    run = open_run(tmp_path / "a")
    run.save_checkpoint(3, {"best": 0.5})
    other = "run:\n  seed: 1\n  steps: 4\nloss:\n  beta: 0.1\n  clip_low: 0.2\n"
    with pytest.raises(ValueError) as raised:
        open_run(tmp_path / "a", other, resume=True)
    keys = "loss.clip_low (None there, 0.2 now), run.seed (0 there, 1 now)"
    assert str(raised.value) == f"--resume: {run.dir}/config.yaml differs in {keys}"
    assert (run.dir / "config.yaml").read_text() == YAML
    longer = YAML.replace("steps: 4", "steps: 9") + "data:\n  workers: 4\n  max_bad_share: 0.5\n"  # change no result
    again = open_run(tmp_path / "a", longer, resume=True)
    assert (again.start_step, again.state["best"], again.checkpoint.name) == (3, 0.5, "step_000003")
    assert (run.dir / "config.yaml").read_text() == longer


def test_resuming_needs_a_folder(tmp_path):
    """A typo in run.dir must not start from zero; a run that was killed before it began goes on as if it was not."""
    with pytest.raises(FileNotFoundError, match=r"--resume: .*a/config.yaml not found"):
        open_run(tmp_path / "a", resume=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"--resume: .*b/config.yaml not found"):
        open_run(tmp_path / "b", resume=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "lock").touch()
    run = open_run(tmp_path / "c", resume=True)
    assert (run.dir / "config.yaml").read_text() == YAML and run.start_step == 0


def test_a_run_without_a_checkpoint_starts_again(tmp_path, capsys):
    """As in a requeue loop, which always gives --resume; a half-written checkpoint is none."""
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 0.5})
    aside = run.dir / "checkpoints" / "tmp_step_000002"
    aside.mkdir(parents=True)
    (aside / "run.json").write_text("{}")
    again = open_run(tmp_path / "a", resume=True)
    assert (again.start_step, again.state, again.checkpoint) == (0, {}, None)
    assert "no complete checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert (run.dir / "metrics.jsonl").read_text() == "" and not aside.exists()
    with pytest.raises(ValueError, match=r"differs in run\.seed"):
        open_run(tmp_path / "a", YAML.replace("seed: 0", "seed: 1"), resume=True)


# ---- metrics and samples -------------------------------------------------------------------------------------------


def test_logged_rows_come_back(tmp_path):
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 0.1, "kl": 1e-9})
    run.log(2, {"loss": 1 / 3})
    rows = [
        {"step": 1, "group": 1, "completions": []},
        {"step": 1, "group": 0, "completions": ["é\u2028\x85\n", "<answer>"]},
    ]
    run.log_samples(rows)
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1, "kl": 1e-9}, {"step": 2, "loss": 1 / 3}]
    lines = (run.dir / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0])["completions"] == ["é\u2028\x85\n", "<answer>"] and lines[2] == ""


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run = open_run(tmp_path / "a", keep=2)
    names = []
    for step in (1, 2, 9, 10):
        run.save_checkpoint(step, {})
        names.append(sorted(path.name[-2:] for path in (run.dir / "checkpoints").iterdir()))
    assert names == [["01"], ["01", "02"], ["02", "09"], ["09", "10"]]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys):
    run = open_run(tmp_path / "a")
    for step in (9, 10):
        run.save_checkpoint(step, {"best": float(step)})
        run.log(step, {"loss": 0.0})
    newest = run.dir / "checkpoints" / "step_000010"
    (newest / "run.json").write_text((newest / "run.json").read_text().replace("10.0", "11.0"))
    again = open_run(tmp_path / "a", resume=True)
    assert (again.start_step, again.state["best"]) == (9, 9.0)
    told = capsys.readouterr().err
    assert f"WARNING: {newest} is damaged (run.json: " in told and "going on from step_000009" in told
    assert [row["step"] for row in again.rows("metrics.jsonl")] == [9]
    assert sorted(path.name for path in newest.parent.iterdir()) == ["damaged_step_000010", "step_000009"]
    again.save_checkpoint(10, {})
    assert open_run(tmp_path / "a", resume=True).start_step == 10


def test_without_a_whole_checkpoint_a_run_stays_as_it_is(tmp_path):
    run = open_run(tmp_path / "a")
    for step in (1, 2):
        run.save_checkpoint(step, {})
        (run.dir / "checkpoints" / f"step_00000{step}" / "random_states_0.pkl").unlink()
    run.log(1, {"loss": 0.0})
    with pytest.raises(ValueError) as raised:
        open_run(tmp_path / "a", resume=True)
    assert "--resume: no checkpoint is whole: " in str(raised.value)
    assert all(
        f"step_00000{step}, random_states_0.pkl: missing; when it was saved, " in str(raised.value) for step in (1, 2)
    )
    assert len(list((run.dir / "checkpoints").iterdir())) == 2 and run.rows("metrics.jsonl")


def test_a_checkpoint_that_cannot_be_written_costs_no_older_one(tmp_path, monkeypatch, capsys):
    """Whatever is being written when the disk is full, the folder is as before, and the next one succeeds."""
    run = open_run(tmp_path / "a", keep=1)
    run.save_checkpoint(1, {})
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_space(*_, **__):
        raise full

    for module, name in ((engine.Engine, "save_state"), (checkpoint, "write_list"), (checkpoint, "put_in_place")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, no_space)
            run.save_checkpoint(2, {})
        assert [path.name for path in (run.dir / "checkpoints").iterdir()] == ["step_000001"]
        told = capsys.readouterr().err
        assert "no checkpoint of step 2, the newest is of step 1: rank 0: [Errno 28] No space left on device" in told
    run.save_checkpoint(3, {})
    assert [path.name for path in (run.dir / "checkpoints").iterdir()] == ["step_000003"]


def test_only_a_failure_to_write_is_survived(tmp_path, monkeypatch):
    """Else a bug in saving would be a run without checkpoints, and a warning that nobody reads."""
    run = open_run(tmp_path / "a")
    monkeypatch.setattr(engine.Engine, "save_state", lambda *_: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        run.save_checkpoint(1, {})


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"num_processes": 8, "sharding": "none"}, False),
        ({"num_processes": 1, "sharding": "zero3"}, True),
        ({"num_processes": 8, "sharding": "zero2"}, True),
    ],
)
def test_whole_weights_go_on_with_another_number_of_processes(tmp_path, capsys, saved, refused):
    run = open_run(tmp_path / "a")
    run.save_checkpoint(1, {})
    folder = run.dir / "checkpoints" / "step_000001"
    content = json.loads((folder / "run.json").read_text())
    assert content == {"step": 1, "state": {"skipped_in_a_row": 0}, "num_processes": 1, "sharding": "none"}
    (folder / "run.json").write_text(json.dumps(content | saved))
    write_list(folder)
    if not refused:
        assert open_run(tmp_path / "a", resume=True).start_step == 1
        assert "going on with 1 processes" in capsys.readouterr().out
        return
    named = rf"step_000001 differs in sharding \({saved['sharding']} there, none now\) or number of processes \("
    named += rf"{saved['num_processes']} there, 1 now\)"
    with pytest.raises(ValueError, match=named):
        open_run(tmp_path / "a", resume=True)


def test_a_checkpoint_brings_back_weights_optimizer_and_random_states(tmp_path):
    run = open_run(tmp_path / "a")
    model, optimizer = prepared(run)
    take_step(run, model, optimizer)
    run.save_checkpoint(1, {})
    norms = [take_step(run, model, optimizer) for _ in range(2)]
    weight = model.weight.detach().clone()

    torch.manual_seed(99)
    again = open_run(tmp_path / "a", resume=True)
    model, optimizer = prepared(again)
    assert [take_step(again, model, optimizer) for _ in range(2)] == norms
    assert torch.equal(model.weight, weight)


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_steps_with_a_checkpoint(tmp_path, capsys, number):
    run, taken = open_run(tmp_path / "a"), []
    with run.stoppable():
        for step in run.steps("test"):
            taken.append(step)
            if step == 1:
                os.kill(os.getpid(), number)
            if run.save_due(step + 1):
                run.save_checkpoint(step + 1, {})
    assert taken == [0, 1]
    run.finish(lambda folder: pytest.fail("final/ of a run that was stopped"))
    told = capsys.readouterr()
    assert f"{number.name}: stopping after this step" in told.err
    assert told.out.startswith("stopped after step 2 of 4, with a checkpoint; to go on: ") and "--resume" in told.out
    assert open_run(tmp_path / "a", resume=True).start_step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, capsys):
    run = open_run(tmp_path / "a")
    with run.stoppable():
        for step in run.steps("test"):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            assert run.save_due(step + 1) == (step == 3)
    run.finish(lambda folder, _: (folder / "model").touch())
    assert (run.dir / "final" / "model").is_file() and "stopped after" not in capsys.readouterr().out


def test_a_stop_without_a_checkpoint_is_an_error(tmp_path, monkeypatch):
    run = open_run(tmp_path / "a")
    monkeypatch.setattr(checkpoint, "make_empty", lambda folder: folder.touch())  # there is no such folder
    with run.stoppable():
        for step in run.steps("test"):
            os.kill(os.getpid(), signal.SIGTERM)
            if run.save_due(step + 1):
                run.save_checkpoint(step + 1, {})
    with pytest.raises(SystemExit, match="error: stopped after step 1, without a checkpoint since step 0; to go on: "):
        run.finish()


def test_rows_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
    """After the step, together, and without a row behind the one that is missing."""
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 1.0})
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "append_whole", lambda path, _: path.rename("/nowhere/else"))
        run.log(2, {"loss": 2.0})
    run.log_samples([{"step": 2, "group": 0}])
    with pytest.raises(SystemExit, match=r"error: .*No such file or directory.*; --resume goes on from step 0"):
        run.save_due(2)
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [1] and not run.rows("samples.jsonl")


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run\.dir .*file/a cannot be written and locked: Not a directory"):
        open_run(tmp_path / "file" / "a")


def test_a_run_that_failed_before_its_first_step_does_not_block_the_next(tmp_path):
    """The folder was refused after a typo in data.train, though nothing had been trained."""
    open_run(tmp_path / "a")
    run = open_run(tmp_path / "a")
    run.log(1, {"loss": 0.0})
    with pytest.raises(FileExistsError, match="exists"):
        open_run(tmp_path / "a")


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_the_environment_names_versions_and_commit():
    found = json.loads(json.dumps(environment()))
    assert found["python"] == platform.python_version() and found["packages"]["torch"] == torch.__version__
    assert found["devices"] and {"command", "commit", "diff"} <= found.keys()


def test_the_hash_of_the_code_covers_every_folder_of_it(tmp_path, monkeypatch):
    """A result says by it which code it is of. Tests and benchmarks are none: they have no `__init__.py`."""
    files = ["train.py", "model/__init__.py", "model/folder.py", "tests/test_a.py", "docs/a.md"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr("runtime.environment.REPO", tmp_path)
    hashes = [code_hash()]
    for name in files:
        (tmp_path / name).write_text("# another text\n")
        hashes.append(code_hash())
    changed = [name for name, before, after in zip(files, hashes, hashes[1:]) if before != after]
    assert changed == ["train.py", "model/__init__.py", "model/folder.py"]
    (tmp_path / "model/folder.py").rename(tmp_path / "model/files.py")
    assert code_hash() != hashes[-1]
