"""Two ways to take one GRPO step with the same models, inputs, seeds and numbers of tokens, and what they need.

Not a benchmark: bench_step.py, whose head describes both ways, and bench_trl.py time them. Nothing to run.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench_prefix import held_bytes, make_policy, score
from floors import now
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, LogitsProcessorList

import tiny
from config import DataConfig, GrpoConfig, LossConfig, ModelConfig, RolloutConfig, RunConfig, VideoConfig
from data import Round
from groups import choose_groups, sample_groups, score_groups
from grpo import group_advantages, policy_loss, token_weights
from policy import Policy, prompt_positions
from preflight.plan import MODELS
from prompts import Prompt
from records.record import Sample
from reward_functions import RewardFunction
from rollout import GumbelSampler, Rollout, row_seed
from runtime.clock import peak_bytes
from runtime.run import Run
from train_grpo import update
from video.budget import read_geometry
from video.frames import decode_video, to_video

SIDES, CLIP_FPS = {"tiny": 112, "3b": 336}, 2  # pixels, of square frames: 16 or 144 tokens each two frames
TEXT = 22  # tokens of a prompt that are text, or more, so that the rest divides
SPEC = VideoConfig(fps=CLIP_FPS, max_frames=4096, total_pixels=2**30)


class Meter:
    """Seconds by phase, or with `memory` the peak MiB of each above what was held at the start of the step.

    A phase that was not reached, or not ended, has none; memory is nan where it is not known.
    """

    def __init__(self, memory: bool = False):
        self.memory, self.found = memory, {}
        self.base = held_bytes() if memory else 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self.found.pop(phase, 0.0)
        if self.memory:
            held_bytes()
            yield
            peak = math.nan if self.base is None else (peak_bytes() - self.base) / 2**20
            self.found[phase] = max(before, peak)
        else:
            start = now()
            yield
            self.found[phase] = before + now() - start


@contextmanager
def timed_calls(owner: torch.nn.Module, name: str) -> Iterator[list[float]]:
    """Within the block, the seconds of every call of `owner.name`."""
    original, seconds = getattr(owner, name), []

    def call(*args, **kwargs):
        start = now()
        result = original(*args, **kwargs)
        seconds.append(now() - start)
        return result

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        delattr(owner, name)


@dataclass(frozen=True)
class Bench:
    """What both ways share: models, inputs, configuration."""

    policy: Policy
    reference: Policy
    optimizer: torch.optim.Optimizer
    prompts: list[Prompt]  # without their videos' patches, which a step reads
    clip: Path
    cfg: GrpoConfig
    run: Run

    def read(self) -> list[Prompt]:
        """The step's prompts, each with its clip decoded anew."""
        geometry, device = read_geometry(self.cfg.model.path), self.policy.device
        videos = (to_video(decode_video(self.clip, SPEC, geometry), geometry, device) for _ in self.prompts)
        return [dataclasses.replace(prompt, video=video) for prompt, video in zip(self.prompts, videos)]


def first_letters(completions: Sequence[str], **_) -> list[float]:
    """A reward that differs between the completions of a random model, so that every group has a gradient."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


FUNCTIONS = [RewardFunction("letters", first_letters, 1.0)]


def ours(bench: Bench, meter: Meter) -> tuple[Tensor, Tensor]:
    """A step of train_grpo; tokens (B, C) and the log-probs they were sampled with."""

    def read(step: int) -> Round:
        prompts, num = bench.read(), len(bench.prompts)
        return Round(prompts, list(range(num)), num, list(range(num)), [0] * num, list(range(num)))

    names = {"vision": "generate", "rollout": "generate"}
    loader = SimpleNamespace(
        batch=read,
        samples=bench.prompts,
        order=SimpleNamespace(visited=lambda *_: None),
        clock=lambda phase: meter(names.get(phase, phase)),
    )
    with timed_calls(bench.policy.model, "generate") as decode:
        rollout, rewards = sample_groups(bench.policy, loader, FUNCTIONS, 0, bench.cfg, bench.run)
    with timed_calls(bench.reference, "forward") as reference, meter("update"):
        batch = choose_groups(rewards, bench.cfg)
        update(bench.policy, bench.reference, bench.optimizer, rollout, batch, bench.cfg, bench.run)
    if not meter.memory:
        meter.found |= {"decode": sum(decode), "reference": sum(reference)}
        meter.found["update"] -= sum(reference)
    return rollout.tokens_BT, rollout.logps_BT


@torch.no_grad()
def sample_repeated(bench: Bench, prompts: list[Prompt], greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens (B, C) and log-probs: Hugging Face's generate on G rows of every prompt, all of one length."""
    policy, size, num = bench.policy, bench.cfg.rollout.group_size, bench.cfg.rollout.max_new_tokens
    rows = [prompt for prompt in prompts for _ in range(size)]
    seeds = [row_seed(bench.cfg.run.seed, 0, prompt.sample.id, g) for prompt in prompts for g in range(size)]
    sampler, device = GumbelSampler(policy, None if greedy else seeds), policy.device
    ids = torch.tensor([prompt.ids for prompt in rows], device=device)
    positions = torch.stack([prompt_positions(prompt, policy.model.config)[0] for prompt in rows], dim=1)
    output = policy.eval().model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions.to(device),
        pixel_values_videos=torch.cat([prompt.video.patches for prompt in rows]),
        video_grid_thw=torch.tensor([prompt.video.grid_thw for prompt in rows], device=device),
        max_new_tokens=num,
        do_sample=False,
        logits_processor=LogitsProcessorList([sampler]),
    )
    return output[:, ids.shape[1] :], torch.stack(sampler.logps, 1)


def repeated(bench: Bench, meter: Meter) -> tuple[Tensor, Tensor]:
    """A step as public trainers take it; returns what `ours` does."""
    cfg, policy = bench.cfg, bench.policy
    size, num = cfg.rollout.group_size, cfg.rollout.max_new_tokens
    with meter("data"):
        prompts = bench.read()
    with meter("generate"):
        tokens_BT, logps_BT = sample_repeated(bench, prompts)
    with meter("reward"):
        texts = policy.tokenizer.batch_decode(tokens_BT, skip_special_tokens=False)
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        rollout = Rollout(tuple(prompts), (), tokens_BT, mask_BT, logps_BT, mask_BT[:, 0], texts)
        totals_PG = score_groups(rollout, FUNCTIONS, cfg, 0)[1][..., 0]
    loss_cfg = cfg.loss
    advantages_PG = group_advantages(
        totals_PG, loss_cfg.std_eps, loss_cfg.baseline, loss_cfg.scale, cfg.group.tolerance
    )
    weights_BT = token_weights(
        mask_BT, loss_cfg.aggregation, num_tokens=mask_BT.sum().item(), num_completions=len(mask_BT), max_tokens=num
    )
    policy.train()
    for p, prompt in enumerate(prompts):
        rows = slice(p * size, (p + 1) * size)
        inputs = (prompt, tokens_BT[rows].tolist(), size)
        with meter("reference"), torch.no_grad():
            ref_logps_BT = score(bench.reference, *inputs).view(size, num)
        with meter("update"):
            logps_BT_new = score(policy, *inputs).view(size, num)
            loss, _ = policy_loss(
                logps_BT_new,
                logps_BT_new.detach(),
                advantages_PG[p].to(policy.device),
                mask_BT[rows],
                weights_BT[rows],
                loss_cfg,
                ref_logps_BT=ref_logps_BT,
            )
            loss.backward()
    with meter("update"):
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.optim.grad_clip)
        bench.optimizer.step()
        bench.optimizer.zero_grad()
    return tokens_BT, logps_BT


WAYS = {"ours": ours, "repeated": repeated}


def write_clip(path: Path, num_frames: int, side: int) -> None:
    """Drifting gradients, so that frames differ and compress as videos do."""
    import av  # here, so that frames in memory need no decoder

    ramp = np.linspace(0, 255, side)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=CLIP_FPS)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for i in range(num_frames):
            planes = [np.roll(ramp, shift)[None].repeat(side, 0) for shift in (i, -i, 3 * i)]
            pixels = np.stack([planes[0], planes[1].T, planes[2]], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_3b(device: str, folder: str) -> Policy:
    """Qwen2.5-VL-3B's published shapes with random weights in bfloat16, and the tiny world's tokenizer."""
    if not Path(folder, "config.json").exists():
        tiny.write_model(Path(folder), seed=0, family="qwen2_5_vl")
    ids = {name: i for name, i in AutoConfig.from_pretrained(folder).to_dict().items() if name.endswith("_token_id")}
    shape = AutoConfig.from_pretrained(MODELS / "Qwen" / "Qwen2.5-VL-3B-Instruct").to_dict() | ids
    shape["text_config"]["layer_types"] = None
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**shape), dtype=torch.bfloat16, attn_implementation="shared_prefix"
        )
    model.set_attn_implementation({"vision_config": "flash_windows"})
    model.model.visual.requires_grad_(False)
    policy = Policy(model, AutoTokenizer.from_pretrained(folder)).to(device)
    policy.banned = torch.cat([policy.banned, torch.tensor(policy.eos_ids, device=device)])
    return policy.eval()


def make_prompt(policy: Policy, num_prompt: int, clip: Path, side: int) -> Prompt:
    """A prompt of so many tokens around a clip, which is written."""
    per_step = (side // 28) ** 2
    steps = (num_prompt - TEXT) // per_step
    if 2 * steps < SPEC.min_frames:
        least = TEXT + SPEC.min_frames // 2 * per_step
        raise SystemExit(f"error: --sizes: a prompt needs at least {least} tokens, got {num_prompt}")
    write_clip(clip, 2 * steps, side)
    geometry = read_geometry(clip.parent)
    video = to_video(decode_video(clip, SPEC, geometry), geometry)
    text = torch.randint(0, 256, (num_prompt - video.num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = text[:6] + [policy.model.config.video_token_id] * video.num_tokens + text[6:]
    if len(ids) != num_prompt or video.num_tokens != steps * per_step:
        raise RuntimeError(f"a clip of {steps} steps gave {video.num_tokens} tokens")
    sample = Sample("bench/0", "tvg", "", "", duration=60.0, segments=((1.0, 9.0),))
    return Prompt(sample, ids, 6, video)


def make_bench(
    model: str, device: str, size: tuple[int, int, int], num: int, checkpointing: bool, folder: Path
) -> Bench:
    """Models and inputs of `num` videos at one size (P, C, G)."""
    p, c, g = size
    policy, reference = ((make_3b if model == "3b" else make_policy)(device, str(folder)) for _ in range(2))
    reference.requires_grad_(False)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.disable_input_require_grads()
    cfg = GrpoConfig(
        run=RunConfig(dir=str(folder / "run"), tracker="none"),
        model=ModelConfig(path=str(folder), dtype=str(policy.model.dtype).removeprefix("torch.")),
        data=DataConfig(batch_size=num, micro_batch_size=1, validation=""),
        rollout=RolloutConfig(group_size=g, max_new_tokens=c, micro_batch_size=num),
        loss=LossConfig(beta=0.04),
    )
    prompt = make_prompt(policy, p, folder / "clip.mp4", SIDES[model])
    prompts = [
        dataclasses.replace(prompt, sample=dataclasses.replace(prompt.sample, id=f"bench/{i}")) for i in range(num)
    ]
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    return Bench(policy, reference, optimizer, prompts, folder / "clip.mp4", cfg, Run(cfg.run, "", resume=False))
