"""The notebooks: how they are stored, and that they run from top to bottom and say what is true."""

import ast
import importlib
import json
import re
import runpy
from textwrap import dedent
from types import ModuleType

import nbformat
import pytest
from conftest import REPO
from test_ablations import write_test

from experiments import ablations

FILES = sorted((REPO / "notebooks").glob("*.ipynb"))
OURS = {path.stem for path in REPO.glob("*.py")} | {path.parent.name for path in REPO.glob("*/__init__.py")}
MACHINE_PATH = re.compile(r"(?<![\w.<])/(?:tmp|home|root|work|mnt|data|opt|usr|var|private|Users)/|[A-Z]:\\\\")
MAX_OUTPUT, MAX_FILE = 200_000, 600_000  # bytes

execute = runpy.run_path(str(REPO / "notebooks" / "store.py"))["execute"]


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(notebook) -> list[str]:
    """Everything in it that is not a picture."""
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        texts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
        texts.append(output.get("text", ""))
    return texts


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


# ---- as they are stored ----------------------------------------------------------------------------------------------


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def stored(request):
    return nbformat.read(request.param, as_version=4)


def test_both_are_there():
    assert [path.stem for path in FILES] == ["ablations", "one_grpo_step"]


def test_stored_after_one_run_from_top_to_bottom(stored):
    nbformat.validate(stored)
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in cells) == 1
    assert pictures(stored) > 0


def test_outputs_are_small_and_without_errors_and_machine_paths(stored):
    outputs = [output for cell in code_cells(stored) for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert max(len(json.dumps(output)) for output in outputs) < MAX_OUTPUT
    assert len(nbformat.writes(stored)) < MAX_FILE
    assert not [found for text in texts_of(stored) for found in MACHINE_PATH.findall(text)]


def test_what_a_machine_path_is():
    found = ["open /tmp/x", "'/home/me/a.py'", "/Users/x/", "C:\\\\Users"]
    assert all(map(MACHINE_PATH.search, found))
    assert not any(map(MACHINE_PATH.search, ("runs/demo/base", "</think>", "configs/data/x", "reward/total")))


def test_they_find_the_repository_alike():
    first = {code_cells(nbformat.read(path, as_version=4))[0].source for path in FILES}
    assert len(first) == 1 and "sys.path.insert(0, " in first.pop()


def test_what_they_use_of_ours_exists(stored):
    """Every name imported from a module of the repository, and every `module.name`."""
    lines = [line for cell in code_cells(stored) for line in cell.source.splitlines() if not line.startswith("%")]
    names, used = {}, set()  # what each name stands for, and what is taken of it
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] in OURS]
            names |= {name: importlib.import_module(name) for name in ours}
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OURS:
            for alias in node.names:
                try:
                    names[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    names[alias.name] = getattr(importlib.import_module(node.module), alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((node.value.id, node.attr))
    of_ours = [(name, attribute) for name, attribute in used if isinstance(names.get(name), ModuleType)]
    assert len(names) > 5 and of_ours
    assert not [pair for pair in sorted(of_ours) if not hasattr(names[pair[0]], pair[1])]


# ---- run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """`execute` by name on the small world; it must leave the world and the repository as they were."""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folders = (world, REPO, REPO / "notebooks")

    def execute_one(name: str, parameters: str, checks: str, folder):
        before = [sorted(path for path in f.glob("*") if path.name != "__pycache__") for f in folders]
        parameters = f"WORLD = Path({str(world)!r})\n{parameters}"
        notebook = execute(REPO / "notebooks" / f"{name}.ipynb", parameters, checks, folder)
        assert [sorted(path for path in f.glob("*") if path.name != "__pycache__") for f in folders] == before
        return notebook

    return execute_one


@pytest.mark.slow
def test_one_grpo_step(run):
    """From notebooks/, with the stand-in for the base. What must hold everywhere, the notebook itself asserts."""
    parameters = "BASE, BASE_STEPS, NUM_VIDEOS = Path('nowhere'), 25, 4"
    checks = """
        assert gap_BT.shape == (32, mask_BT.shape[1]) and gap_BT.max() < 1e-4
        assert advantages_PG.shape == (4, 8) and advantages_PG.sum(1).abs().max() < 1e-4
        assert advantages_PG.abs().max() > 0 and 0 < rewards_PG.mean() < 1
        assert good > bad and 0 < grad_norm < 1e3
        assert abs(row["loss"] - loss) < 1e-4 and abs(row["grad_norm"] - grad_norm) < 1e-3 * grad_norm
        assert changed > 0 and k3_BT[again.mask_BT].mean() > 0
    """
    notebook = run("one_grpo_step", parameters, dedent(checks), REPO / "notebooks")
    assert pictures(notebook) == 5


@pytest.mark.slow
def test_ablations_with_results(run, sft_run, tmp_path):
    """From the repository root, from a base that is there; two of the arms were run, with two seeds."""
    root = tmp_path / "results"
    for arm, seed, right in (("grpo", 0, 2), ("grpo", 1, 3), ("beta_0.04", 0, 3), ("beta_0.04", 1, 1)):
        write_test(root, arm, seed, right)
    entry = ablations.summarise(ablations.QUESTIONS["group"], root, [0, 1])
    results = {"seeds": [0, 1], "quick": False, "commits": ["abc"], "questions": {"group": entry}}
    (root / "results.json").write_text(json.dumps(results))
    parameters = f"RESULTS = [Path('nowhere'), Path({str(root)!r})]\n"
    parameters += f"BASE, NUM_VIDEOS, STEPS = Path({str(sft_run / 'final')!r}), 4, 3"
    notebook = run("ablations", parameters, "assert base == BASE and results['seeds'] == [0, 1]", REPO)
    text = "\n".join(texts_of(notebook))
    assert pictures(notebook) == 4  # differences, the question, curves, live curves
    assert "| G = 8, no KL | 62.5 ± 17.7 |" in text and "| KL 0.04 | 50.0 ± 35.4 |" in text


@pytest.mark.slow
def test_ablations_without_results(run):
    """From notebooks/: it names the commands and goes on. The KL is measured where its weight is next to nothing."""
    parameters = "RESULTS, BASE, BASE_STEPS, NUM_VIDEOS, STEPS = [], Path('nowhere'), 25, 4, 4"
    checks = """
        rows = {name: read_rows(arms.folder(folder, name, 0) / "metrics.jsonl") for name in BETAS}
        assert all(len(of_one) == STEPS and abs(of_one[0].get("kl", 0)) < 1e-5 for of_one in rows.values())
        assert max(row.get("kl", 0) for row in rows["no KL"]) > 1e-4
        assert max(row.get("logp_gap/max", 0) for of_one in rows.values() for row in of_one) < 1e-4
    """
    notebook = run("ablations", parameters, dedent(checks), REPO / "notebooks")
    assert pictures(notebook) == 1
    assert "`make ablations` makes them" in "\n".join(texts_of(notebook))
