"""Faults that a run survives, or ends at with a line that says what to do: each with real processes.

The suite ends with a table of them, see conftest.py.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import forked
import pytest
import torch
from clips import grey, write_clip
from conftest import REPO, folder_size, make_cfg, metrics_of, read_jsonl, weights_of, write_data
from forked import Fault, start, start_all

import config
from config import GrpoConfig
from data import batch_indices
from preflight import plan
from runtime.arguments import PlanConfig
from runtime.checkpoint import newest_whole, step_of

pytestmark = pytest.mark.slow
NUM_KILLS = 20
REWARD = """def vowels(completions, **_):
    return [sum(map(text.count, "aeiou")) / (1 + len(text)) for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def server():
    forked.start_server()


def arguments(world: Path, folder: Path, *overrides: str) -> list[str]:
    """A configuration under which every step has a gradient and a checkpoint, as arguments; run.dir is folder/run."""
    folder.mkdir(exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    (folder / "reward.yaml").write_text(f"rewards: {{functions: {{'{folder}/reward.py:vowels': 1.0}}}}\n")
    names = ("run.save_every=1", "run.steps=6", "group.skip_dead=false", "loss.entropy=0.01", "loss.beta=0.1")
    (folder / "config.yaml").write_text(config.to_yaml(make_cfg(world, folder, *names, *overrides)))
    return ["--config", str(folder / "config.yaml"), str(folder / "reward.yaml")]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    """Run folder of 6 steps to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    child = start(arguments(world, folder), folder.with_suffix(".log"))
    assert child.wait() == 0, child.text
    return folder / "run"


def assert_same(run: Path, other: Path) -> None:
    """Every row, the newest checkpoint (random states and all) and the final weights, bit for bit."""
    assert metrics_of(run) == metrics_of(other)
    for name in ("samples.jsonl", "bad_samples.jsonl"):
        assert (run / name).is_file() == (other / name).is_file()
        assert not (run / name).is_file() or (run / name).read_bytes() == (other / name).read_bytes()
    newest = [newest_whole(folder / "checkpoints")[0] for folder in (run, other)]
    assert newest[0].name == newest[1].name
    assert json.loads((newest[0] / "files.json").read_text()) == json.loads((newest[1] / "files.json").read_text())
    ours, theirs = weights_of(run), weights_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def newest_step(run: Path) -> int:
    """Of the newest checkpoint, where none is damaged; 0 where there is none."""
    newest, damaged = newest_whole(run / "checkpoints")
    assert not damaged
    return step_of(newest) if newest else 0


def resume(argv: list[str], log: Path, **how) -> str:
    """Go on, to the end; what was printed."""
    child = start([*argv, "--resume"], log, **how)
    assert child.wait() == 0, child.text
    return child.text


# ---- one process ---------------------------------------------------------------------------------------------------


def test_killed_again_and_again(world, tmp_path, fault):
    """SIGKILL at random moments of sampling, update and saving, first before there is any checkpoint."""
    fault(
        f"SIGKILL at {NUM_KILLS} random moments of sampling, update and saving",
        "resumed each time: the same rows, checkpoint and weights, bit for bit",
    )
    data = write_data(world, tmp_path / "data", 12, bad={3: b"not a video"})
    names = (f"data.train={data}", "data.max_bad_share=1", "run.steps=24", "eval.num_samples=2", "eval.every=3")
    names += (f"data.validation={world}/tvg_validation.yaml",)
    argv = arguments(world, tmp_path / "whole", *names)
    child, entered = start(argv, tmp_path / "whole.log"), []
    for _, phase in child.entered():
        entered.append((phase, time.monotonic()))
    assert child.wait() == 0, child.text
    seconds = {phase: [] for phase in ("rollout", "update", "save")}
    for (phase, begin), (_, end) in pairwise(entered):
        if phase in seconds:
            seconds[phase].append(end - begin)

    draw, run, newest = random.Random(0), tmp_path / "parts" / "run", 0
    argv = arguments(world, tmp_path / "parts", *names)
    plan = [("update", 1)] + [(phase, draw.randint(1, 2)) for phase in draw.sample([*seconds] * 7, NUM_KILLS - 1)]
    for phase, count in plan:  # how often it enters the phase until it is killed there
        child = start([*argv, *(["--resume"] if run.is_dir() else [])], tmp_path / "parts.log")
        moments = child.entered()
        for _ in range(count):
            assert any(entered == phase for _, entered in moments), child.text
        time.sleep(draw.uniform(0.0, statistics.median(seconds[phase])))
        child.kill()
        assert newest_step(run) >= newest, "a checkpoint was lost"
        newest = newest_step(run)
    assert newest < 24
    resume(argv, tmp_path / "parts.log")
    assert_same(run, tmp_path / "whole" / "run")
    assert len(metrics_of(run)) == 24 and read_jsonl(run / "bad_samples.jsonl")


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped"])
def test_a_damaged_checkpoint(world, tmp_path, undisturbed, fault, damage):
    fault(f"newest checkpoint {damage}", "named, and the run goes on from the one before")
    argv = arguments(world, tmp_path / "a")
    child = start([*argv, "run.steps=4"], tmp_path / "log")
    assert child.wait() == 0, child.text
    run = tmp_path / "a" / "run"
    path = run / "checkpoints" / "step_000004" / ("model.safetensors" if damage == "truncated" else "optimizer.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1000] if damage == "truncated" else content)
    told = resume(argv, tmp_path / "log")
    assert f"step_000004 is damaged ({path.name}: " in told and "going on from step_000003" in told
    assert_same(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system that holds one checkpoint and not two: 14 MB of memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system of our own: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(world, tmp_path, undisturbed, small_disk, fault):
    """First there is no room for another checkpoint, then not even for a row."""
    fault("disk full while saving", "named, the old checkpoint stays, the run goes on; ends once rows find no room")
    argv, run = arguments(world, small_disk / "a", f"data.cache_dir={tmp_path}/cache"), small_disk / "a" / "run"
    child = start(argv, tmp_path / "log")
    child.wait_for("rollout", 2)
    with open(small_disk / "ballast", "wb", buffering=0) as file:  # all but two pages: for the rows of this step
        while (left := os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize) > 8192:
            file.write(bytes(left - 8192))
    assert child.wait() == 1
    assert "WARNING: no checkpoint of step 2, the newest is of step 1: rank 0: " in child.text
    end = child.text.rstrip().splitlines()[-1]
    assert end.startswith("error: [Errno 28] No space left on device: ") and end.endswith(
        "; --resume goes on from step 1"
    )
    assert newest_step(run) == 1 and len(list((run / "checkpoints").iterdir())) == 1
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (run / name).read_bytes().endswith(b"}\n") and read_jsonl(run / name)
    os.remove(small_disk / "ballast")
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resume(argv, tmp_path / "log")
    assert_same(run, undisturbed)


def test_a_folder_that_cannot_be_written(world, tmp_path, small_disk, fault):
    fault("read-only run folder", "an error before the model is looked for")
    (small_disk / "a").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    argv = arguments(world, tmp_path / "a", f"run.dir={small_disk}/a", "model.path=/nowhere")
    child = start(argv, tmp_path / "log")
    assert child.wait() == 1
    told = child.text.strip()
    assert told == f"error: run.dir {small_disk}/a cannot be written and locked: Read-only file system"


def test_two_runs_in_one_folder(world, tmp_path, undisturbed, fault):
    fault("two runs started on one folder", "the second one ends with an error; once the first is killed, it goes on")
    argv = arguments(world, tmp_path / "a")
    first = start(argv, tmp_path / "log", Fault("hangs", "update", 3))
    first.wait_for("update", 3)
    second = start([*argv, "--resume"], tmp_path / "second.log")
    assert second.wait() == 1 and second.text.strip().endswith("is in use by another process")
    first.kill()
    resume(argv, tmp_path / "second.log")
    assert_same(tmp_path / "a" / "run", undisturbed)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_signal(world, tmp_path, undisturbed, fault, sent):
    """To the whole group, decoding workers too, as Ctrl-C does: they are needed until the step is over."""
    code = 128 + sent
    fault(f"{sent.name} to the process and its workers", f"the step is saved, exit code {code}; --resume goes on")
    argv, run = arguments(world, tmp_path / "a", "data.workers=1"), tmp_path / "a" / "run"
    child = start(argv, tmp_path / "log", setup=forked.own_group)
    child.wait_for("rollout", 2)
    os.killpg(child.process.pid, sent)
    assert child.wait() == -sent, child.text
    end = child.text.rstrip().splitlines()[-1]
    assert end.startswith("stopped after step 2 of 6, with a checkpoint; to go on: train_grpo.py --config ")
    assert end.endswith(" --resume") and newest_step(run) == 2 and not (run / "final").exists()
    resume(argv, tmp_path / "log")
    assert_same(run, undisturbed)


def test_a_loop_of_runs_stops_at_ctrl_c(world, tmp_path, fault):
    """As README.md has it. Training took the signal and ended with exit code 0, and the next run began."""
    fault("Ctrl-C in a loop of a shell", "the step is finished and saved, and no further run begins")
    argv = arguments(world, tmp_path / "a", "run.steps=1000", "data.workers=1")
    command = 'for seed in 0 1; do "$0" train_grpo.py "$@" run.seed=$seed run.dir=$DIR/$seed; echo next; done'
    with open(tmp_path / "log", "w") as log:
        shell = subprocess.Popen(
            ["bash", "-c", command, sys.executable, *argv],
            cwd=REPO,
            env=os.environ | {"DIR": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        rows = tmp_path / "runs" / "0" / "metrics.jsonl"
        end = time.monotonic() + 300
        while not rows.is_file() or not rows.read_bytes():
            assert shell.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.killpg(shell.pid, signal.SIGINT)
        assert shell.wait(100) == -signal.SIGINT
    told = (tmp_path / "log").read_text()
    assert "stopped after step " in told and "next" not in told and not (tmp_path / "runs" / "1").exists()
    assert newest_step(tmp_path / "runs" / "0") == len(metrics_of(tmp_path / "runs" / "0"))


def test_a_clock_that_jumps(world, tmp_path, undisturbed, fault):
    """Time limits were of the wall clock: set forward, it ended every call of a decoding process (pebble)."""
    fault("wall clock set forward and back", "nothing changes")
    argv = arguments(world, tmp_path / "a", "data.workers=1", "data.cache_dir=''", "data.decode_timeout=100")
    child = start(argv, tmp_path / "log", setup=forked.jumping_clock)
    assert child.wait() == 0, child.text
    assert_same(tmp_path / "a" / "run", undisturbed)
    rows = metrics_of(tmp_path / "a" / "run", machine=True)
    assert all(row[name] >= 0 for row in rows for name in row if name.startswith("time/"))


# ---- several processes ---------------------------------------------------------------------------------------------


def assert_close(rows: list[dict], others: list[dict]) -> None:
    """Metrics that differ by rounding alone."""
    for ours, theirs in zip(rows, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_one_rank_gets_a_far_longer_video(world, tmp_path, fault):
    fault("one rank gets a 10 times longer video", "the other one waits; the same as in one process")
    data = write_data(world, tmp_path / "data", 8, bad={})
    longest = tmp_path / "data" / "videos" / f"{batch_indices(8, 4, 1, 0)[3]}.mp4"  # the second process's, in step 2
    longest.unlink()
    write_clip(longest, grey(i % 256 for i in range(400)), fps=2)
    names = (f"data.train={data}", "data.out_of_clip=clamp", "run.steps=3", "video.total_pixels=100000000")
    for folder, launched in (("one", False), ("two", True)):
        argv = arguments(world, tmp_path / folder, *names)
        children = start_all("cpu2.yaml", argv, tmp_path / folder) if launched else [start(argv, tmp_path / "log")]
        assert [child.wait() for child in children] == [0] * len(children), children[-1].text
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert_close(metrics_of(one), metrics_of(two))
    tokens = [row["tokens/video"] for row in metrics_of(one)]
    assert max(tokens) > 2.5 * min(tokens)


@pytest.mark.parametrize("num_good", [6, 3])
def test_one_rank_without_a_usable_sample(world, tmp_path, fault, num_good):
    """With six left of eight, others stand in for its two; with three, nothing does for one of four."""
    if num_good == 6:
        fault("one rank without a usable sample", "others stand in, with their own labels")
    else:
        fault("one rank without a usable sample, nothing left", "all processes end with the same error")
    order = batch_indices(8, 4, 0, 0)[::-1]  # from the second process's on
    order += [i for i in range(8) if i not in order]
    data = write_data(world, tmp_path / "data", 8, bad=dict.fromkeys(order[: 8 - num_good], b"not a video"))
    argv = arguments(world, tmp_path / "a", f"data.train={data}", "data.max_bad_share=1", "run.steps=2")
    children = start_all("cpu2.yaml", argv, tmp_path / "log")
    assert [child.wait() for child in children] == [0 if num_good == 6 else 1] * 2, children[-1].text
    if num_good == 6:
        assert sum(row["data/num_replaced"] for row in metrics_of(tmp_path / "a" / "run")) >= 2
    else:
        assert all("nothing was left to stand in for one of them" in child.text for child in children)


@pytest.mark.parametrize("kind", ["killed", "stopped", "hangs"])
def test_one_rank_does_not_arrive(world, tmp_path, fault, kind):
    fault(f"one rank {kind}", "the other one names it and its phase, and ends within run.timeout")
    argv = arguments(world, tmp_path / "a", "run.timeout=30")
    children = start_all("cpu2.yaml", argv, tmp_path / "log", Fault(kind, "rollout", 2, rank=1))
    assert children[0].wait() == 1
    children[1].kill()
    told = [line for line in children[0].text.splitlines() if "error: rank 0 has waited for " in line][-1]
    expected = "has not arrived, it is" if kind == "hangs" else "gives no sign of life, it was"
    assert f"in phase step of step 2: rank 1 {expected} in phase " in told
    if kind == "hangs":
        assert "in phase rollout of step 2 for " in told
    assert newest_step(tmp_path / "a" / "run") == 1


def test_a_loss_that_is_not_finite_on_one_rank(world, tmp_path, undisturbed, fault):
    """Both skip the update; after two in a row they end, and the batch stands in a file."""
    fault("loss not finite on one rank", "both skip the update; after run.max_skipped the batch is written down")
    argv = arguments(world, tmp_path / "a", "run.max_skipped=2")
    setup = partial(forked.loss_times, torch.nan, 1, 3)
    children = start_all("cpu2.yaml", argv, tmp_path / "log", setup=setup)
    assert [child.wait() for child in children] == [1, 1]
    run = tmp_path / "a" / "run"
    path, told = run / "not_finite.json", children[0].text
    assert f"error: 2 updates in a row had no finite gradient (run.max_skipped); the batch is in {path}" in told
    rows = metrics_of(run)
    assert [row["update/num_skipped"] for row in rows] == [0, 0, 1, 1] and "grad_norm" not in rows[3]
    assert_close(rows[:2], metrics_of(undisturbed)[:2])
    content = json.loads(path.read_text())
    assert content["step"] == 4 and content["not_finite"][0].startswith("rank 0: gradient of ")
    assert "rank 1: loss nan in pass 0" in content["not_finite"]
    assert [row["group"] for row in content["batch"]] == [0, 1, 2, 3]
    assert all({"id", "completions", "rewards", "advantages"} <= row.keys() for row in content["batch"])


def test_a_first_gradient_that_is_huge_on_one_rank(world, tmp_path, fault):
    """The limit's own default; the row of the step is there, and no checkpoint."""
    fault("a huge gradient in the first update, on one rank", "both end before a checkpoint is saved, one says why")
    argv = arguments(world, tmp_path / "a")
    children = start_all("cpu2.yaml", argv, tmp_path / "log", setup=partial(forked.loss_times, 1e9, 1, 1))
    assert [child.wait() for child in children] == [1, 1]
    told = [child.text.count("error: the first update has a gradient norm of ") for child in children]
    assert told == [1, 0] and "above run.max_first_grad_norm=10000 " in children[0].text
    assert len(metrics_of(tmp_path / "a" / "run")) == 1 and newest_step(tmp_path / "a" / "run") == 0


# ---- under a launcher ----------------------------------------------------------------------------------------------


@pytest.fixture
def launched(world, tmp_path) -> Iterator[tuple[subprocess.Popen, dict[int, int], Path]]:
    """`accelerate launch` of two processes in their third step: the launcher, its processes by rank, the run folder."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu2.yaml"]
    command = [*launcher, "train_grpo.py", *arguments(world, tmp_path / "a", "run.steps=1000", "run.timeout=60")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}
    how = {"cwd": REPO, "env": environment, "stderr": subprocess.STDOUT}
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, **how) as process:
        rows = tmp_path / "a" / "run" / "metrics.jsonl"
        end = time.monotonic() + 300
        while not rows.is_file() or rows.read_bytes().count(b"\n") < 2:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {}
        for pid in map(int, children):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
        assert sorted(ranks) == [0, 1]
        yield process, ranks, tmp_path / "a" / "run"
        process.kill()


def is_there(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_signal_to_the_launcher(world, tmp_path, fault, launched):
    """The checkpoint of two processes goes on with one."""
    fault("SIGTERM to the launcher of two processes", "a complete checkpoint, no process left; one goes on alone")
    process, ranks, run = launched
    process.send_signal(signal.SIGTERM)
    process.wait(200)
    assert not any(map(is_there, ranks.values()))
    told = (tmp_path / "log").read_text()
    stopped = next(line for line in told.splitlines() if line.startswith("stopped after step "))
    step = int(stopped.split()[3])
    assert newest_step(run) == step and len(metrics_of(run)) == step
    assert "accelerate.commands.launch --config_file configs/accelerate/cpu2.yaml train_grpo.py" in stopped
    argv = arguments(world, tmp_path / "a", "run.steps=1000", "run.timeout=60")
    told = resume([*argv, f"run.steps={step + 1}"], tmp_path / "resumed.log")
    assert "going on with 1 processes" in told and len(metrics_of(run)) == step + 1


def test_a_rank_killed_under_the_launcher(tmp_path, fault, launched):
    fault("one rank killed, under the launcher", "the other one ends too, the message has its number")
    process, ranks, run = launched
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(200) != 0
    assert not any(map(is_there, ranks.values()))
    told = (tmp_path / "log").read_text()
    assert "error: rank 0 has waited for " in told and "rank 1 gives no sign of life" in told
    assert newest_step(run) >= 1


# ---- sharded weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu2_zero3.yaml"])
def test_killed_with_sharded_weights(world, tmp_path, fault, name):
    """Two processes, one of them killed in the third update: resumed, equal to 1e-6."""
    fault(f"SIGKILL under {name}", "resumed, the same to 1e-6; one process alone is refused")
    if not (REPO / "configs" / "accelerate" / name).is_file():
        pytest.skip(f"configs/accelerate/{name} is not there")
    for folder, strike in (("whole", None), ("parts", Fault("killed", "update", 3, rank=1))):
        argv = arguments(world, tmp_path / folder, "run.steps=4", "run.timeout=60")
        children = start_all(name, argv, tmp_path / folder, strike)
        codes = [child.wait() for child in children]
        assert codes == ([0, 0] if strike is None else [1, -signal.SIGKILL]), children[0].text
    run, whole = tmp_path / "parts" / "run", tmp_path / "whole" / "run"
    assert newest_step(run) == 2
    cfg, assumed = config.load(GrpoConfig, argv[1:]), PlanConfig(engine=str(REPO / "configs" / "accelerate" / name))
    size = folder_size(newest_whole(run / "checkpoints")[0])
    assert plan.plan(cfg, assumed).longest.checkpoint == pytest.approx(size, rel=0.02)
    children = start_all(name, [*argv, "--resume"], tmp_path / "parts")
    assert [child.wait() for child in children] == [0, 0], children[0].text
    for ours, theirs in zip(metrics_of(run), metrics_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-6) for key in theirs)
    child = start([*argv, "--resume"], tmp_path / "one.log")
    assert child.wait() == 1 and "differs in sharding" in child.text
