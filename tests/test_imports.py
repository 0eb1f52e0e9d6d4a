"""Imports point down only, in three storeys; no file hides a package; and what a program can do without."""

import ast
import importlib
import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

GROUND = {"records", "video", "model", "runtime"}
CORE = {"groups", "grpo", "rewards", "answers", "reward_functions", "rollout", "policy", "data", "prompts", "config"}
CORE |= {"step_log"}
AROUND = {"metrics", "selection", "preflight", "page"}
COMMANDS = {"train_grpo", "train_sft", "select_data", "eval", "convert", "report", "tiny"}
TOP = {"experiments"}  # stands above the commands; nothing imports it
MAY_IMPORT = {  # the rooms that a storey's files may import, beside their own room
    **dict.fromkeys(GROUND, GROUND | {"config"}),
    **dict.fromkeys(CORE, CORE | GROUND),
    **dict.fromkeys(AROUND, AROUND | CORE | GROUND),
    **dict.fromkeys(COMMANDS, AROUND | CORE | GROUND),
    **dict.fromkeys(TOP, COMMANDS | AROUND | CORE | GROUND),
    "config": {"records"},  # for the table of tasks, which imports nothing
    "tiny": {"data", "video"},  # ordinary files are all that it writes, so nothing else knows of it
}
PACKAGES = sorted(path.parent for path in REPO.glob("*/__init__.py"))
FILES = sorted([*REPO.glob("*.py"), *(file for folder in PACKAGES for file in folder.glob("*.py"))])
ROOMS = {path.stem for path in REPO.glob("*.py")} | {folder.name for folder in PACKAGES}


WITHOUT_A_RUN = """
import importlib, pathlib, sys
import numpy as np

sys.modules |= dict.fromkeys(("omegaconf", "decord", "av", "diskcache", "pebble", "deepspeed"))  # as if not installed
for name in sys.argv[2:]:
    importlib.import_module(name)

import config, policy, prompts, rollout, tiny
from records.record import Sample
from video.budget import read_geometry
from video.frames import Frames, to_video

folder = pathlib.Path(sys.argv[1])
tiny.write_model(folder, seed=0, family="qwen2_5_vl")
policy = policy.load_policy(config.ModelConfig(path=str(folder)))
builder = prompts.PromptBuilder(policy.tokenizer, config.PromptConfig())
frames = Frames(np.zeros((4, 3, 28, 56), np.uint8), np.arange(4) / 2, 1.0, 0)
video = to_video(frames, read_geometry(str(folder)))
prompt = builder(Sample("a", "tvg", "", "When is the red square visible?"), video)
rollout.generate(policy, [prompt], policy.embed_each([prompt]), config.RolloutConfig(2, 1.0, 3, 1))
"""


def room_of(path: Path) -> str:
    return path.stem if path.parent == REPO else path.parent.name


def module_of(path: Path) -> str:
    return path.stem if path.parent == REPO else f"{path.parent.name}.{path.stem}".removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, inside functions too; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rooms_in(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & ROOMS


def test_the_imports_are_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import os.path, json as j\nfrom a.b import c\ndef f():\n    import late\n")
    assert imports(path) == {"os.path", "json", "a.b", "a.b.c", "late"}
    assert {"config", "data", "policy", "runtime", "metrics"} <= rooms_in(imports(REPO / "train_grpo.py"))


def test_every_room_has_a_storey():
    assert GROUND | CORE | AROUND | COMMANDS | TOP == ROOMS == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    """So no command imports another one, and a file of the ground floor knows nothing of GRPO."""
    room = room_of(path)
    assert rooms_in(imports(path)) - {room} <= MAY_IMPORT[room]


def test_there_is_no_circle():
    names = {module_of(path): path for path in FILES}
    edges = {name: (imports(path) & names.keys()) - {name} for name, path in names.items()}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


def test_answers_rewards_and_grpo_stand_alone():
    """So they can be read, tested and taken elsewhere by themselves."""
    ours = {name: imports(REPO / f"{name}.py") for name in ("answers", "rewards", "grpo")}
    assert not rooms_in(ours["answers"]) and {name.partition(".")[0] for name in ours["grpo"]} == {"torch", "config"}
    assert rooms_in(ours["rewards"]) == {"answers", "records"} and "records.tasks" in ours["rewards"]
    assert imports(REPO / "records" / "tasks.py") == {"dataclasses", "dataclasses.dataclass"}


def test_every_package_says_what_is_in_it_and_hands_nothing_on():
    """One docstring: a folder without an `__init__.py` loses to any installed package of its name."""
    for folder in PACKAGES:
        (only,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(only, ast.Expr) and isinstance(only.value.value, str), folder.name
    assert not list((REPO / "tests").rglob("__init__.py"))  # tests/model/__init__.py would hide the package `model`


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_no_room_hides_a_module(name, monkeypatch):
    """A script's folder comes first on sys.path: `select.py` or `datasets/` would be found in place of theirs."""
    assert name not in sys.stdlib_module_names
    monkeypatch.setattr(sys, "path", [p for p in sys.path if REPO not in (Path(p or "."), *Path(p or ".").parents)])
    importlib.invalidate_caches()
    found = importlib.machinery.PathFinder.find_spec(name, sys.path)
    assert found is None or found.origin is None, f"{name} hides {found.origin}"


PUBLIC = {  # what DESIGN.md lets other code rely on
    "rewards": "temporal_iou temporal_iop parse_answer parse_choice parse_segments score Reward",
    "grpo": "group_advantages kl_estimate policy_loss group_stats",
    "config": "load",
    "data": "read_samples",
    "policy": "rope_positions packed_logps",
    "rollout": "generate",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_where_others_look_for_them(name):
    module = importlib.import_module(name)
    assert not [function for function in PUBLIC[name].split() if not callable(getattr(module, function))]


def test_a_program_without_a_run_needs_no_package_of_runs_and_files(tmp_path):
    """A benchmark on a machine that has only torch and Hugging Face's packages imports us, and samples."""
    modules = sorted(map(module_of, FILES))
    command = [sys.executable, "-c", WITHOUT_A_RUN, str(tmp_path / "model"), *modules]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
