"""Jobs side by side: failures, resuming, folders in use, Ctrl-C. Their program is a script of a few lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

import config
from experiments import jobs
from experiments.jobs import Job, run_all, unfinished

SCRIPT = """
import os, sys, time
sys.path.insert(0, {repo!r})
from pathlib import Path
import config

words = sys.argv[2:]
cfg = config.load(config.EvalRunConfig, [w for w in words if "=" not in w], [w for w in words if "=" in w])
root, folder = Path({root!r}), Path(cfg.run.dir)
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(config.to_yaml(cfg))
exec(cfg.data.test)
(folder / "metrics.json").write_text("{{}}")
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """A program that runs the code in `data.test`, in which `folder` is its run folder; the root is tmp_path/root."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(repo=str(REPO), root=str(tmp_path / "root")))
    monkeypatch.setitem(jobs.PROGRAMS, str(path), config.EvalRunConfig)
    return path


def job(script: Path, name: str, code: str, *needs: str) -> Job:
    return Job(name, str(script), lambda: [f"data.test={json.dumps(code)}"], needs)


def counting(script: Path, name: str, *needs: str) -> Job:
    """A job that leaves a letter in a file of its own each time it runs."""
    return job(script, name, f"open('{script.parent}/{name}.count', 'a').write('x')", *needs)


def counts(script: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in script.parent.glob("*.count")}


def test_a_failed_job_stops_only_those_that_need_it(script, tmp_path):
    root = tmp_path / "root"
    listed = [
        job(script, "bad", "print('one', end=chr(13)); print('two'); sys.exit('boom: no such thing')"),
        counting(script, "after", "bad"),
        counting(script, "later", "after"),
        counting(script, "good"),
        Job("raises", str(script), lambda: json.loads("{")),
    ]
    failed = run_all(listed, root, parallel=2)
    assert failed.keys() == {"bad", "raises"}
    assert failed["bad"].startswith(f"exit code 1; the end of {root}/bad.log:")
    assert failed["bad"].splitlines()[1:] == ["two", "boom: no such thing"]
    assert counts(script) == {"good": 1}
    assert "FAILED bad: exit code 1" in jobs.report(failed) and "FAILED raises: Expecting" in jobs.report(failed)
    assert [job.name for job in unfinished(listed, root)] == ["bad", "after", "later", "raises"]


def test_a_training_that_a_signal_stopped_is_not_finished(script, tmp_path):
    """It dies of the signal, once its checkpoint is there."""
    stopped = job(script, "stopped", "os.kill(os.getpid(), 15)")
    failed = run_all([stopped, counting(script, "after", "stopped")], tmp_path / "root", 1)
    assert failed.keys() == {"stopped"} and failed["stopped"].startswith("exit code -15") and not counts(script)


def test_what_is_finished_is_not_run_again(script, tmp_path):
    root = tmp_path / "root"
    chain = [counting(script, "a"), counting(script, "b", "a"), counting(script, "c", "b")]
    (root / "b").mkdir(parents=True)
    (root / "b" / "half").write_text("of a run that was killed")
    (root / "b.log").touch()
    assert run_all(chain, root, 2) == {} and counts(script) == {"a": 1, "b": 1, "c": 1}
    assert not (root / "b" / "half").exists() and unfinished(chain, root) == []
    assert run_all(chain, root, 2) == {} and counts(script) == {"a": 1, "b": 1, "c": 1}
    (root / "b" / "metrics.json").unlink()
    assert run_all(chain, root, 2) == {}, "c was made from the b that is gone"
    assert counts(script) == {"a": 1, "b": 2, "c": 2}


def test_a_result_that_was_made_from_one_that_failed_now_is_gone(script, tmp_path):
    """Else the next call would take it for a result of what b becomes then."""
    root = tmp_path / "root"
    good = f"if Path('{tmp_path}/broken').exists(): sys.exit(1)"
    chain = [job(script, "b", good), counting(script, "c", "b")]
    assert run_all(chain, root, 1) == {}
    (root / "b" / "metrics.json").unlink()
    (tmp_path / "broken").touch()
    assert run_all(chain, root, 1).keys() == {"b"} and unfinished(chain, root) == chain


def test_a_result_of_another_configuration_is_not_taken_and_not_deleted(script, tmp_path):
    """Comments and the form of a file do not matter, its values do."""
    root, path = tmp_path / "root", tmp_path / "x.yaml"
    assert run_all([counting(script, "a")], root, 1) == {}
    with pytest.raises(
        ValueError, match=r"root/a is of another configuration \(data.test\): remove it, or use another"
    ):
        run_all([job(script, "a", "pass")], root, 1)
    assert (root / "a" / "metrics.json").is_file()
    listed = [Job("b", str(script), lambda: [str(path), "data.test=pass"])]
    for text in ("run: {seed: 1}\n", "# the same\nrun:\n  seed: 1\n"):
        path.write_text(text)
        assert run_all(listed, root, 1) == {}
    path.write_text("run: {seed: 2}\n")
    with pytest.raises(ValueError, match=r"another configuration \(run.seed\)"):
        run_all(listed, root, 1)


def test_a_folder_of_something_else_stays(script, tmp_path):
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="root/b is there, and not from here"):
        run_all([counting(script, "a"), counting(script, "b", "a")], root, 1)
    assert (root / "b").is_dir() and not counts(script)


def test_jobs_go_side_by_side_but_no_more_than_asked_for(script, tmp_path):
    code = "(folder / 'on').touch(); time.sleep(0.4); n = len(list(root.glob('*/on'))); os.remove(folder / 'on'); "
    code += "(folder / 'seen').write_text(str(n))"
    assert run_all([job(script, f"j{i}", code) for i in range(5)], tmp_path / "root", 2) == {}
    seen = [int(path.read_text()) for path in (tmp_path / "root").glob("*/seen")]
    assert len(seen) == 5 and max(seen) == 2


def test_one_thread_each_and_checkpoints_go(script, tmp_path):
    code = "(folder / 'checkpoints').mkdir(); (folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])"
    assert run_all([job(script, "a", code)], tmp_path / "root", 1) == {}
    assert (tmp_path / "root" / "a" / "threads").read_text() == "1"
    assert not (tmp_path / "root" / "a" / "checkpoints").exists()


def test_a_folder_in_use_is_refused(script, tmp_path):
    with jobs._locked(tmp_path / "root"), pytest.raises(ValueError, match="is in use"):
        run_all([counting(script, "a")], tmp_path / "root", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_children(script, tmp_path, number):
    child = "(folder / 'pid').write_text(str(os.getpid())); time.sleep(600)"
    code = f"""
import sys; sys.path.insert(0, "{REPO}")
from pathlib import Path
from experiments.jobs import Job, run_all
listed = [Job(name, "{script}", lambda: [{f"data.test={json.dumps(child)}"!r}]) for name in "abc"]
run_all(listed, Path("{tmp_path}/root"), 2)
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
    assert not list((tmp_path / "root").rglob("metrics.json"))
    with jobs._locked(tmp_path / "root"):
        pass  # nobody holds it any more


def test_the_folder_of_all_results_may_move(tmp_path, script):
    """The paths in a run's config.yaml are those of the place where it ran."""
    one = counting(script, "a")
    assert run_all([one], tmp_path / "root", parallel=1) == {}
    (tmp_path / "root").rename(tmp_path / "moved")
    assert unfinished([one], tmp_path / "moved") == []
    assert run_all([one], tmp_path / "moved", parallel=1) == {} and counts(script) == {"a": 1}
