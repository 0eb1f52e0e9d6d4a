"""What a run will cost, before a GPU is touched: tokens, memory of a device, FLOPs, seconds, and what does not fit.

    python train_grpo.py --config configs/grpo_qwen2_5_vl_3b_charades.yaml --plan configs/accelerate/zero2.yaml
    python train_grpo.py --config configs/tiny.yaml --plan plan.memory_gib=24 plan.tflops=100

Needs the configuration, the model's config.json and the annotations; no weights, no GPU, no video (with none, and no
manifest, frame sizes are assumed). Token counts are the loader's own (preflight/lengths.py), memory and FLOPs of a
step those of the training code on tensors without data (preflight/costs.py). Not known beforehand is how long completions are:
memory is for `rollout.max_new_tokens`, the update's time for the mean `plan.completion_tokens`, and decoding's for the longest of a
step, `plan.longest_tokens`, because rows that have ended keep running until that one ends. Not counted is
communication.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from config import GrpoConfig, PlanConfig, SftConfig
from model.folder import FAMILIES, check_found
from preflight.costs import SCORING, Case, Launch, read_launch
from preflight.dryrun import Phase, Speed
from preflight.lengths import Length, RoughTokenizer, measure
from prompts import PromptBuilder
from records.files import read_samples
from records.record import Sample
from runtime.engine import check_batch
from video.budget import Geometry

GIB = 2**30
RESERVE_GIB = 2.0  # for the CUDA context, NCCL and what the allocator cannot use: not calculated
MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"  # published config.json of the recipes' models
TOKENS = ("video", "prompt", "completion", "row")


@dataclass(frozen=True)
class Plan:
    """What `--plan` prints."""

    launch: Launch
    num_samples: int
    steps_per_epoch: float
    tokens: dict[str, tuple[float, float, float, float]]  # min, mean, 95th percentile, max; by `TOKENS`
    parameters: dict[str, int]  # total, vision, text, trained
    resident: dict[str, int]  # bytes that a device holds all the time
    host: int  # bytes of a process that are offloaded to the host
    phases: dict[str, Phase]  # with the mean length: their FLOPs and seconds are those of a step, on one device
    longest: dict[str, Phase]  # with the longest
    totals: dict[str, int]  # bytes on a device in each phase, with the mean length
    longest_totals: dict[str, int]
    cache: int  # bytes of the KV cache at its largest
    sampled_tokens: float  # of a step, on all devices
    decoded: int  # tokens of a step's longest completion; 0 where nothing is sampled
    checkpoint: int  # bytes on the disk
    notes: list[str]
    knobs: list[tuple[str, int]]  # where it does not fit: what to change, and the bytes that are needed then

    @property
    def peak(self) -> int:
        """Bytes that a device needs at the most."""
        return max(self.longest_totals.values())

    @property
    def peak_phase(self) -> str:
        return max(self.longest_totals, key=self.longest_totals.get)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def flops(self) -> float:
        """Of a step, on all devices."""
        return sum(phase.flops for phase in self.phases.values()) * self.launch.processes


def read_model(path: str) -> tuple:
    """Configuration and tokenizer of `model.path`, and what to say about them.

    Nothing is fetched for a model of the recipes, whose config.json is in configs/models. Raises ValueError.
    """
    notes, kept = [], MODELS / path
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as missing:
        try:
            is_kept = kept.is_dir() and not Path(path).is_dir()
            if not is_kept:
                check_found(path)
            config = AutoConfig.from_pretrained(kept if is_kept else path)
        except (OSError, ValueError):
            reason = " ".join(str(missing).split())[:200]
            raise ValueError(
                f"model.path {path}: no config.json that can be read ({reason}); a folder with it alone will do"
            ) from None
    if config.model_type not in FAMILIES:
        raise ValueError(f"model.path {path}: family {config.model_type} is not one of {', '.join(FAMILIES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is None or not tokenizer.chat_template:  # of a folder without its files one is made that knows nothing
        notes.append("no tokenizer of model.path on this machine: texts are taken at 4 characters a token")
        tokenizer = RoughTokenizer(config.text_config.vocab_size)
    return config, tokenizer, notes


def plan(
    cfg: GrpoConfig | SftConfig,
    assumed: PlanConfig | None = None,
    target_text: Callable[[Sample], str] | None = None,
    device: str = "cuda",
) -> Plan:
    """The plan of a run; `target_text` gives the response to imitate, for supervised tuning.

    Raises ValueError and FileNotFoundError, in one line, for what training would refuse and for what is missing.
    """
    assumed = assumed or PlanConfig()
    launch, notes = _choose_launch(cfg, assumed.engine)
    model, tokenizer, found = read_model(cfg.model.path)
    data, is_grpo = cfg.data, isinstance(cfg, GrpoConfig)
    samples = read_samples(
        data.train, data.out_of_clip, cfg.run.seed, data.manifest, need_videos=False, chat=not is_grpo
    )
    lengths, source = _measure(samples, cfg, model, tokenizer, target_text)
    speed = Speed(assumed.tflops * 1e12, assumed.bandwidth * 1e12, assumed.launch_us * 1e-6)
    tokens, mean, longest = _tokens(lengths, cfg, assumed)
    capability = divmod(round(10 * assumed.capability), 10)
    case = Case(cfg, launch, model, tokenizer, *longest, speed, device, capability)
    usual = replace(case, length=mean[0], num_new=mean[1], num_decoded=mean[2])
    too_much = case.peak[1] > (assumed.memory_gib - RESERVE_GIB) * GIB
    params, trained = (
        list(case.policy.parameters()),
        sum(p.numel() for p in case.policy.parameters() if p.requires_grad),
    )
    vision = sum(p.numel() for p in case.policy.model.model.visual.parameters())
    total = sum(p.numel() for p in params)
    return Plan(
        launch=launch,
        num_samples=len(samples),
        steps_per_epoch=len(samples) / data.batch_size,
        tokens=tokens,
        parameters={"total": total, "vision": vision, "text": total - vision, "trained": trained},
        resident=case.resident,
        host=case.host,
        phases=usual.run[0],
        longest=case.run[0],
        totals=usual.totals,
        longest_totals=case.totals,
        cache=case.run[1],
        sampled_tokens=data.batch_size * cfg.rollout.group_size * mean[1] if is_grpo else 0,
        decoded=mean[2] if is_grpo else 0,
        checkpoint=case.checkpoint,
        notes=[*notes, *found, source],
        knobs=_try_knobs(case) if too_much else [],
    )


def _choose_launch(cfg: GrpoConfig | SftConfig, file: str) -> tuple[Launch, list[str]]:
    """The processes of the run. Raises ValueError where training would not start."""
    launch, notes = read_launch(file), []
    if cfg.model.dtype == "bfloat16" and not cfg.model.lora_rank and not launch.stage:
        if file or launch.processes > 1:
            raise ValueError(f"model.dtype=bfloat16 trains with adapters or under DeepSpeed, not under {launch}")
        launch = replace(launch, stage=2)
        notes.append("model.dtype=bfloat16 trains under DeepSpeed: ZeRO-2 on one process is assumed; name its file")
    if cfg.optim.muon_lr and launch.stage:
        raise ValueError(f"optim.muon_lr needs whole matrices, and {launch} cuts them up")
    check_batch(cfg.data.batch_size, launch.processes)
    return launch, notes


def _measure(samples: Sequence, cfg: GrpoConfig | SftConfig, model, tokenizer, target_text=None) -> tuple[list, str]:
    vision = model.vision_config
    geometry = Geometry(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, (), ())
    builder = PromptBuilder(tokenizer, cfg.prompt)
    return measure(samples, builder, cfg.video, geometry, cfg.data.manifest, target_text)


def _tokens(lengths: Sequence[Length], cfg: GrpoConfig | SftConfig, assumed: PlanConfig) -> tuple[dict, tuple, tuple]:
    """Statistics by `TOKENS`; of a mean and of the longest row its record's length, tokens of a completion and of the
    longest completion."""
    found = {"video": np.array([length.video for length in lengths])}
    found["prompt"] = np.array([length.prompt for length in lengths])
    if isinstance(cfg, GrpoConfig):
        most, group_size = cfg.rollout.max_new_tokens, cfg.rollout.group_size
        decoded = min(assumed.longest_tokens, most) or most
        usual = min(assumed.completion_tokens, decoded) or decoded
        statistics = {"completion": (1, usual, most, most)}
    else:
        targets = np.array([length.target for length in lengths])
        most, usual, group_size = int(targets.max()), round(targets.mean()), 1
        decoded = usual
        statistics = {"completion": _statistics(targets)}
    found = {name: _statistics(values) for name, values in found.items()}
    rows = zip(found["prompt"], statistics["completion"], strict=True)
    statistics = found | statistics | {"row": tuple(prompt + group_size * new for prompt, new in rows)}
    near = min(lengths, key=lambda length: abs(length.prompt - found["prompt"][1]))
    return statistics, (near, usual, decoded), (max(lengths, key=lambda length: length.prompt), most, most)


def _statistics(values: np.ndarray) -> tuple[float, float, float, float]:
    return float(values.min()), float(values.mean()), float(np.percentile(values, 95)), float(values.max())


def _try_knobs(case: Case) -> list[tuple[str, int]]:
    """Single changes and the bytes that are needed with each, the best first: of what takes the most memory."""
    phase, total = case.peak
    changes = _resident_knobs(case) if case.run[0][phase].peak < total / 2 else _phase_knobs(case, phase)
    tried = [(text, changed.peak[1]) for text, changed in changes]
    return sorted((pair for pair in tried if pair[1] < 0.98 * total), key=lambda pair: pair[1])


def _resident_knobs(case: Case) -> Iterator[tuple[str, Case]]:
    cfg, launch = case.cfg, case.launch
    for stage in (2, 3):
        if launch.stage < stage and launch.processes > 1:
            yield f"ZeRO-{stage}", replace(case, launch=replace(launch, stage=stage))
    if not launch.offload_optimizer:
        offloaded = replace(launch, stage=launch.stage or 2, offload_optimizer=True)
        yield f"{offloaded}", replace(case, launch=offloaded)
    if launch.stage and cfg.data.batch_size % (2 * launch.processes) == 0:
        twice = replace(launch, processes=2 * launch.processes)
        yield f"{twice}", replace(case, launch=twice)
    changes = {"loss.beta": 0.0, "model.freeze_vision": True}
    for key, value in changes.items():
        if (isinstance(cfg, GrpoConfig) or "loss" not in key) and _value(cfg, key) != value:
            yield f"{key}={str(value).lower()}", replace(case, cfg=_with(cfg, {key: value}))
    if not cfg.model.lora_rank:
        adapters = {"model.freeze_vision": True, "model.lora_rank": 16}
        yield "model.freeze_vision=true model.lora_rank=16", replace(case, cfg=_with(cfg, adapters))


def _phase_knobs(case: Case, phase: str) -> Iterator[tuple[str, Case]]:
    """Of a phase: half of what makes its tensors large."""
    cfg, is_grpo = case.cfg, isinstance(case.cfg, GrpoConfig)
    if phase in SCORING and not cfg.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", replace(case, cfg=_with(cfg, {"model.gradient_checkpointing": True}))
    sizes = {"validation": "eval.batch_size"} | dict.fromkeys(SCORING, "data.micro_batch_size")
    keys = [sizes.get(phase, "rollout.micro_batch_size" if is_grpo else "data.micro_batch_size"), "video.total_pixels"]
    keys += ["rollout.max_new_tokens", "rollout.group_size"] if is_grpo else []
    for key in keys:
        half = _value(cfg, key) // 2
        if half >= (2 if key == "rollout.group_size" else 1):
            changed = replace(case, cfg=_with(cfg, {key: half}))
            if key == "rollout.max_new_tokens":
                changed = replace(changed, num_new=half, num_decoded=half)
            if key == "video.total_pixels":
                (length,), _ = _measure([case.length.sample], changed.cfg, case.model, case.tokenizer)
                changed = replace(changed, length=length)
            yield f"{key}={half}", changed


def _value(cfg, key: str):
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


def _with(cfg, values: dict):
    """A configuration with other values at `section.key`."""
    sections = {key.split(".")[0] for key in values}
    return replace(
        cfg,
        **{
            section: replace(
                getattr(cfg, section), **{k.split(".")[1]: v for k, v in values.items() if k.startswith(f"{section}.")}
            )
            for section in sections
        },
    )


def report(found: Plan, cfg: GrpoConfig | SftConfig, assumed: PlanConfig) -> str:
    """The plan as a table."""
    lines = [f"{cfg.model.path}; {found.launch}; {cfg.data.batch_size} videos a step", *found.notes, ""]
    lines.append(f"{'tokens':<20}{'min':>10}{'mean':>10}{'p95':>10}{'max':>10}")
    names = {"video": "video", "prompt": "prompt, with video", "completion": "completion", "row": "row of the update"}
    for name in TOKENS:
        lines.append(f"{names[name]:<20}" + "".join(f"{value:10,.0f}" for value in found.tokens[name]))
    counts = ", ".join(f"{name} {count:,}" for name, count in found.parameters.items())
    held = ", ".join(f"{name} {_gib(size)}" for name, size in found.resident.items())
    lines += ["", f"parameters: {counts}", f"held all the time by a device, GiB: {held}"]
    if found.host:
        lines.append(f"held by the host for each process, GiB: {_gib(found.host)}")
    lines += ["", f"{'':<12}{'mean lengths, one device':>40}{'longest, GiB':>26}"]
    lines.append(f"{'phase':<12}{'GiB, own':>10}{'in all':>10}{'TFLOP':>10}{'s':>10}{'own':>16}{'in all':>10}")
    for name, phase in found.phases.items():
        row = f"{name:<12}{_gib(phase.peak):>10}{_gib(found.totals[name]):>10}"
        row += f"{_short(phase.flops / 1e12):>10}{_short(phase.seconds):>10}"
        lines.append(f"{row}{_gib(found.longest[name].peak):>16}{_gib(found.longest_totals[name]):>10}")
    return "\n".join([*lines, "", *_verdict(found, cfg, assumed)])


def _verdict(found: Plan, cfg: GrpoConfig | SftConfig, assumed: PlanConfig) -> Iterator[str]:
    kept = found.longest["head"].held - found.longest["forward"].held
    activations = f"{_gib(kept)} GiB of activations are kept for backward"
    yield activations + (f"; the KV cache grows to {_gib(found.cache)} GiB" if found.cache else "")
    sampled = f", {found.sampled_tokens:,.0f} tokens sampled" if found.sampled_tokens else ""
    yield (
        f"a step: {_short(found.seconds)} s at {assumed.tflops:g} TFLOP/s and {assumed.bandwidth:g} TB/s, without "
        f"communication; {_short(found.flops / 1e12)} TFLOP on all devices{sampled}"
    )
    if found.decoded:
        yield (
            f"    with {found.tokens['completion'][1]:,.0f} tokens a completion in the update (the mean, "
            f"plan.completion_tokens) and {found.decoded:,} in decoding (the longest of a step, plan.longest_tokens): "
            f"rows that have ended run on until the longest ends"
        )
    epochs, hours = cfg.run.steps / found.steps_per_epoch, found.seconds * cfg.run.steps / 3600
    yield (
        f"{found.num_samples:,} records: {found.steps_per_epoch:,.1f} steps an epoch; run.steps={cfg.run.steps} is "
        f"{epochs:.2f} epochs, {_short(hours)} hours"
    )
    fits = found.peak + RESERVE_GIB * GIB <= assumed.memory_gib * GIB
    yield (
        f"memory: {_gib(found.peak)} GiB in phase {found.peak_phase}, and {RESERVE_GIB:g} for CUDA, NCCL and "
        f"fragmentation: {'fits' if fits else 'DOES NOT FIT'} in {assumed.memory_gib:g} GiB"
    )
    for text, size in found.knobs:
        yield f"    {_gib(size):>8} GiB with {text}"
    keep, size = cfg.run.keep_checkpoints, found.checkpoint / 1e9
    yield (
        f"disk: {_short(size)} GB a checkpoint, {_short((keep + 1) * size)} GB while one is written beside the "
        f"run.keep_checkpoints={keep} before it"
    )


def _gib(num_bytes: float) -> str:
    return _short(num_bytes / GIB)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def show(cfg: GrpoConfig | SftConfig, assumed: PlanConfig, target_text: Callable[[Sample], str] | None = None) -> None:
    """Print the plan, on the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(report(plan(cfg, assumed, target_text), cfg, assumed))
