"""Imports point one way: the table of who may import whom, no file that hides a package, and packages to do without."""

import ast
import importlib
import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

CORE = {"config", "data", "records", "prompts", "loader", "policy", "rollout", "rewards", "reward_functions", "grpo"}
CORE |= {"pretrained", "run", "engine", "optim", "selfcheck", "signals", "clock", "arguments", "checkpoint"}
MAY_IMPORT = {
    "train_grpo": CORE | {"eval", "plan", "groups", "progress"},
    "groups": {"config", "grpo", "reward_functions", "rewards", "rollout"},
    "progress": {"config", "groups", "grpo", "prompts", "records", "rewards", "run", "timelines"},
    "clock": set(),
    "train_sft": CORE - {"rollout", "reward_functions", "grpo"} | {"eval", "plan"},
    "select_data": CORE | {"batches", "environment", "scores", "selection", "video", "workers"},
    "batches": {"records", "run"},
    "scores": {"loader", "pretrained", "records", "run"},
    "selection": {"grpo"},
    "eval": CORE - {"grpo"}
    | {"environment", "video", "workers", "batches", "blind", "metrics", "compare", "plain", "splits"},
    "blind": {"data", "metrics", "records"},
    "splits": {"records"},
    "metrics": {"plain", "rewards"},
    "plain": {"rewards"},
    "compare": {"metrics", "data", "settings"},
    "convert": {"records", "sources"},
    "sources": {"records"},
    "plan": {"config", "costs", "data", "dryrun", "engine", "lengths", "policy", "pretrained", "prompts"}
    | {"records", "video"},
    "costs": {"config", "dryrun", "engine", "lengths", "optim", "policy", "prompts", "video"},
    "dryrun": {"attention", "config", "policy", "pretrained", "prompts", "rollout"},
    "lengths": {"manifest", "prompts", "readers", "records", "video"},
    "report": {"arguments", "blind", "checkpoint", "compare", "curves", "metrics", "samples", "settings"},
    "samples": {"readers", "rewards", "video"},
    "curves": set(),
    "timelines": {"rewards"},
    "tiny": {"data", "video"},
    "arguments": {"blind", "config", "metrics", "plain", "settings"},
    "config": {"settings"},
    "settings": set(),
    "rewards": set(),
    "reward_functions": {"rewards"},
    "grpo": set(),
    "run": {"checkpoint", "engine", "environment", "settings", "signals"},
    "engine": {"checkpoint", "watchdog"},
    "checkpoint": set(),
    "watchdog": set(),
    "signals": set(),
    "environment": set(),
    "selfcheck": CORE & {"loader", "policy", "prompts", "records", "rollout", "run"}
    | {"attention", "environment", "kernelcheck", "settings", "video", "workers"},
    "kernelcheck": {"attention"},
    "optim": set(),
    "data": {"records", "manifest", "readers"},
    "records": set(),
    "manifest": {"records", "video", "workers"},
    "prompts": {"config", "records", "video", "cache"},
    "loader": {"config", "data", "records", "prompts", "video", "workers"},
    "workers": set(),
    "video": {"cache", "readers"},
    "readers": set(),
    "cache": set(),
    "attention": set(),
    "policy": {"attention", "config", "prompts"},
    "pretrained": {"arguments", "checkpoint", "config", "policy"},
    "rollout": {"attention", "config", "prompts", "policy", "grpo"},
    "jobs": set(),
    "seeds": {"metrics"},
    "arms": {"config", "data", "jobs", "metrics", "records", "rewards"},
}
FILES = sorted(REPO.glob("*.py"))
OURS = {path.stem for path in FILES}
TOPS = {"demo", "ablations", "tiny"}  # nothing imports them
FREE = {"demo", "ablations"}  # they may import anything, and write the tiny world


WITHOUT_A_RUN = """
import importlib, pathlib, sys
import numpy as np

sys.modules |= dict.fromkeys(("omegaconf", "decord", "av", "diskcache", "pebble", "deepspeed"))  # as if not installed
for name in sys.argv[2:]:
    importlib.import_module(name)

import config, pretrained, prompts, rollout, tiny, video
from records import Sample

folder = pathlib.Path(sys.argv[1])
tiny.write_model(folder, seed=0, family="qwen2_5_vl")
policy = pretrained.load_policy(config.ModelConfig(path=str(folder)))
spec, wording = config.VideoConfig(), config.PromptConfig()
builder = prompts.PromptBuilder(policy.tokenizer, video.read_geometry(str(folder)), spec, wording, None)
frames = video.Frames(np.zeros((4, 3, 28, 56), np.uint8), np.arange(4) / 2, 1.0, 0)
prompt = builder.prompt(Sample("a", "tvg", "", "When is the red square visible?"), frames)
rollout.generate(policy, [prompt], policy.embed_each([prompt]), 2, 3, 1)
"""


def imports(path: Path) -> set[str]:
    """First names of the modules a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import, but there is no package"
            names.add(node.module.partition(".")[0])
    return names


def test_the_imports_are_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import os.path, json as j\nfrom a.b import c\ndef f():\n    import late\n")
    assert imports(path) == {"os", "json", "a", "late"}
    assert {"data", "policy", "run", "torch"} <= imports(REPO / "train_grpo.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_what_the_table_allows(path):
    if path.stem in FREE:
        return
    assert path.stem in MAY_IMPORT, f"{path.name} is not in the table"
    assert imports(path) & OURS <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_imports_the_tiny_world_or_what_is_run_with_it(path):
    """The embedded default is ordinary files; only what writes them knows where they come from."""
    allowed = {"tiny"} if path.stem in FREE else set()
    assert imports(path) & TOPS <= allowed


def test_there_is_no_circle():
    edges = {path.stem: imports(path) & OURS for path in FILES}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


def test_rewards_and_grpo_stand_alone():
    assert imports(REPO / "rewards.py") <= sys.stdlib_module_names
    assert imports(REPO / "grpo.py") == {"torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_hides_a_module(path, monkeypatch):
    """A script's folder comes first on sys.path: `select.py` or `datasets.py` would be found in place of theirs."""
    assert path.stem not in sys.stdlib_module_names
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() not in (REPO, REPO / "tests")])
    importlib.invalidate_caches()
    found = importlib.machinery.PathFinder.find_spec(path.stem, sys.path)
    assert found is None, f"{path.name} hides {found.origin}"


def test_a_program_without_a_run_needs_no_package_of_runs_and_files(tmp_path):
    """A benchmark on a machine that has only torch and Hugging Face's packages imports us, and samples."""
    command = [sys.executable, "-c", WITHOUT_A_RUN, str(tmp_path / "model"), *sorted(OURS)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_folder_is_plain():
    """No package: a file is imported by its own name."""
    assert not list(REPO.glob("*/__init__.py")) and not (REPO / "__init__.py").exists()
