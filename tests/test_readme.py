"""README.md and docs/: what they tell to type runs or loads, what they name is there, and every metric is defined."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml
from conftest import REPO, make_cfg, read_jsonl, sft_cfg

import config
import train_grpo
import train_sft
from config import EvalRunConfig, GrpoConfig, SelectConfig, SftConfig
from model.attention import make_span, shared_prefix_attention
from preflight.costs import read_launch
from records.files import read_samples
from records.record import to_sample
from runtime.arguments import PlanConfig, from_command_line

README, METRICS, LOG = REPO / "README.md", REPO / "docs" / "metrics.md", REPO / "docs" / "LOG.md"
TEXTS = [README, *(path for path in sorted((REPO / "docs").glob("*.md")) if path != LOG)]  # the log is history
FOLDERS = ["benchmarks", "configs", "docs", "notebooks", "requirements", "tests"]  # those that are no packages
FOLDERS += [path.parent.name for path in REPO.glob("*/__init__.py")]
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
CONFIGS = {"train_grpo": GrpoConfig, "train_sft": SftConfig, "select_data": SelectConfig, "eval run": EvalRunConfig}
SHELL = {"[", "export"}  # lines that are for the shell alone
OTHERS = {"vllm", "lmms_eval", "tensorboard"}  # programs that are not ours
OF_A_RUN = ("$", "run.dir=", "data.cache_dir=", "data.manifest=", "--resume")  # what a plan does without
NO_FILES = {
    "file.py",
    "lr_1e-3.yaml",
    "my_rewards.py",
    "config.yaml",
    "reward_error.txt",
}  # the reader's, a run folder's


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks_of(path: Path, text: str) -> list[Block]:
    return [
        Block(path, text[: found.start()].count("\n") + 1, found[2], dedent(found[3])) for found in FENCE.finditer(text)
    ]


BLOCKS = [block for path in TEXTS for block in blocks_of(path, path.read_text(encoding="utf-8"))]
TINY = [block for block in BLOCKS if block.kind == "bash tiny"]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command of a bash block; those of `bash -c '...'` in place of it.

    >>> commands_of("python a.py x=1 \\\\\\n    y=2  # why\\nsrun bash -c 'python b.py'\\n")
    [['python', 'a.py', 'x=1', 'y=2'], ['python', 'b.py']]
    """
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable for this command
            words = words[1:]
        inner = [words[i + 2] for i in range(len(words) - 2) if words[i : i + 2] == ["bash", "-c"]]
        found += commands_of(inner[0]) if inner else [words] if words else []
    return found


COMMANDS = [
    pytest.param(words, id=f"{block}: {' '.join(words)[:70]}")
    for block in BLOCKS
    if block.kind == "bash"
    for words in commands_of(block.text)
]
TRAINING = [param for param in COMMANDS if {"train_grpo.py", "train_sft.py"} & set(param.values[0])]


@pytest.fixture(scope="module")
def clone(world, tmp_path_factory) -> Path:
    """Like a fresh clone after `python tiny.py`, with a smaller world; and annotations, as convert.py makes them."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    folder.mkdir()
    for path in [*filter(Path.is_file, REPO.iterdir()), *(REPO / name for name in FOLDERS if name != "configs")]:
        (folder / path.name).symlink_to(path)
    shutil.copytree(REPO / "configs", folder / "configs")
    shutil.copytree(world, folder / "tiny_world")
    (folder / "data").mkdir()
    record = {"id": "0", "task": "tvg", "video": "0.mp4", "duration": 30.0, "question": "q", "segments": [[1, 2]]}
    lines = (json.dumps(record | {"id": str(i), "duration": 20.0 + i}) + "\n" for i in range(4))
    (folder / "data" / "charades_sta_train.jsonl").write_text("".join(lines))
    return folder


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """The program of ours that a command calls, and its arguments. They are ("", []) where it calls no such program.

    >>> script_of(["python", "-m", "metrics.blind", "a.jsonl"])
    ('metrics/blind.py', ['a.jsonl'])
    """
    if words[:2] == ["python", "-m"]:
        script = f"{words[2].replace('.', '/')}.py"
        return (script, words[3:]) if (REPO / script).is_file() else ("", [])
    places = [i for i, word in enumerate(words) if word.endswith(".py")]
    return (words[places[0]], words[places[0] + 1 :]) if places else ("", [])


# ---- what is to be typed -------------------------------------------------------------------------------------------


def test_blocks_are_found():
    text = "a\n```bash tiny\nls\n```\nb\n1. c\n   ```math\n   x\n   ```\n"
    found = blocks_of(Path("x.md"), text)
    assert [(block.line, block.kind, block.text) for block in found] == [(2, "bash tiny", "ls\n"), (7, "math", "x\n")]
    assert len(TINY) >= 3 and len(COMMANDS) > 20
    assert {block.kind for block in BLOCKS} <= {"", "bash", "bash tiny", "yaml", "json", "math"}


@pytest.mark.slow
@pytest.mark.parametrize("block", TINY, ids=str)
def test_a_tiny_block_runs(clone, block):
    """As typed, in the order of the text, in one folder: later ones go on with what earlier ones wrote."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=clone, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


class Parsed(Exception):
    """In place of what a program does once it has read its arguments."""


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_of_ours_and_loads(clone, words, monkeypatch):
    """The program is there and takes the arguments; the configurations they name load, with their overrides."""
    script, arguments = script_of(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert all("=" in word or word in targets for word in words[1:])
        return
    if not script:
        assert words[0] in SHELL | OTHERS or (words[:2] == ["python", "-m"] and words[2] in OTHERS)
        return
    assert words[0] == "python" or words[:2] == ["accelerate", "launch"]
    monkeypatch.chdir(clone)
    if words[0] == "accelerate":
        assert read_launch(words[words.index("--config_file") + 1]).processes > 1
    name = Path(script).stem
    arguments = [word for word in arguments if not word.startswith("$")]
    if (name if name != "eval" else f"eval {arguments[0]}") in CONFIGS:
        config_class = CONFIGS[name if name != "eval" else "eval run"]
        arguments = arguments[1:] if name == "eval" else arguments
        from_command_line(config_class, arguments, "", "configs/tiny.yaml")
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, argv=None):
        raise Parsed(parse(self, argv))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(clone if words[1] == "-m" else (clone / script).parent)
    with pytest.raises(Parsed):
        runpy.run_path(str(clone / script), run_name="__main__")


@pytest.mark.parametrize("words", TRAINING)
def test_a_training_command_can_be_planned(clone, words, monkeypatch, capsys):
    """With `--plan` in place of training: without weights, videos or a GPU. The records are made up."""
    monkeypatch.chdir(clone)
    script, arguments = script_of(words)
    arguments = [word for word in arguments if not word.startswith(OF_A_RUN)]
    for key, there in {"data.train": "tiny_world/tvg_train.jsonl", "model.path": "tiny_world/model"}.items():
        arguments = [re.sub(f"{key}=runs/.*", f"{key}={there}", word) for word in arguments]  # earlier commands' files
    engine = [words[words.index("--config_file") + 1]] if words[0] == "accelerate" else []
    planned = [] if "--plan" in arguments else ["--plan", *engine]
    {"train_grpo": train_grpo, "train_sft": train_sft}[Path(script).stem].main([*arguments, *planned])
    text = capsys.readouterr().out
    assert "parameters: total" in text and "steps an epoch" in text


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind in ("yaml", "json")], ids=str)
def test_a_piece_of_data_is_what_the_code_reads(block, tmp_path):
    record = {"id": "0", "task": "mcqa", "video": "0.mp4", "question": "q", "options": ["a", "b"], "answer": "A"}
    if block.kind == "json":
        text, decoder = block.text.strip(), json.JSONDecoder()
        while text:
            record, end = decoder.raw_decode(text)
            assert to_sample(record, Path())[0].question
            text = text[end:].lstrip()
    elif "datasets" in (content := yaml.safe_load(block.text)):
        for entry in content["datasets"]:
            path = tmp_path / "data.yaml"
            entry |= {"json_path": "records.jsonl"}
            (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
            path.write_text(yaml.safe_dump({"datasets": [entry]}))
            assert read_samples(str(path), need_videos=False)[0].id == "0"
    else:
        (tmp_path / "a.yaml").write_text(block.text)
        assert config.load(GrpoConfig, [str(tmp_path / "a.yaml")]) != GrpoConfig()


# ---- what is named -------------------------------------------------------------------------------------------------


def words_in_code(path: Path) -> list[str]:
    """What stands between backticks, and not in a block, cut at spaces."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return [word.strip("(),;:") for found in re.findall(r"`([^`\n]+)`", text) for word in found.split()]


def headings_of(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_to_something(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for target in (a or b for a, b in links):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        assert (path.parent / name).exists(), target
        assert not anchor or anchor in headings_of(path.parent / name), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(path):
    """A file is named with its folder. Only those of configs/ may go without, beside others of the same folder."""
    short = {file.name for file in (REPO / "configs").rglob("*")}
    for word in words_in_code(path):
        word = word.partition(":")[0]
        if re.fullmatch(r"[\w./-]+\.(py|ipynb|md|j2|yaml|toml|txt)", word) and word.rpartition("/")[2] not in NO_FILES:
            assert (REPO / word).is_file() or word in short, word
        elif re.fullmatch(r"(\w+/)+", word) and word.partition("/")[0] in FOLDERS:
            assert (REPO / word).is_dir(), word


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_keys_that_are_named_exist(path):
    defaults = [*(kind() for kind in CONFIGS.values())]
    sections = {name for cfg in defaults for name in cfg.__dataclass_fields__} | {"plan"}
    for word in words_in_code(path):
        section, dot, rest = word.partition(".")
        key = re.split("[=:]", rest)[0]
        is_key = re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", key) and key not in ("py", "jsonl", "png")
        if dot and section in sections and is_key:
            holders = [PlanConfig()] if section == "plan" else [getattr(cfg, section, None) for cfg in defaults]
            assert any(hasattr(holder, key.partition(".")[0]) for holder in holders), word


def test_every_folder_and_root_file_stands_in_the_table():
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## Folders") : text.index("| page |")]
    firsts = [
        name
        for row in table.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`([\w./]+)`", row.split("|")[1])
    ]
    root = [path.name for kind in ("*.py", "*.txt", "*.toml", "Makefile") for path in REPO.glob(kind)]
    assert sorted(firsts) == sorted([*root, *(f"{name}/" for name in FOLDERS)])


def test_every_page_stands_in_the_readme():
    linked = re.findall(r"\]\(docs/(\w+\.md)\)", README.read_text(encoding="utf-8"))
    assert set(linked) == {path.name for path in (REPO / "docs").glob("*.md")}


def metric_names() -> list[str]:
    text = METRICS.read_text(encoding="utf-8")
    table = text[text.index("| metric | meaning |") :].partition("\n\n")[0]
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def test_every_metric_is_defined_once(world, taught, tmp_path):
    """A row for what a run writes, and nothing that no run writes."""
    assert len(metric_names()) == len(set(metric_names()))
    data = (f"data.train={world}/mix_train.yaml", f"data.validation={world}/mix_validation.yaml")
    common = (*data, "eval.every=1", "run.steps=1")
    run = train_grpo.train(make_cfg(world, tmp_path, *taught, *common, "loss.truncated=penalise", "data.batch_size=8"))
    sft = train_sft.train(sft_cfg(world, tmp_path, *common, f"run.dir={tmp_path}/sft"))
    written = {name for path in (run.dir, sft.dir) for row in read_jsonl(path / "metrics.jsonl") for name in row}
    written.remove("step")
    patterns = {name: re.compile(re.sub(r"<\w+>", "[^/]+", name)) for name in metric_names()}
    assert not [name for name in written if not any(pattern.fullmatch(name) for pattern in patterns.values())]
    assert not [name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, written))]


# ---- the figure ----------------------------------------------------------------------------------------------------


def test_the_figure_is_what_its_script_draws_and_the_policy_does():
    """Which key a query's output depends on, by the attention that training runs."""
    figure = runpy.run_path(str(REPO / "docs" / "shared_prefix.py"))
    assert (REPO / "docs" / "shared_prefix.svg").read_text(encoding="utf-8") == figure["svg"]()
    num_prompt = figure["NUM_VIDEO"] + figure["NUM_TEXT"]
    span = make_span(0, num_prompt, figure["LENGTHS"], torch.device("cpu"))
    query, key, value = torch.randn(3, 1, 1, span.end, 4, generator=torch.Generator().manual_seed(0))
    module = argparse.Namespace(is_causal=True, training=False)

    def attention(value):
        return shared_prefix_attention(module, query, key, value, None, 0.5, spans=[span])[0]

    moved = torch.autograd.functional.jacobian(attention, value).squeeze()  # query, D, key, D
    sees = moved.abs().sum((1, 3)) > 0
    assert sees.tolist() == [[figure["sees"](q, k) for k in range(span.end)] for q in range(span.end)]
