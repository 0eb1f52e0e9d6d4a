"""What a user types wrong ends with one line, which names the path or the key and says what to do.

Every row is a command line in a folder of its own that holds the tiny world and files with one mistake each; it is run
by the program's own `main`. Mistakes in whole commands that only a process can show are in test_arguments.py; those of
single records, segments and YAML lists are in test_data.py, those of annotations in test_convert.py, those of rewards'
return values in test_reward_functions.py, and those of resumed runs in test_run.py and test_train.py.
"""

import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPO

import config
import convert
import eval as evaluation
import report
import select_data
import tiny
import train_grpo
import train_sft
from model import folder
from preflight.selfcheck import cautions
from records import check
from runtime.engine import check_devices

PROGRAMS = {
    "train_grpo": train_grpo.main,
    "train_sft": train_sft.main,
    "select_data": select_data.main,
    "eval": evaluation.main,
    "data": check.main,
    "convert": convert.main,
    "report": report.main,
    "pretrained": folder.main,
    "tiny": tiny.main,
}
TVG = {"id": "a", "task": "tvg", "video": "train_0.mp4", "duration": 8.0, "question": "when?", "segments": [[1, 2]]}
REWARDS = """
def messages(completions, **columns):
    return [len(completion[0]["content"]) for completion in completions]
def fails(completions, **columns):
    return [1 / len(text[:0]) for text in completions]
def short(completions, **columns):
    return [1.0]
def words(completions, **columns):
    return ["good"] * len(completions)
def old(completions):
    return [0.0] * len(completions)
"""
MODEL = "model.path=tiny_world/model"
FUNCTION = "'rewards.functions={{rewards.py:{}: 1}}'"


@pytest.fixture(scope="module")
def place(world, tmp_path_factory) -> Path:
    """A working folder with the tiny world at its usual place, and files with one mistake each."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny_world").symlink_to(world)
    (folder / "configs").symlink_to(REPO / "configs")
    write_data(folder)
    write_models(folder, world)
    write_runs(folder)
    return folder


def write_data(folder: Path) -> None:
    (folder / "videos").symlink_to(folder / "tiny_world" / "videos")
    texts = {
        "good.jsonl": json.dumps(TVG),
        "empty.jsonl": "",
        "half.jsonl": json.dumps(TVG)[:40],
        "key.jsonl": json.dumps(TVG | {"segmets": []}),
        "task.jsonl": json.dumps(TVG | {"task": "qa"}),
        "twice.jsonl": f"{json.dumps(TVG)}\n{json.dumps(TVG)}",
        "chat.jsonl": json.dumps({"id": "c", "task": "chat", "video": "train_0.mp4", "question": "?", "response": "x"}),
        "video.jsonl": json.dumps(TVG | {"video": "gone.mp4"}),
        "mcqa.jsonl": json.dumps({"id": "m", "task": "mcqa", "video": "train_0.mp4", "question": "?", "answer": "A"}),
        "object.json": "{}",
        "sets.yaml": "sets: []",
        "strategy.yaml": "datasets: [{json_path: good.jsonl, data_folder: videos, sampling_strategy: some}]",
        "folder.yaml": "datasets: [{json_path: good.jsonl, data_folder: clips}]",
        "broken.yaml": "run: {seed: 1",
        "list.yaml": "- run",
        "manifest.jsonl": '{"row": "good.jsonl:1"}',
        "other.jsonl": "",
        "rewards.py": REWARDS,
        "syntax.py": "def f(:",
        "scores.jsonl": json.dumps({"id": "zz", "rewards": [0.5, 1]}),
        "levels.jsonl": json.dumps({"id": "a", "rewards": [2]}),
        "predictions.jsonl": json.dumps({"id": "a", "task": "tvg", "response": "x"}),
        "test.csv": "video,question\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("rows.parquet", "parquet.jsonl"):
        (folder / name).write_bytes(b"PAR1\x15\x04\x15\xff\xfe")
    (folder / "latin.jsonl").write_bytes(json.dumps(TVG, ensure_ascii=False).encode().replace(b"when", b"wh\xe9n"))
    for name in ("latin.yaml", "latin_manifest.jsonl", "latin_predictions.jsonl"):
        (folder / name).write_bytes(b"# caf\xe9\n")


def write_models(folder: Path, world: Path) -> None:
    """Copies of the tiny model without a file, or with another content of one."""

    def copy(name: str, *gone: str) -> Path:
        shutil.copytree(world / "model", folder / name)
        for file in gone:
            (folder / name / file).unlink()
        return folder / name

    cut = copy("cut_weights") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    header = copy("cut_header") / "model.safetensors"
    header.write_bytes(header.read_bytes()[:100])
    copy("no_tokenizer", "tokenizer.json", "tokenizer_config.json")
    copy("no_template", "chat_template.jinja")
    copy("no_weights", "model.safetensors")
    copy("no_sizes", "preprocessor_config.json")
    (copy("cut_config") / "config.json").write_text('{"model_type": ')
    (copy("cut_tokenizer") / "tokenizer.json").write_text('{"version": ')
    (copy("cut_sizes") / "preprocessor_config.json").write_text("{")
    (copy("bert") / "config.json").write_text('{"model_type": "bert"}')
    (copy("new_family") / "config.json").write_text('{"model_type": "qwen9_vl"}')
    (folder / "no_model").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone/for/good"}')
    (folder / "cut_adapter").mkdir()
    (folder / "cut_adapter" / "adapter_config.json").write_text('{"base_model')


def write_runs(folder: Path) -> None:
    for name in ("used", "no_config", "not_a_run", "cut_result"):
        (folder / name).mkdir()
    (folder / "used" / "config.yaml").write_text("run: {seed: 0}\n")
    (folder / "used" / "metrics.jsonl").write_text("{}\n")
    (folder / "no_config" / "metrics.jsonl").write_text("{}\n")
    (folder / "cut_result" / "metrics.json").write_text('{"spec": ')
    (folder / "file").write_text("")


# (kind, command, what its line holds); run.dir is set where a command does not name one
MISTAKES = [
    # keys and values
    ("key", "train_grpo los.beta=0", ["los.beta=0", "did you mean loss?"]),
    ("key", "train_sft run.sede=1", ["run.sede", "did you mean run.seed?"]),
    ("key", "eval run eval.num_answer=2", ["eval.num_answer", "did you mean eval.num_answers?"]),
    ("key", "select_data select.budgte=5", ["select.budgte", "did you mean select.budget?"]),
    ("key", "train_grpo loss.beta", ["config file loss.beta not found"]),
    ("key", "train_grpo plan.tflops=3", ["plan.tflops=3", "is for --plan"]),
    ("option", "train_grpo --resmue", ["unrecognized arguments: --resmue"]),
    ("option", "data check", ["the following arguments are required: DATA"]),
    ("option", "eval rnu", ["invalid choice: 'rnu' (choose from", "compare"]),
    ("option", "tiny --size huge", ["--size: invalid choice: 'huge' (choose from", "small"]),
    ("type", "train_grpo run.seed=one", ["run.seed must be int, got 'one'"]),
    ("type", "train_grpo optim.lr=1e-5x", ["optim.lr must be float, got '1e-5x'"]),
    ("type", "train_grpo model.freeze_vision=yess", ["model.freeze_vision must be bool"]),
    (
        "type",
        "train_grpo loss.clip=pppo",
        ["loss.clip: Invalid value 'pppo', expected one of ['ppo', 'cispo', 'none']"],
    ),
    ("type", "train_grpo model.dtype=float16", ["model.dtype: Invalid value 'float16'", "['float32', 'bfloat16']"]),
    ("type", "train_grpo rewards.functions=[a.py:f]", ["rewards.functions must be a mapping"]),
    ("range", "train_grpo loss.clip_low=1", ["loss.clip_low must be below 1", "got 1.0"]),
    ("range", "train_grpo loss.entropy=-0.01", ["loss.entropy must be at least 0, got -0.01"]),
    ("range", "train_grpo optim.warmup_steps=9 run.steps=5", ["optim.warmup_steps must be at most run.steps=5, got 9"]),
    ("range", "train_sft optim.warmup_steps=9 run.steps=5", ["optim.warmup_steps must be at most run.steps=5, got 9"]),
    ("range", "train_sft optim.warmup_steps=-1", ["optim.warmup_steps must be at least 0, got -1"]),
    ("range", "train_grpo rollout.group_size=1", ["rollout.group_size is 1", "needs at least 2"]),
    ("range", "train_grpo rollout.temperature=0", ["rollout.temperature must be above 0"]),
    ("range", "eval run eval.num_answers=4", ["eval.temperature must be above 0"]),
    ("range", "select_data select.rule=random", ["select.rule=random needs select.budget"]),
    ("range", "train_grpo model.lora_merger=true", ["model.lora_merger=true needs model.lora_rank"]),
    ("range", "train_grpo model.dtype=bfloat16", ["model.dtype=bfloat16 trains with adapters (model.lora_rank)"]),
    ("range", "train_grpo video.max_frames=2", ["video.max_frames must be at least video.min_frames=4, got 2"]),
    ("range", "train_grpo video.max_pixels=100", ["video.max_pixels must be at least video.min_pixels=784, got 100"]),
    # files of configurations
    ("config", "train_grpo --config nowhere.yaml", ["config file nowhere.yaml not found"]),
    ("config", "train_grpo --config broken.yaml", ["broken.yaml: not valid YAML"]),
    ("config", "train_grpo --config list.yaml", ["list.yaml: a configuration must be a mapping"]),
    ("config", "train_grpo --config latin.yaml", ["latin.yaml: 'utf-8' codec can't decode"]),
    ("config", "eval run --config configs/tiny.yaml", ["configs/tiny.yaml: unknown key", "valid are run, model"]),
    ("config", "train_grpo --plan nowhere.yaml", ["nowhere.yaml not found"]),
    # prompt templates
    ("template", "train_grpo 'prompt.tvg=When does it happen?'", ["prompt.tvg must hold {question}"]),
    ("template", "train_sft 'prompt.mcqa=\"{quesiton} {options}\"'", ["prompt.mcqa must hold {question}"]),
    (
        "template",
        "eval run 'prompt.gqa=\"{question} {choices}\"'",
        ["{question} and {options}", "{choices}"],
    ),
    (
        "template",
        "select_data 'prompt.tvg=\"{question} {duration}\"'",
        ["prompt.tvg may hold {question}, and"],
    ),
    # records and their files
    ("data", "train_grpo data.train=nowhere.yaml", ["data file nowhere.yaml not found; give another path"]),
    ("data", "train_grpo data.train=tiny_world", ["data file tiny_world", "is a folder"]),
    ("data", "train_grpo data.train=empty.jsonl", ["empty.jsonl: no samples"]),
    ("data", "train_grpo data.train=half.jsonl", ["half.jsonl:1: not valid JSON"]),
    ("data", "train_grpo data.train=latin.jsonl", ["latin.jsonl:1: not UTF-8"]),
    ("data", "train_grpo data.train=key.jsonl", ["key.jsonl:1: unknown key segmets; valid are"]),
    ("data", "train_grpo data.train=task.jsonl", ["task.jsonl:1: task must be one of tvg, mcqa, gqa"]),
    ("data", "train_grpo data.train=mcqa.jsonl", ["mcqa.jsonl:1: options must be a list of 2 to 26 texts"]),
    ("data", "train_grpo data.train=twice.jsonl", ["twice.jsonl: two records with the id 'a'"]),
    ("data", "train_grpo data.train=chat.jsonl", ["chat.jsonl: 'c' is a chat record", "train_sft.py alone"]),
    ("data", "train_grpo data.train=video.jsonl", ["gone.mp4 (video.jsonl:1)", "python data.py check"]),
    ("data", "train_grpo data.train=object.json", ["object.json: expected a list of records"]),
    ("data", "train_grpo data.train=sets.yaml", ["sets.yaml: expected a list under the key datasets"]),
    ("data", "train_grpo data.train=latin.yaml", ["latin.yaml: not UTF-8"]),
    ("data", "train_grpo data.train=strategy.yaml", ["strategy.yaml", "'some' is not all, first:N, end:N or random:N"]),
    ("data", "train_grpo data.train=folder.yaml", ["folder.yaml: video folder clips not found"]),
    ("data", "train_grpo data.train=rows.parquet", ["rows.parquet: Parquet is not read; as JSON: python -c"]),
    ("data", "data check parquet.jsonl", ["parquet.jsonl: Parquet is not read; as JSON: python -c"]),
    ("data", "train_grpo data.validation=nowhere.jsonl", ["data file nowhere.jsonl not found"]),
    ("data", "train_sft data.train=good.jsonl prompt.think=true", ["sample a: prompt.think=true needs a `response`"]),
    ("data", "train_grpo data.train=good.jsonl data.order=curriculum", ["record 'a'", "python select_data.py"]),
    ("data", "data check good.jsonl --videos clips", ["--videos clips: no such folder"]),
    ("data", "data check nowhere.jsonl", ["data file nowhere.jsonl not found"]),
    ("data", "data check good.jsonl --manifest out/m.jsonl", ["--manifest out/m.jsonl: no such folder"]),
    ("data", "data check good.jsonl --workers -1", ["--workers must be at least 0, got -1"]),
    # manifests
    ("manifest", "train_grpo data.manifest=nowhere.jsonl", ["data.manifest nowhere.jsonl", "python data.py check"]),
    ("manifest", "train_grpo data.manifest=manifest.jsonl", ["manifest.jsonl:1: not a line of a manifest"]),
    ("manifest", "train_grpo data.manifest=other.jsonl", ["other.jsonl does not know", "python data.py check"]),
    ("manifest", "train_grpo data.manifest=latin_manifest.jsonl", ["latin_manifest.jsonl:1: not UTF-8"]),
    # models
    ("model", "train_grpo model.path=gone/for/good", ["model.path gone/for/good: no such folder; give"]),
    ("model", "train_grpo model.path=", ["model.path : no such folder; give"]),
    ("model", "train_sft model.path=./gone", ["model.path ./gone: no such folder; give"]),
    ("model", "eval run model.path=used/final", ["model.path used/final: no such folder; give"]),
    ("model", "train_grpo model.path=rewards.py", ["model.path rewards.py", "no such folder; give"]),
    ("model", "train_grpo model.path=Qwen/Qwen2.5-VL-3B", ["model.path Qwen/Qwen2.5-VL-3B", "hf download"]),
    ("model", "train_grpo model.path=no_model", ["model.path no_model", "config.json"]),
    ("model", "train_grpo model.path=cut_config", ["model.path cut_config", "config.json", "not a valid JSON"]),
    ("model", "train_grpo model.path=bert", ["model.path bert: family bert is not one of qwen2_vl, qwen2_5_vl"]),
    ("model", "train_grpo model.path=new_family", ["model.path new_family", "qwen9_vl"]),
    ("model", "train_grpo model.path=cut_weights", ["cut_weights/model.safetensors is damaged", "download it again"]),
    ("model", "eval run model.path=cut_header", ["cut_header/model.safetensors is damaged", "download it again"]),
    ("model", "train_grpo model.path=no_weights", ["model.path no_weights", "model.safetensors"]),
    ("model", "train_grpo model.path=no_tokenizer", ["model.path no_tokenizer: no tokenizer", "copy tokenizer.json"]),
    ("model", "train_grpo model.path=cut_tokenizer", ["model.path cut_tokenizer", "tokenizer"]),
    ("model", "train_grpo model.path=no_template", ["model.path no_template: no chat template; copy"]),
    ("model", "train_grpo model.path=no_sizes", ["no_sizes: no preprocessor_config.json"]),
    ("model", "train_grpo model.path=cut_sizes", ["cut_sizes/preprocessor_config.json", "not valid JSON"]),
    ("model", "train_grpo model.path=adapter", ["adapter, an adapter of gone/for/good: no such folder"]),
    ("model", "train_grpo model.path=cut_adapter", ["model.path cut_adapter", "adapter_config.json"]),
    ("model", "train_grpo --plan model.path=gone/for/good", ["model.path gone/for/good: no config.json"]),
    # reward functions
    ("reward", "train_grpo 'rewards.functions={rewards.py: 1}'", ["'rewards.py' is not of the form path/to/file.py:"]),
    ("reward", "train_grpo 'rewards.functions={gone.py:f: 1}'", ["rewards.functions: gone.py:f: file not found"]),
    ("reward", "train_grpo 'rewards.functions={syntax.py:f: 1}'", ["syntax.py:f: the file does not import: Syntax"]),
    ("reward", f"train_grpo {FUNCTION.format('gone')}", ["rewards.py:gone: the file has no function 'gone'"]),
    ("reward", f"train_grpo {FUNCTION.format('messages')}", ["function messages", "rewards.conversational=true"]),
    ("reward", f"select_data {MODEL} {FUNCTION.format('messages')}", ["messages", "rewards.conversational=true"]),
    ("reward", f"train_grpo {FUNCTION.format('fails')}", ["function fails, step 1: ZeroDivisionError", "traceback is"]),
    ("reward", f"select_data {MODEL} {FUNCTION.format('fails')}", ["function fails, step 1: Zero", "traceback is"]),
    ("reward", f"train_grpo {FUNCTION.format('short')}", ["function short, step 1: returned 1 values"]),
    ("reward", f"train_grpo {FUNCTION.format('words')}", ["function words, step 1", "'good', not a finite number"]),
    ("reward", f"train_grpo {FUNCTION.format('old')}", ["function old, step 1: TypeError", "unexpected keyword"]),
    # launch files
    ("launch", "LOCAL_WORLD_SIZE=8 train_grpo", ["8 processes", "no GPUs", "configs/accelerate/cpu2.yaml"]),
    ("launch", "LOCAL_WORLD_SIZE=8 eval run", ["8 processes", "no GPUs", "configs/accelerate/cpu2.yaml"]),
    ("launch", "LOCAL_WORLD_SIZE=8 GPUS=4 train_grpo", ["8 processes", "4 GPUs", "--num_processes 4"]),
    ("launch", "LOCAL_WORLD_SIZE=1 train_grpo", ["error: 1 process is launched for GPUs and no GPUs are found"]),
    ("launch", "LOCAL_WORLD_SIZE=2 GPUS=1 train_grpo", ["2 processes are launched for GPUs and 1 GPU is found"]),
    ("launch", "train_grpo --plan configs/accelerate/ddp.yaml data.batch_size=4", ["data.batch_size 4", "8 processes"]),
    ("launch", "train_grpo --plan configs/tiny.yaml", ["configs/tiny.yaml: not a configuration of accelerate"]),
    # selections
    ("select", "select_data select.scores=nowhere.jsonl", ["select.scores nowhere.jsonl not found"]),
    ("select", "select_data select.scores=scores.jsonl", ["scores.jsonl:1: the id 'zz' is not in data.train"]),
    ("select", "select_data select.scores=levels.jsonl", ["levels.jsonl:1: rewards must be a list of numbers from 0"]),
    ("select", "select_data select.scores=latin.jsonl", ["latin.jsonl:1"]),
    ("select", "select_data run.dir=no_config", ["run.dir no_config exists and is not of a selection; give another"]),
    # evaluations
    ("eval", "eval run data.test=nowhere.jsonl", ["data file nowhere.jsonl not found"]),
    ("eval", "eval run data.floor=nowhere.jsonl", ["data.floor names nowhere.jsonl", "convert.py", "`data.floor=`"]),
    ("eval", "eval run run.dir=no_config", ["run.dir no_config exists; give --resume"]),
    ("eval", "eval score nowhere.jsonl --out o.json", ["nowhere.jsonl: No such file"]),
    ("eval", "eval score predictions.jsonl --out o.json", ["predictions.jsonl: row 1: key 'segments'"]),
    ("eval", "eval score predictions.jsonl --out o.json --data nowhere.jsonl", ["nowhere.jsonl not found"]),
    ("eval", "eval score latin_predictions.jsonl --out o.json", ["latin_predictions.jsonl: "]),
    ("eval", "eval score predictions.jsonl --out o.json --answer tag", ["--answer: invalid choice: 'tag' (choose"]),
    ("eval", "eval compare cut_result", ["a comparison needs at least two results"]),
    ("eval", "eval compare cut_result used", ["cut_result/metrics.json: not a metrics.json of eval.py"]),
    ("eval", "eval compare nowhere.json used", ["nowhere.json"]),
    # converters
    ("convert", "convert nextqaa --annotations a --out b.jsonl", ["invalid choice: 'nextqaa' (choose from", "nextqa"]),
    ("convert", "convert mmvu --annotations nowhere.json --out b.jsonl", ["nowhere.json"]),
    (
        "convert",
        "convert mmvu --annotations rows.parquet --out b.jsonl",
        ["rows.parquet: Parquet is not read"],
    ),
    ("convert", "convert nextgqa --annotations test.csv --out b.jsonl", ["nextgqa needs --spans"]),
    ("convert", "convert mmvu --annotations object.json --out b.json", ["--out b.json", "must end in .jsonl"]),
    ("convert", "convert nextqa --annotations test.csv --out b.jsonl", ["test.csv"]),
    # merges
    (
        "merge",
        "pretrained merge tiny_world/model out",
        ["tiny_world/model is no adapter folder", "adapter_con"],
    ),
    ("merge", "pretrained merge adapter used", ["used exists; give another folder"]),
    ("merge", "pretrained merge adapter out", ["model.path adapter, an adapter of gone/for/good: no such folder"]),
    ("merge", "pretrained merge gone out", ["gone is no adapter folder"]),
    ("merge", "pretrained merge cut_adapter out", ["cut_adapter/adapter_config.json"]),
    # reports
    ("report", "report nowhere", ["nowhere: neither a training nor a finished evaluation"]),
    ("report", "report not_a_run", ["not_a_run: neither a training nor a finished evaluation"]),
    ("report", "report cut_result", ["cut_result/metrics.json: not a metrics.json of eval.py"]),
    ("report", "report used --samples many", ["--samples: invalid int value: 'many'"]),
    # run folders and resumes
    ("resume", "train_grpo --resume run.dir=gone", ["--resume: gone/config.yaml not found"]),
    ("resume", "train_grpo run.dir=used", ["run.dir used exists; give --resume to go on, or another run.dir"]),
    ("resume", "train_grpo --resume run.dir=no_config", ["--resume: no_config/config.yaml not found"]),
    ("resume", "train_grpo --resume run.dir=used run.seed=1", ["--resume: used/config.yaml differs in"]),
    ("resume", "train_grpo run.dir=file", ["run.dir file"]),
    ("world", "tiny --out used", ["used exists and is no tiny world: remove it, or choose another --out"]),
]


def message_of(program: str, words: list[str], capsys) -> str:
    """The last thing that a program says to its user: the line it exits with, or argparse's after its usage."""
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program](words)
    said = capsys.readouterr().err
    if isinstance(stop.value.code, str):
        assert "Traceback" not in said
        return stop.value.code
    assert stop.value.code == 2 and said.startswith("usage: ")
    return said.strip().splitlines()[-1].partition(": ")[2]


@pytest.mark.parametrize(("command", "fragments"), [row[1:] for row in MISTAKES], ids=[row[1] for row in MISTAKES])
def test_a_mistake_costs_one_line(place, tmp_path, monkeypatch, capsys, command, fragments):
    monkeypatch.chdir(place)
    monkeypatch.setattr("model.folder.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    words = shlex.split(command)
    settings = dict(word.split("=") for word in words if word.partition("=")[0].isupper())
    words = words[len(settings) :]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(settings.pop("GPUS", "0")))
    if "LOCAL_WORLD_SIZE" in settings:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(os, "environ", os.environ | settings | {"LOCAL_RANK": "0"})
    program, *words = words
    runs = program in ("train_grpo", "train_sft", "select_data") or words[:1] == ["run"]
    if runs and "run.dir=" not in command:
        words.append(f"run.dir={tmp_path}/run")
    if runs:
        words += ["run.tracker=none"]
    start = time.monotonic()
    message = message_of(program, words, capsys)
    assert message.startswith("error: ") and message.count("\n") == 0
    for fragment in fragments:
        assert fragment in message
    assert time.monotonic() - start < 15  # no retries over a network


def test_the_traceback_of_a_reward_function_is_in_the_run_folder(place, tmp_path, monkeypatch, capsys):
    """The file does not count as a step, so that the same command starts again once the function is mended."""
    monkeypatch.chdir(place)
    words = [f"run.dir={tmp_path}/run", "run.tracker=none", "run.steps=1", "data.validation=", "data.batch_size=2"]
    function = f"rewards.functions={{{tmp_path}/own.py:f: 1}}"
    (tmp_path / "own.py").write_text("def f(completions, **columns):\n    return [1 / 0]\n")
    message = message_of("train_grpo", [*words, function], capsys)
    assert message.endswith(f"; the traceback is in {tmp_path}/run/reward_error.txt")
    text = (tmp_path / "run" / "reward_error.txt").read_text()
    assert f'File "{tmp_path}/own.py", line 2, in f' in text and text.endswith("ZeroDivisionError: division by zero\n")
    (tmp_path / "own.py").write_text("def f(completions, **columns):\n    return [1.0] * len(completions)\n")
    assert train_grpo.main([*words, function]).saved_step == 1


def test_of_several_processes_the_first_says_that_gpus_are_missing(monkeypatch):
    """The others end without a word and without an error, at which a launcher would stop the first before it speaks."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    launched = {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    monkeypatch.setattr(os, "environ", launched)
    with pytest.raises(SystemExit) as stop:
        check_devices()
    assert stop.value.code == 0
    for wanted in ({"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1,-1"}, {"ACCELERATE_USE_CPU": "True"}):
        monkeypatch.setattr(os, "environ", launched | wanted)
        check_devices()
    monkeypatch.setattr(os, "environ", launched)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check_devices()


@pytest.mark.parametrize("name", ["cpu2", "cpu2_zero2", "cpu2_zero3"])
def test_a_launch_file_for_cpus_hides_the_gpus(name):
    assert load_config_from_file(str(REPO / "configs" / "accelerate" / f"{name}.yaml")).gpu_ids == "-1,-1"


# ---- what is allowed, and warned of ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], []),
        (["model.lora_rank=4"], ["optim.lr=1e-06"]),
        (["model.lora_rank=4", "optim.lr=5e-6"], []),
        (["loss.clip_high=0.28"], ["loss.clip_high=0.28 changes nothing at loss.updates_per_rollout=1"]),
        (["loss.clip=none", "loss.ratio=sequence"], ["loss.ratio=sequence, loss.clip=none changes nothing"]),
        (["loss.clip=none", "model.lora_rank=4"], ["optim.lr=1e-06", "loss.clip=none"]),
        (["loss.clip_high=0.28", "loss.updates_per_rollout=2"], []),
        (["loss.clip_high=0.28", "loss.old_logps=sampled"], []),
        (["loss.clip=cispo", "loss.clip_low=5", "loss.updates_per_rollout=2"], []),
    ],
)
def test_what_a_user_hardly_means_is_one_line_each(overrides, parts):
    found = cautions(config.load(config.GrpoConfig, [], overrides))
    assert len(found) == len(parts) and not any("\n" in text for text in found)
    assert all(text.startswith(part) for text, part in zip(found, parts))


def test_a_command_of_latex_is_no_word_of_a_template():
    assert config.PromptConfig(mcqa="{question} {options} in \\boxed{B}").mcqa.endswith("boxed{B}")


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "rloo", "gspo", "lora", "temporal_r1"])
def test_no_recipe_is_warned_of(name):
    """The 3B recipe with lora.yaml trained its adapters at 1e-6; the clip of dapo.yaml did nothing."""
    files = [f"configs/{file}.yaml" for file in ("grpo_qwen2_5_vl_3b_charades", name)]
    assert cautions(config.load(config.GrpoConfig, [str(REPO / file) for file in files])) == []


def test_warnings_come_at_the_start_of_a_run(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = [f"run.dir={tmp_path}/run", "run.tracker=none", "model.lora_rank=2", "optim.lr=1e-6"]
    message_of("train_grpo", [*words, "loss.clip_high=0.3", "model.path=gone/for/good"], capsys)
    with pytest.raises(SystemExit):
        train_sft.main([f"run.dir={tmp_path}/sft", *words[1:], "model.path=gone/for/good"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]
    assert len(said) == 1 and said[0].startswith("WARNING: optim.lr=1e-06 is a rate for full tuning")


def test_every_kind_of_mistake_is_typed():
    kinds = [kind for kind, _, _ in MISTAKES]
    assert len(kinds) >= 64 and len({command for _, command, _ in MISTAKES}) == len(kinds)
    assert all(kinds.count(kind) >= 3 for kind in set(kinds) - {"world"})
