"""A small world with both model families, written once per test session."""

from pathlib import Path

import pytest
import torch

import config
import data
import tiny
from policy import Policy, load_policy

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
PROMPT = {"think": False, "system_plain": "", "tvg": "{question}", "mcqa": "{question}\n{options}"}


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
        f"data.cache_dir={tmp_path}/cache",
        f"run.dir={tmp_path}/run",
        "run.steps=2",
        "run.tracker=none",
        "prompt.think=false",
        "prompt.system_plain=''",
        "prompt.tvg='{question}'",
        "rollout.group_size=4",
        "rollout.max_new_tokens=6",
        "eval.max_new_tokens=6",
        "optim.lr=1e-3",
    ]
    return config.load(config.GrpoConfig, [], base + list(overrides))


def make_prompts(world: Path, policy: Policy, num: int = 3, name: str = "mix_train") -> list[data.Prompt]:
    """Prompts of unequal length: several tasks, clips of several durations."""
    builder = data.PromptBuilder(
        policy.tokenizer,
        data.video_io.read_geometry(str(world / "model")),
        config.VideoConfig(),
        config.PromptConfig(**PROMPT),
        None,
    )
    samples = data.read_samples(str(world / f"{name}.yaml"))
    return builder.many(samples[:: max(1, len(samples) // num)][:num])
