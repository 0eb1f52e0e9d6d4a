"""A small world with both model families, written once per test session, and what several files use of the loops."""

import dataclasses
import json
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import config
import data
import prompts
import tiny
import train_sft
from groups import GroupRewards, Scores
from policy import Policy, load_policy
from records import files
from runtime.run import Run
from video import frames

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
PROMPT = {"think": False, "system_plain": "", "tvg": "{question}", "mcqa": "{question}\n{options}"}

torch.set_num_threads(1)  # with more, sums may be taken in another order on a busy machine: not the same last bits
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what runs behind it
MACHINE = ("time/", "memory/", "tokens_per_s")  # metrics that differ from run to run


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Folder of a small world; `model` is Qwen2.5-VL, `model_qwen2_vl` the other family."""
    folder = tmp_path_factory.mktemp("tiny") / "world"
    tiny.write_world(folder, seed=0, size="small")
    tiny.write_model(folder / "model_qwen2_vl", seed=0, family="qwen2_vl")
    return folder


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl"])
def family(request) -> str:
    return request.param


def make_policy(world: Path, family: str = "qwen2_5_vl", sharpen: float = 3.0, **model) -> Policy:
    """A freshly loaded policy whose random weights are scaled up, so that its distributions are far from uniform."""
    path = world / ("model" if family == "qwen2_5_vl" else "model_qwen2_vl")
    policy = load_policy(config.ModelConfig(path=str(path), **model))
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(sharpen)
    return policy.eval()


def make_cfg(world: Path, tmp_path: Path, *overrides: str) -> config.GrpoConfig:
    """A GRPO configuration on the small world; run folder and cache under `tmp_path`."""
    base = [
        f"model.path={world}/model",
        f"data.train={world}/tvg_train.yaml",
        "data.validation=''",
        "data.batch_size=4",
        "data.workers=0",
        f"data.cache_dir={tmp_path}/cache",
        f"run.dir={tmp_path}/run",
        "run.steps=2",
        "run.tracker=none",
        "run.self_check=false",  # test_selfcheck.py turns it on
        "prompt.think=false",
        "prompt.system_plain=''",
        "prompt.tvg='{question}'",
        "rollout.group_size=4",
        "rollout.max_new_tokens=6",
        "eval.max_new_tokens=6",
        "optim.lr=1e-3",
    ]
    return config.load(config.GrpoConfig, [], base + list(overrides))


def make_prompts(world: Path, policy: Policy, num: int = 3, name: str = "mix_train") -> list[prompts.Prompt]:
    """Prompts of unequal length: several tasks, clips of several durations."""
    samples = files.read_samples(str(world / f"{name}.yaml"))
    return read_prompts(world, policy.tokenizer, samples[:: max(1, len(samples) // num)][:num], **PROMPT)


def read_prompts(world: Path, tokenizer, samples, video=None, **prompt) -> list[prompts.Prompt]:
    """The samples' prompts, read in this process."""
    model, asked = config.ModelConfig(path=str(world / "model")), config.DataConfig(workers=0, cache_dir="")
    wording, video = config.PromptConfig(**prompt), video or config.VideoConfig()
    cfg = config.GrpoConfig(model=model, data=asked, video=video, prompt=wording)
    return list(data.make_reader(cfg, tokenizer, "cpu").ahead(samples, 0))


def write_data(world: Path, folder: Path, num: int, bad: dict[int, bytes | str]) -> str:
    """A data set of `num` grounding records, each with a file of its own: links to the world's clips.

    `bad[i]` is the content of file i in place of a clip, or a word that its name ends in (see failing.py).
    """
    (folder / "videos").mkdir(parents=True)
    good = [json.loads(line) for line in (world / "tvg_train.jsonl").read_text().splitlines()]
    lines = []
    for i in range(num):
        record, name = good[i % len(good)], f"{i}_{bad[i]}.mp4" if isinstance(bad.get(i), str) else f"{i}.mp4"
        if isinstance(bad.get(i), bytes):
            (folder / "videos" / name).write_bytes(bad[i])
        else:
            (folder / "videos" / name).symlink_to(world / "videos" / record["video"])
        lines.append(json.dumps(record | {"id": f"r{i}", "video": name}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return str(folder / "data.jsonl")


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rewards_of(totals_NG: torch.Tensor, earned_NG=None, tokens_NG=None, places=()) -> GroupRewards:
    """What N groups earned, with all completions right; every completion has two tokens unless it is said."""
    earned_NG = totals_NG if earned_NG is None else earned_NG
    tokens_NG = torch.full_like(totals_NG, 2.0) if tokens_NG is None else tokens_NG
    return GroupRewards([], list(places), Scores(totals_NG, earned_NG, earned_NG, tokens_NG), num_refills=0)


class RecordingSGD(torch.optim.SGD):
    """Plain SGD, whose step is linear in the gradient (Adam's hides a wrong scale), and which keeps the gradients."""

    def step(self, closure=None):
        self.grads = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def sgd(model, cfg) -> RecordingSGD:
    """In the place of optim.make_optimizer."""
    return RecordingSGD([p for p in model.parameters() if p.requires_grad], lr=cfg.lr)


def sft_cfg(world, tmp_path, *overrides) -> config.SftConfig:
    """The sections of conftest.make_cfg that supervised tuning has too."""
    cfg = make_cfg(world, tmp_path, *overrides)
    return config.SftConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(config.SftConfig)})


def open_run(cfg) -> Run:
    return Run(cfg.run, config.to_yaml(cfg), resume=False)


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def metrics_of(run_dir, machine: bool = False) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the machine."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if machine or not k.startswith(MACHINE)} for row in rows]


def weights_of(run_dir) -> dict[str, torch.Tensor]:
    """Of the final model, or of its adapter."""
    (path,) = (run_dir / "final").glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="session")
def sft_run(world, tmp_path_factory):
    """Folder of a short supervised run: some of its answers have the format, few are right."""
    folder = tmp_path_factory.mktemp("sft")
    overrides = ("data.batch_size=16", "optim.lr=3e-3", "run.steps=12")
    return train_sft.train(sft_cfg(world, folder, *overrides)).dir


@pytest.fixture(scope="session")
def taught(sft_run) -> tuple[str, ...]:
    """Overrides under which a GRPO run starts from a model that earns rewards, different ones within a group."""
    sizes = ("rollout.group_size=8", "rollout.max_new_tokens=12", "eval.max_new_tokens=12")
    return f"model.path={sft_run}/final", *sizes


@pytest.fixture
def patches_held(monkeypatch) -> list[int]:
    """Of how many videos the patches were alive, as each one's were made and with it."""
    alive, counts, patchify = [], [], frames.patchify

    def counting(*args):
        patches = patchify(*args)
        alive.append(weakref.ref(patches))
        counts.append(sum(patches() is not None for patches in alive))
        return patches

    monkeypatch.setattr(frames, "patchify", counting)
    return counts


@pytest.fixture
def fault(record_property):
    """`fault(name, outcome)` makes a row of the table at the end of a test that tries a fault."""

    def note(name: str, outcome: str) -> None:
        record_property("fault", (name, outcome))

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    """The faults that were tried, and what became of them."""
    rows = []
    for result in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(result, []):
            name, outcome = dict(getattr(report, "user_properties", ())).get("fault", ("", ""))
            outcome = "FAILED" if report.failed else f"skipped: {report.longrepr[2]}" if report.skipped else outcome
            rows += [(name, outcome)] if name else []
    width = max((len(name) for name, _ in rows), default=0)
    for name, outcome in sorted(rows):
        terminalreporter.write_line(f"{name:{width}}  {outcome}")
