"""Command lines: every program reads its arguments before it imports torch, and says what is wrong with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from config import GrpoConfig, load
from runtime.arguments import from_command_line, user_errors

START = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
"""
CONFIGURED = ("train_grpo.py", "train_sft.py", "select_data.py", "eval.py run")
OTHERS = {  # a command line with a misspelt option, and the end of what is said of it
    "eval.py score": ("a.jsonl --out b.json --anwser tagged", "unrecognized arguments: --anwser tagged"),
    "eval.py score a.jsonl": ("b.jsonl --out c.json", "unrecognized arguments: b.jsonl"),
    "eval.py compare": ("a.json --alow prompt", "unrecognized arguments: --alow prompt"),
    "data.py check": ("a.jsonl --vidoes b", "unrecognized arguments: --vidoes b"),
    "metrics/blind.py": ("a b --floor c", "unrecognized arguments: --floor c"),
    "convert.py": ("mmvu --annotations a --out b.jsonl --no-repar", "unrecognized arguments: --no-repar"),
    "report.py": ("a --wacht 10", "unrecognized arguments: --wacht 10"),
    "model/folder.py merge": ("a b --otu c", "unrecognized arguments: --otu c"),
    "tiny.py": ("--sede 1", "unrecognized arguments: --sede 1"),
    "benchmarks/gpu.py": ("--shirnk", "unrecognized arguments: --shirnk"),
    "experiments/demo.py": ("--sede 1", "unrecognized arguments: --sede 1"),
    "experiments/ablations.py": ("--qiuck", "unrecognized arguments: --qiuck"),
}


def started(command: str) -> subprocess.CompletedProcess:
    """What a program does that is to end before it imports torch."""
    return subprocess.run([sys.executable, "-c", START, *command.split()], cwd=REPO, capture_output=True, text=True)


# ---- before torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [*CONFIGURED, *OTHERS])
def test_help_needs_no_torch(program):
    done = started(f"{program} --help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")


@pytest.mark.parametrize("program", CONFIGURED)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run.sede=1", "override 'run.sede=1': unknown key run.sede; did you mean run.seed?"),
        ("run.seed=x", "override 'run.seed=x': run.seed must be int, got 'x' (str)"),
        ("--config nowhere.yaml", "config file nowhere.yaml not found"),
        ("--config pyproject.toml", "pyproject.toml: not valid YAML: "),
    ],
)
def test_a_wrong_configuration_is_told_before_torch(program, words, message):
    done = started(f"{program} {words}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("program", ["train_grpo.py", "train_sft.py"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan.tflops=3", "override 'plan.tflops=3' is for --plan"),
        ("--plan plan.tflop=3", "override 'plan.tflop=3': unknown key plan.tflop; did you mean plan.tflops?"),
    ],
)
def test_a_wrong_plan_is_told_before_torch(program, words, message):
    done = started(f"{program} {words}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


def test_a_plan_for_a_launch_file_that_is_not_there_is_told_before_torch():
    for words in ("--plan nowhere.yaml", "--plan plan.engine=nowhere.yaml"):
        done = started(f"train_grpo.py {words}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: accelerate configuration nowhere.yaml not found\n"


@pytest.mark.parametrize("name", ["charades_sta", "activitynet", "nextgqa"])
def test_a_floor_whose_file_is_not_there_is_told_before_torch(tmp_path, name):
    (tmp_path / "configs").symlink_to(REPO / "configs")
    command = [sys.executable, "-c", START, str(REPO / "eval.py"), "run", "--config", f"configs/eval_{name}.yaml"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: data.floor names ") and "`data.floor=`" in done.stderr
    assert "python convert.py SOURCE --annotations FILES --out " in done.stderr


@pytest.mark.parametrize("program", OTHERS)
def test_a_misspelt_option_is_told_before_torch(program):
    words, message = OTHERS[program]
    done = started(f"{program} {words}")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(f": error: {message}\n")


# ---- what is read --------------------------------------------------------------------------------------------------


def test_user_errors_are_one_line_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match=r"^error: a key$"), user_errors():
        raise ValueError("a key")
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


def test_the_command_line_takes_files_flags_and_overrides_in_any_order(tmp_path):
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    Path(a).write_text("run: {seed: 1, steps: 7}\n")
    Path(b).write_text("run: {seed: 2}\n")
    for argv in (
        ["--config", a, b, "loss.beta=0"],
        ["--config", a, "--config", b, "loss.beta=0"],
        ["loss.beta=0", "--config", a, b],
    ):
        cfg, resume, planned = from_command_line(GrpoConfig, argv, "doc", "configs/tiny.yaml")
        assert (cfg.run.seed, cfg.run.steps, cfg.loss.beta, resume, planned) == (2, 7, 0.0, False, None)
    cfg, resume, _ = from_command_line(
        GrpoConfig, ["--config", a, "loss.beta=0", "--resume", "run.seed=9"], "doc", "configs/tiny.yaml"
    )
    assert (cfg.run.seed, cfg.loss.beta, resume) == (9, 0.0, True)
    default = load(GrpoConfig, [str(REPO / "configs/tiny.yaml")])
    assert from_command_line(GrpoConfig, [], "doc", "configs/tiny.yaml") == (default, False, None)
