"""What a training step costs one device: memory by phase, FLOPs and seconds, under the engine that trains it.

A step's own tensors are those of the training code (preflight/dryrun.py). The table says what a device holds all the
time, in bytes, with N parameters of b bytes each (the reference has as many again), T of them trained, W processes:

                 weights    gradients    optimizer               buffers
    one process  b N        b T          what it makes           -
    DDP          b N        b T          what it makes           b T: gradients in DDP's buckets
    ZeRO-2       b N        4 T / W      12 T / W: float32       b x reduce_bucket_size, while gradients are reduced
    ZeRO-3       b N / W    4 T / W      weights and AdamW       b x (that + stage3_max_live_parameters)

While ZeRO-3 samples, the weights are there whole as well. What is offloaded is on the host. The patches of a step's
videos are on the device from the first phase to the last. With group.max_refills the patches of every round are
counted, because all earlier groups may be dead.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch import Tensor

from config import GrpoConfig, SftConfig
from model.optim import make_optimizer
from policy import Policy
from preflight.dryrun import META, Call, Device, DryRun, Phase, optimize, sample, score, update
from preflight.lengths import Length
from prompts import Prompt
from runtime.engine import use_deepspeed
from video.frames import Video

SUB_GROUP = 1_000_000_000  # elements that ZeRO-3's optimizer updates at a time
SAMPLING = ("vision", "prefill", "decode", "sampler", "validation")
SCORING = ("reference", "forward", "head", "backward")


@dataclass(frozen=True)
class Launch:
    """The processes of a run and what they shard."""

    processes: int = 1
    stage: int = 0  # ZeRO's; 0: every process holds everything
    offload_optimizer: bool = False  # to the host
    offload_params: bool = False
    bucket: int = 500_000_000  # elements of DeepSpeed's reduce_bucket_size
    live: int = 1_000_000_000  # of its stage3_max_live_parameters

    def __str__(self) -> str:
        if not self.stage:
            return "one process" if self.processes == 1 else f"DDP, {self.processes} processes"
        offloaded = [name for name in ("optimizer", "params") if getattr(self, f"offload_{name}")]
        where = f", {' and '.join(offloaded)} on the host" if offloaded else ""
        return f"ZeRO-{self.stage}, {self.processes} process{'es' * (self.processes > 1)}{where}"


def read_launch(file: str = "") -> Launch:
    """The processes of an accelerate configuration file, or without one those that `accelerate launch` has started.

    Raises FileNotFoundError, or ValueError for a file that cannot be read or an engine that is not ours.
    """
    if not file:
        names = ("zero_stage", "offload_optimizer_device", "offload_param_device", "config_file")
        given = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}") for name in names}
        given["deepspeed_config_file"] = given.pop("config_file")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        return _zero_launch(processes, given, "ACCELERATE_*") if use_deepspeed() else Launch(processes)
    if not Path(file).is_file():
        raise FileNotFoundError(f"accelerate configuration {file} not found")
    try:
        read = load_config_from_file(file)
    except (yaml.YAMLError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not a configuration of accelerate: {' '.join(str(error).split())}") from None
    kind, processes = str(getattr(read.distributed_type, "value", read.distributed_type)), read.num_processes
    if processes < 1:
        raise ValueError(f"{file}: num_processes is {processes}")
    if kind == "DEEPSPEED":
        return _zero_launch(processes, read.deepspeed_config, file)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(f"{file}: distributed_type {kind} is not planned for: DDP and DeepSpeed are")
    return Launch(processes)


def _zero_launch(processes: int, given: dict, where: str) -> Launch:
    """`given` is the section deepspeed_config of accelerate's file, or the variables made of it."""
    zero = {"stage": given.get("zero_stage") or 2}
    zero |= {f"offload_{name}": {"device": given.get(f"offload_{name}_device")} for name in ("optimizer", "param")}
    if given.get("deepspeed_config_file"):
        zero = json.loads(Path(given["deepspeed_config_file"]).read_text(encoding="utf-8"))["zero_optimization"]
    if int(zero["stage"]) not in (2, 3):
        raise ValueError(f"{where}: ZeRO-{zero['stage']} is not planned for: 2 and 3 are")
    devices = [(zero.get(f"offload_{name}") or {}).get("device") for name in ("optimizer", "param")]
    sizes = {"bucket": zero.get("reduce_bucket_size"), "live": zero.get("stage3_max_live_parameters")}
    sizes = {name: int(size) for name, size in sizes.items() if size not in (None, "auto")}
    return Launch(processes, int(zero["stage"]), *(device not in (None, "none") for device in devices), **sizes)


@dataclass(frozen=True)
class Case:
    """One training step in which all videos have one length and all completions another.

    Decoding has a length of its own, because rows that have ended keep running until the longest of them ends.
    """

    cfg: GrpoConfig | SftConfig
    launch: Launch
    policy: Policy  # of meta_policy
    length: Length
    num_new: int  # tokens of a completion
    num_decoded: int  # tokens of the longest completion
    device: Device

    @cached_property
    def params(self) -> list[Tensor]:
        return list(self.policy.parameters())

    @cached_property
    def trained(self) -> list[Tensor]:
        return [p for p in self.params if p.requires_grad]

    @property
    def parameters(self) -> dict[str, int]:
        """How many there are."""
        total, vision = _count(self.params), _count(self.policy.model.model.visual.parameters())
        return {"total": total, "vision": vision, "text": total - vision, "trained": _count(self.trained)}

    @property
    def share(self) -> int:
        """Videos of a process in a step."""
        return self.cfg.data.batch_size // self.launch.processes

    @property
    def keeps_gradients(self) -> bool:
        """Whether they come as activations go. With a second micro-batch they are there from the start."""
        return not self.launch.stage and self.share <= self.cfg.data.micro_batch_size

    @cached_property
    def state(self) -> tuple[int, Phase]:
        """Bytes of the optimizer's state on one device, and what its step takes beside it."""
        if self.launch.offload_optimizer:
            return 0, Phase()
        if self.launch.stage:
            num = _count(self.trained) / self.launch.processes
            work = 4 * num if self.launch.stage == 2 else 8 * min(num, SUB_GROUP)
            seconds = 28 * num / self.device.bytes  # 16 bytes of a parameter are read, 12 written
            return int(12 * num), Phase(peak=int(work), seconds=seconds)
        optimizer, run = make_optimizer(self.policy, self.cfg.optim), DryRun(self.device)
        for group in optimizer.param_groups:
            group["foreach"] = self.device.type == "cuda"  # as torch chooses: all parameters in one call
        state = optimize(run, optimizer)
        phase = run.phases["optimizer"]
        return state, replace(phase, held=0, peak=phase.peak - state)

    @cached_property
    def resident(self) -> dict[str, int]:
        """Bytes that a device holds from step to step, see the head of this file."""
        cfg, launch, num, size = self.cfg, self.launch, _count(self.trained), self.params[0].itemsize
        weights, gradients = _bytes(self.params), _bytes(self.trained)
        buffers = gradients if launch.processes > 1 else 0
        if launch.stage:
            gradients = 0 if launch.offload_optimizer else 4 * num // launch.processes
            buffers = size * min(launch.bucket, num)
        if launch.stage == 3:
            buffers += size * min(launch.live, _count(self.params))
            weights = 0 if launch.offload_params else weights // launch.processes
        has_reference = isinstance(cfg, GrpoConfig) and cfg.loss.beta > 0 and not cfg.model.lora_rank
        found = {"weights": weights, "reference": weights * has_reference, "gradients": gradients}
        return found | {"optimizer": self.state[0], "buffers": buffers}

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint of all processes, but for random states and the like."""
        weights = _bytes(self.params)
        if not self.launch.stage:
            return weights + self.state[0]
        if self.launch.stage == 3:  # what is trained is there in float32 alone
            weights -= _bytes(self.trained)
        return weights + 12 * _count(self.trained)

    @property
    def host(self) -> int:
        """Bytes of a process that DeepSpeed keeps on the host: what is offloaded."""
        weights = _bytes(self.params) if self.launch.offload_params else 0
        state = 16 * _count(self.trained) if self.launch.offload_optimizer else 0
        return (weights + state) // self.launch.processes

    def prompts(self, num: int) -> list[Prompt]:
        """Prompts of one length, each with its video's patches."""
        length, vision = self.length, self.policy.model.config.vision_config
        size = math.prod(length.grid_thw), 3 * vision.temporal_patch_size * vision.patch_size**2
        pad = self.policy.model.config.video_token_id
        ids = [0] * length.before + [pad] * length.video + [0] * length.after
        videos = [Video(torch.empty(size, device=META), length.grid_thw, 1.0, [], length.video, 0) for _ in range(num)]
        return [Prompt(None, ids, length.before, video) for video in videos]

    @cached_property
    def run(self) -> DryRun:
        """The phases of a step on one device, and its KV cache."""
        cfg, policy, run, share = self.cfg, self.policy, DryRun(self.device), self.share
        num, is_grpo = min(cfg.data.micro_batch_size, share), isinstance(cfg, GrpoConfig)
        with run:
            prompts = self.prompts(share * (1 + cfg.group.max_refills) if is_grpo else share)
            call = Call(prompts[:num], (), 1, self.num_new, share / num)
            if is_grpo:
                run.begin("vision")
                embeds = policy.embed_each(prompts[:share])
                some, group_size = min(cfg.rollout.micro_batch_size, share), cfg.rollout.group_size
                sample(run, policy, Call(prompts[:some], embeds[:some], group_size, self.num_decoded, share / some))
                call = replace(call, embeds=embeds[:num] if policy.vision_is_frozen else (), group_size=group_size)
                if cfg.loss.beta:
                    score(run, policy, call)
                call = replace(call, repeat=call.repeat * cfg.loss.updates_per_rollout)
            update(run, policy, call, is_grpo and cfg.loss.entropy != 0, self.keeps_gradients)
        policy.zero_grad()
        patches, optimizer = sum(prompt.video.patches.nbytes for prompt in prompts), self.state[1]
        run.phases["optimizer"] = replace(optimizer, held=patches, peak=patches + optimizer.peak)
        if cfg.data.validation and cfg.eval.every:
            run.phases["validation"] = Phase(held=patches, peak=patches + self._validation())
        return run

    def _validation(self) -> int:
        """Bytes at the most, of greedy answers to as many prompts as `eval` asks at a time."""
        cfg, run = self.cfg.eval, DryRun(self.device)
        num = min(cfg.batch_size, -(-(cfg.num_samples or cfg.batch_size) // self.launch.processes))
        with run:
            run.begin("vision")
            prompts = self.prompts(num)
            sample(run, self.policy, Call(prompts, self.policy.embed_each(prompts), 1, cfg.max_new_tokens, 1))
        return max(phase.peak for phase in run.phases.values())

    @cached_property
    def totals(self) -> dict[str, int]:
        """Bytes of a device at the most, in every phase: what it holds all the time and what the phase takes."""
        held, stage, totals = self.resident, self.launch.stage, {}
        for name, phase in self.run.phases.items():
            total = held["weights"] + held["reference"] + held["optimizer"] + phase.peak
            if stage == 3 or name == "optimizer" or (name in SCORING and not self.keeps_gradients):
                total += held["gradients"]  # else they are cleared after a step
            if stage != 2 or name in SCORING:
                total += held["buffers"]
            if stage == 3 and name in SAMPLING:
                total += _bytes(self.params)
            totals[name] = total
        return totals

    @property
    def peak(self) -> tuple[str, int]:
        """The phase with the most memory, and its bytes."""
        return max(self.totals.items(), key=lambda item: item[1])


def _count(params: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in params)


def _bytes(params: Iterable[Tensor]) -> int:
    return sum(p.nbytes for p in params)
