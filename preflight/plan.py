"""What a run will cost, before a GPU is touched: tokens, memory of a device, FLOPs, seconds, and whether it fits.

    python train_grpo.py --config configs/grpo_qwen2_5_vl_3b_charades.yaml --plan configs/accelerate/zero2.yaml
    python train_grpo.py --config configs/tiny.yaml --plan plan.memory_gib=24 plan.tflops=100

A plan needs the configuration, the model's config.json and the annotations, but no weights, no GPU and no video: frame
sizes are assumed where there is neither a video nor a manifest. Token counts are the loader's own
(preflight/lengths.py), and memory and FLOPs are those of the training code on tensors without data
(preflight/costs.py). Nobody knows beforehand how long completions will be. Memory is for `rollout.max_new_tokens`, the
update's time for the mean `plan.completion_tokens`, and decoding's time for the longest completion of a step,
`plan.longest_tokens`, because rows that have ended keep running until that one ends. Communication is not counted.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from config import GrpoConfig, SftConfig
from model.folder import read_config
from preflight.costs import Case, Launch, read_launch
from preflight.dryrun import Device, meta_policy
from preflight.lengths import Length, RoughTokenizer, measure
from prompts import PromptBuilder
from records.files import read_samples
from records.record import Sample
from runtime.arguments import PlanConfig
from runtime.engine import check_batch
from video.budget import Geometry

GIB = 2**30
RESERVE_GIB = 2.0  # for the CUDA context, NCCL and what the allocator cannot use: not calculated
MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"  # published config.json of the recipes' models
ROWS = {"video": "video", "prompt": "prompt, with video", "completion": "completion", "row": "row of the update"}
Statistics = tuple[float, float, float, float]  # min, mean, 95th percentile, max


@dataclass(frozen=True)
class Plan:
    """What `--plan` prints."""

    assumed: PlanConfig
    num_samples: int
    tokens: dict[str, Statistics]  # by the keys of ROWS
    mean: Case  # a step with the mean lengths, for FLOPs and seconds
    longest: Case  # a step with the longest, for memory
    notes: list[str]


def read_model(path: str) -> tuple:
    """Configuration and tokenizer of `model.path`, and what to say about them.

    Nothing is fetched for a model of the recipes, whose config.json is in configs/models. Raises ValueError.
    """
    is_kept = (MODELS / path / "config.json").is_file() and not Path(path).is_dir()
    try:
        config = read_config(MODELS / path if is_kept else path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.path {path}: no config.json to plan with ({reason}); a folder with it alone will do"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer and tokenizer.chat_template:  # of a folder without its files one is made that knows nothing
        return config, tokenizer, []
    note = "no tokenizer of model.path on this machine: texts are taken at 4 characters a token"
    return config, RoughTokenizer(config.text_config.vocab_size), [note]


def plan(
    cfg: GrpoConfig | SftConfig,
    assumed: PlanConfig | None = None,
    target_text: Callable[[Sample], str] | None = None,
    device: str = "cuda",
) -> Plan:
    """The plan of a run; `target_text` gives the response to imitate, for supervised tuning.

    Raises ValueError and FileNotFoundError, in one line, for what training would refuse and for what is missing.
    """
    assumed, data = assumed or PlanConfig(), cfg.data
    launch, notes = _choose_launch(cfg, assumed.engine)
    model, tokenizer, found = read_model(cfg.model.path)
    samples = read_samples(
        data.train, data.out_of_clip, cfg.run.seed, data.manifest, need_videos=False, chat=isinstance(cfg, SftConfig)
    )
    vision = model.vision_config
    geometry = Geometry(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, (), ())
    builder = PromptBuilder(tokenizer, cfg.prompt)
    lengths, source = measure(samples, builder, cfg.video, geometry, data.manifest, target_text)
    capability = divmod(round(10 * assumed.capability), 10)
    reached = Device(assumed.tflops * 1e12, assumed.bandwidth * 1e12, assumed.launch_us * 1e-6, device, capability)
    tokens, mean, longest = _tokens(lengths, cfg, assumed)
    policy = meta_policy(cfg.model, model, tokenizer)
    cases = [Case(cfg, launch, policy, *length, reached) for length in (mean, longest)]
    return Plan(assumed, len(samples), tokens, *cases, [*notes, *found, source])


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


def _tokens(
    lengths: Sequence[Length], cfg: GrpoConfig | SftConfig, assumed: PlanConfig
) -> tuple[dict[str, Statistics], tuple[Length, int, int], tuple[Length, int, int]]:
    """Statistics by the keys of ROWS, and of the mean and of the longest case the length of its record, the tokens of
    its completions and of the longest completion."""
    video, prompt = (_statistics([getattr(length, name) for length in lengths]) for name in ("video", "prompt"))
    if isinstance(cfg, GrpoConfig):
        group_size, most = cfg.rollout.group_size, cfg.rollout.max_new_tokens
        decoded = min(assumed.longest_tokens, most) or most
        usual = min(assumed.completion_tokens, decoded) or decoded
        completion = (1, usual, most, most)
    else:
        group_size, completion = 1, _statistics([length.target for length in lengths])
        usual = decoded = round(completion[1])
        most = int(completion[3])
    row = tuple(before + group_size * new for before, new in zip(prompt, completion, strict=True))
    near = min(lengths, key=lambda length: abs(length.prompt - prompt[1]))
    far = max(lengths, key=lambda length: length.prompt)
    return dict(zip(ROWS, (video, prompt, completion, row))), (near, usual, decoded), (far, most, most)


def _statistics(values: list[int]) -> Statistics:
    return float(min(values)), float(np.mean(values)), float(np.percentile(values, 95)), float(max(values))


def report(found: Plan) -> str:
    """The plan as a table."""
    mean, longest, cfg = found.mean, found.longest, found.mean.cfg
    lines = [f"{cfg.model.path}; {mean.launch}; {cfg.data.batch_size} videos a step", *found.notes, ""]
    lines.append(f"{'tokens':<20}{'min':>10}{'mean':>10}{'p95':>10}{'max':>10}")
    lines += [f"{ROWS[name]:<20}" + "".join(f"{x:10,.0f}" for x in values) for name, values in found.tokens.items()]
    counts = ", ".join(f"{name} {count:,}" for name, count in longest.parameters.items())
    held = ", ".join(f"{name} {_gib(size)}" for name, size in longest.resident.items())
    lines += ["", f"parameters: {counts}", f"held all the time by a device, GiB: {held}"]
    if longest.host:
        lines.append(f"held by the host for each process, GiB: {_gib(longest.host)}")
    lines += ["", f"{'':<12}{'mean lengths, one device':>40}{'longest, GiB':>26}"]
    lines.append(f"{'phase':<12}{'GiB, own':>10}{'in all':>10}{'TFLOP':>10}{'s':>10}{'own':>16}{'in all':>10}")
    for name, phase in mean.run.phases.items():
        row = f"{name:<12}{_gib(phase.peak):>10}{_gib(mean.totals[name]):>10}"
        row += f"{_short(phase.flops / 1e12):>10}{_short(phase.seconds):>10}"
        lines.append(f"{row}{_gib(longest.run.phases[name].peak):>16}{_gib(longest.totals[name]):>10}")
    return "\n".join([*lines, "", *_verdict(found, cfg, found.assumed)])


def _verdict(found: Plan, cfg: GrpoConfig | SftConfig, assumed: PlanConfig) -> Iterator[str]:
    mean, longest, num_new = found.mean, found.longest.run, found.tokens["completion"][1]
    kept = longest.phases["head"].held - longest.phases["forward"].held
    cache = f"; the KV cache grows to {_gib(longest.cache)} GiB" if longest.cache else ""
    yield f"{_gib(kept)} GiB of activations are kept for backward{cache}"
    num_sampled = cfg.data.batch_size * cfg.rollout.group_size * num_new if isinstance(cfg, GrpoConfig) else 0
    sampled = f", {num_sampled:,.0f} tokens sampled" if num_sampled else ""
    seconds, flops = (sum(getattr(x, name) for x in mean.run.phases.values()) for name in ("seconds", "flops"))
    yield (
        f"a step: {_short(seconds)} s at {assumed.tflops:g} TFLOP/s and {assumed.bandwidth:g} TB/s, without "
        f"communication; {_short(flops * mean.launch.processes / 1e12)} TFLOP on all devices{sampled}"
    )
    if num_sampled:
        yield (
            f"    with {num_new:,.0f} tokens a completion in the update (the mean, plan.completion_tokens) and "
            f"{mean.num_decoded:,} in decoding (the longest of a step, plan.longest_tokens): rows that have ended run "
            "on until the longest ends"
        )
    epoch, hours = found.num_samples / cfg.data.batch_size, seconds * cfg.run.steps / 3600
    yield (
        f"{found.num_samples:,} records: {epoch:,.1f} steps an epoch; run.steps={cfg.run.steps} is "
        f"{cfg.run.steps / epoch:.2f} epochs, {_short(hours)} hours"
    )
    phase, peak = found.longest.peak
    missing = peak + RESERVE_GIB * GIB - assumed.memory_gib * GIB
    verdict = f"DOES NOT FIT in {assumed.memory_gib:g} GiB" if missing > 0 else f"fits in {assumed.memory_gib:g} GiB"
    yield (
        f"memory: {_gib(peak)} GiB in phase {phase}, and {RESERVE_GIB:g} for CUDA, NCCL and fragmentation: {verdict}"
        + (f", {_gib(missing)} GiB are missing" if missing > 0 else "")
    )
    keep, size = cfg.run.keep_checkpoints, found.longest.checkpoint / 1e9
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
        print(report(plan(cfg, assumed, target_text)))
