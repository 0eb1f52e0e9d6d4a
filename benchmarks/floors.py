"""The least time that the parts of a GRPO step can take on this device, from rates that are measured here and now.

Not a roofline of every kernel. A part takes at least the larger of its arithmetic over the rate of a large matrix
product, and of the bytes that it cannot avoid over the rate of a large copy. FLOPs are counted in the training code
(preflight/dryrun.py), without what gradient checkpointing computes twice. Bytes are those of weights, gradients,
optimizer state and KV cache, in every pass once; activations are left out, so the true floor is somewhat higher.
Used by bench_step.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from config import GrpoConfig
from policy import Policy
from preflight.costs import Case, Launch
from preflight.dryrun import Device, meta_policy
from preflight.lengths import Length
from prompts import Prompt

SIDES = {"cuda": 8192, "cpu": 1536}  # of the matrices
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes: more than caches hold


@dataclass(frozen=True)
class Floor:
    """What one part of a step cannot do without."""

    flops: float
    bytes: float

    def seconds(self, speed: Device) -> float:
        return max(self.flops / speed.flops, self.bytes / speed.bytes)


def measure_speed(device: str, dtype: torch.dtype) -> Device:
    """FLOP/s of a matrix product in `dtype` and bytes/s of a copy (read and written), medians of 5 after a warm-up."""
    side, num = SIDES[device], COPIED[device]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    flops = 2 * side**3 / _seconds(lambda: a @ b)
    source = torch.ones(num, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Device(flops, 2 * num / _seconds(lambda: target.copy_(source)), 0.0)


def _seconds(call: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(6):
        start = now()
        call()
        times.append(now() - start)
    return median(times[1:])


def now() -> float:
    """Seconds, once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_floors(policy: Policy, cfg: GrpoConfig, prompt: Prompt, device: str) -> dict[str, Floor]:
    """Of `ours`: vision, prefill, decode, reference, update (forward and backward) and optimizer, for a whole step."""
    model, cfg = policy.model, replace(cfg, model=replace(cfg.model, gradient_checkpointing=False))
    text, after = model.config.text_config, len(prompt.ids) - prompt.video_start - prompt.video.num_tokens
    length = Length(prompt.video_start, prompt.video.grid_thw, prompt.video.num_tokens, after, 0)
    num_new, size, num = cfg.rollout.max_new_tokens, cfg.rollout.group_size, cfg.data.batch_size
    meta = meta_policy(cfg.model, model.config, policy.tokenizer)
    case = Case(cfg, Launch(), meta, length, num_new, num_new, Device(1.0, 1.0, 0.0, device, (8, 0)))
    flops = {name: phase.flops for name, phase in case.run.phases.items()}
    language = model.model.language_model
    weights = sum(p.nbytes for module in (language.layers, language.norm, model.lm_head) for p in module.parameters())
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = text.num_hidden_layers * 2 * text.num_key_value_heads * head_dim * next(policy.parameters()).itemsize
    sampled, scored = num / cfg.rollout.micro_batch_size, num / cfg.data.micro_batch_size  # micro-batches
    cache = num * token * (length.prompt + size * num_new / 2)  # read for a token of each completion, on average
    return {
        "vision": Floor(flops["vision"], sum(p.nbytes for p in model.model.visual.parameters())),
        "prefill": Floor(flops["prefill"], sampled * weights + num * length.prompt * token),
        "decode": Floor(flops["decode"] + flops["sampler"], num_new * (sampled * weights + cache)),
        "reference": Floor(flops["reference"], scored * weights),
        "update": Floor(flops["forward"] + flops["head"] + flops["backward"], scored * (2 * weights + trained)),
        "optimizer": Floor(flops["optimizer"], 7 * trained),  # weight, gradient and two moments read, three written
    }
