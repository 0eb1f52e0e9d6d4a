"""Jobs side by side: failures, resuming, folders in use, Ctrl-C; the scripts here are a line each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

from experiments import jobs
from experiments.jobs import Job, run_all

START = (
    "import sys, pathlib; folder = pathlib.Path(sys.argv[-1].removeprefix('run.dir=')); folder.mkdir(parents=True); "
)


def job(name: str, code: str, *needs: str) -> Job:
    """A job that runs this code, in which `folder` is its run folder."""
    return Job(name, lambda: ["-c", START + code], needs)


def counting(folder: Path, name: str, *needs: str) -> Job:
    """A job that leaves a line in a file of its own each time it runs."""
    return job(name, f"open('{folder}/{name.replace('/', '_')}.count', 'a').write('x')", *needs)


def counts(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in folder.glob("*.count")}


def test_a_failed_job_stops_only_those_that_need_it(tmp_path):
    root = tmp_path / "root"
    listed = [
        job("bad", "print('one\\rtwo', end=chr(10)); sys.exit('boom: no such thing')"),
        counting(tmp_path, "after", "bad"),
        counting(tmp_path, "later", "after"),
        counting(tmp_path, "good"),
        Job("raises", lambda: json.loads("{")),
    ]
    failed = run_all(listed, root, parallel=2)
    assert failed.keys() == {"bad", "after", "later", "raises"}
    assert failed["bad"].startswith(f"exit code 1; the end of {root}/bad.log:")
    assert failed["bad"].splitlines()[1:] == ["two", "boom: no such thing"]
    assert failed["after"] == "not run, for want of bad" and failed["later"] == "not run, for want of after"
    assert counts(tmp_path) == {"good": 1}
    told = jobs.report(failed)
    assert "FAILED bad: exit code 1" in told and "FAILED after" not in told
    assert told.endswith("2 more not run, for want of these")


def test_a_training_that_a_signal_stopped_is_not_finished(tmp_path):
    """It dies of the signal, once its checkpoint is there."""
    script = tmp_path / "train_short.py"
    script.write_text(START + "\nimport os\nif len(sys.argv) == 2: os.kill(os.getpid(), 15)")
    listed = [Job("stopped", lambda: [str(script)]), Job("whole", lambda: [str(script), "final"])]
    failed = run_all([*listed, counting(tmp_path, "after", "stopped")], tmp_path / "root", 1)
    assert failed == {"stopped": "a signal has stopped it", "after": "not run, for want of stopped"}


def test_what_is_finished_is_not_run_again(tmp_path):
    root = tmp_path / "root"
    chain = [counting(tmp_path, "a"), counting(tmp_path, "b", "a"), counting(tmp_path, "c", "b")]
    (root / "b").mkdir(parents=True)
    (root / "b" / "half").write_text("of a run that was killed")
    (root / "b.log").touch()
    assert run_all(chain, root, 2) == {} and counts(tmp_path) == {"a": 1, "b": 1, "c": 1}
    assert not (root / "b" / "half").exists()
    assert run_all(chain, root, 2) == {} and counts(tmp_path) == {"a": 1, "b": 1, "c": 1}
    (root / "b" / jobs.MARKER).unlink()
    assert run_all(chain, root, 2) == {}, "c is older than the b it is made from now"
    assert counts(tmp_path) == {"a": 1, "b": 2, "c": 2}


def test_a_moved_folder_is_still_finished(tmp_path):
    for name in ("old", "new"):
        root = tmp_path / name
        (listed,) = [counting(tmp_path, "a")]
        listed = Job("a", lambda own=root, job=listed: [*job.words(), f"model.path={own}/base/final"])
        assert run_all([listed], root, 1) == {} and counts(tmp_path) == {"a": 1}
        if name == "old":
            root.rename(tmp_path / "new")


def test_a_result_of_another_command_is_not_taken_and_not_deleted(tmp_path):
    root = tmp_path / "root"
    assert run_all([counting(tmp_path, "a")], root, 1) == {}
    failed = run_all([job("a", "pass")], root, 1)
    assert "another command or configuration" in failed["a"] and (root / "a" / jobs.MARKER).is_file()
    path = tmp_path / "x.yaml"
    path.write_text("one")
    listed = [Job("b", lambda: ["-c", START, str(path)])]
    assert run_all(listed, root, 1) == {} and run_all(listed, root, 1) == {}
    path.write_text("two")
    assert "another command or configuration" in run_all(listed, root, 1)["b"]


def test_a_folder_of_something_else_stays(tmp_path):
    (tmp_path / "a").mkdir()
    failed = run_all([job("a", "pass"), job("b", "pass", "a")], tmp_path, 1)
    assert "not from here" in failed["a"] and (tmp_path / "a").is_dir()


def test_jobs_go_side_by_side_but_no_more_than_asked_for(tmp_path):
    code = "import time, os; open(folder / 'on', 'w'); time.sleep(0.4); " + (
        f"n = len(list(pathlib.Path('{tmp_path}/root').glob('*/on'))); os.remove(folder / 'on'); "
        "(folder / 'seen').write_text(str(n))"
    )
    assert run_all([job(f"j{i}", code) for i in range(5)], tmp_path / "root", 2) == {}
    seen = [int(path.read_text()) for path in (tmp_path / "root").glob("*/seen")]
    assert len(seen) == 5 and max(seen) == 2


def test_one_thread_each_and_checkpoints_go(tmp_path):
    code = "import os; (folder / 'checkpoints').mkdir(); (folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])"
    assert run_all([job("a", code)], tmp_path, 1) == {}
    assert (tmp_path / "a" / "threads").read_text() == "1"
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    with jobs.locked(tmp_path), pytest.raises(ValueError, match="is in use"):
        run_all([job("a", "pass")], tmp_path, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_children(tmp_path, number):
    child = START + "import os, time; (folder / 'pid').write_text(str(os.getpid())); time.sleep(600)"
    code = f"""
import sys; sys.path.insert(0, "{REPO}")
from pathlib import Path
from jobs import Job, run_all
run_all([Job(name, lambda: ["-c", {child!r}]) for name in "abc"], Path("{tmp_path}/root"), 2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(pids := list((tmp_path / "root").glob("*/pid"))) < 2 or not all(p.read_text() for p in pids):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(30)
    assert parent.returncode != 0
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not list((tmp_path / "root").rglob(jobs.MARKER))
    with jobs.locked(tmp_path / "root"):
        pass  # nobody holds it any more
