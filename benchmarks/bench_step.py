"""One whole GRPO step, ours against the way public trainers do it: time, memory and agreement.

    python benchmarks/bench_step.py [--sizes 1046,64,8 1046,64,16] [--repeats 5] [--figure step_ratio.png]
    python benchmarks/bench_step.py --model 3b --checkpointing    # on a GPU; random weights of Qwen2.5-VL-3B's shapes

A step reads a clip, runs the vision tower, samples G completions of exactly C tokens after a prompt of P, rewards
them, scores them under a reference model, and updates the policy (AdamW, learning rate 0, so that every step does the
same). Both ways have equal weights, inputs, seeds and tokens, and take turns in one process; their tower is frozen.

    ours       train_grpo.collect_groups and train_grpo.update, as `train` calls them
    repeated   Hugging Face's generate with the tower run for every row, then reference and policy forwards over G rows
               of P + C tokens, the tower run for every row again; the head on completion tokens only, which not all
               public trainers do

Ratios are repeated / ours, more is better; the token ratio is G (P + C) / (P + G C). Memory is the peak of a phase
above what was held before the step. `generate` is tower and sampling, `update` the policy's forward, backward and
optimizer step without the reference. The last line is JSON for (1046, 64, 8), or the last size without it.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import torch
from bench_prefix import make_inputs, make_policy, sample, score, status_kib
from matplotlib.figure import Figure
from torch import Tensor

from config import DataConfig, GrpoConfig, LossConfig, ModelConfig, RolloutConfig, RunConfig, VideoConfig
from grpo import group_advantages, policy_loss, token_weights
from loader import Round
from policy import Policy
from prompts import Prompt
from records import Sample
from reward_functions import RewardFunction
from rollout import Rollout
from run import Run, environment
from train_grpo import collect_groups, score_groups, update
from video import load_video, read_geometry

SIZES = [(278, 32, 8), (1046, 64, 8), (2070, 64, 8), (1046, 64, 16)]  # (P, C, G); 22 tokens of each prompt are text
MAIN_SIZE = (1046, 64, 8)
PHASES = ("data", "generate", "reward", "reference", "update")
SIDE, CLIP_FPS = 112, 2  # pixels, of square frames: 16 tokens each two frames
SPEC = VideoConfig(fps=CLIP_FPS, max_frames=4096, total_pixels=2**30)


class Meter:
    """Seconds by phase, or with `memory` the peak MiB of each above what was held at the start of the step."""

    def __init__(self, memory: bool = False):
        self.memory, self.found = memory, dict.fromkeys(PHASES, 0.0)
        self.base = held_mib(start_again=True) if memory else 0.0

    @contextmanager
    def __call__(self, phase: str):
        if self.memory:
            held_mib(start_again=True)
            yield
            self.found[phase] = max(self.found[phase], peak_held_mib() - self.base)
            return
        start = now()
        yield
        self.found[phase] += now() - start


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def held_mib(start_again: bool) -> float:
    """Memory held now, of the CUDA device or of the process; the peak starts again from it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory kept from earlier calls would hide what this one uses
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    return status_kib("VmRSS") / 2**10


def peak_held_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return status_kib("VmHWM") / 2**10


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
        geometry = read_geometry(self.cfg.model.path)
        return [dataclasses.replace(prompt, video=load_video(self.clip, SPEC, geometry)) for prompt in self.prompts]


def first_letters(completions: Sequence[str], **_) -> list[float]:
    """A reward that differs between the completions of a random model, so that every group has a gradient."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


FUNCTIONS = [RewardFunction("letters", first_letters, 1.0)]


def ours(bench: Bench, meter: Meter) -> tuple[Tensor, Tensor]:
    """A step of train_grpo; tokens (B, C) and the log-probs they were sampled with."""

    def read(step: int) -> Round:
        prompts, num = bench.read(), len(bench.prompts)
        return Round(prompts, list(range(num)), num, list(range(num)), [0] * num, list(range(num)))

    loader = SimpleNamespace(batch=read, samples=bench.prompts, order=SimpleNamespace(visited=lambda *_: None))
    names = {"vision": "generate", "rollout": "generate"}
    groups = collect_groups(
        bench.policy, loader, FUNCTIONS, bench.cfg, 0, bench.run, lambda phase: meter(names.get(phase, phase))
    )
    marks: list[float] = []
    hooks = [bench.reference.register_forward_pre_hook(lambda *_: marks.append(now()))]
    hooks += [bench.reference.register_forward_hook(lambda *_: marks.append(now()))]
    with meter("update"):
        update(bench.policy, bench.reference, bench.optimizer, groups, bench.cfg, bench.run)
    for hook in hooks:
        hook.remove()
    if not meter.memory:
        meter.found["reference"] = sum(marks[1::2]) - sum(marks[::2])
        meter.found["update"] -= meter.found["reference"]
    return groups.rollout.tokens_BT, groups.rollout.logps_BT


def repeated(bench: Bench, meter: Meter) -> tuple[Tensor, Tensor]:
    """A step as public trainers take it, one video after the other; returns what `ours` does."""
    cfg, policy = bench.cfg, bench.policy
    size, num = cfg.rollout.group_size, cfg.rollout.max_new_tokens
    with meter("data"):
        prompts = bench.read()
    with meter("generate"), torch.no_grad():
        sampled = [sample(policy, prompt, [[0] * num] * size, tower_runs=size) for prompt in prompts]
    tokens_BT, logps_BT = (torch.cat(parts) for parts in zip(*sampled))
    with meter("reward"):
        texts = policy.tokenizer.batch_decode(tokens_BT, skip_special_tokens=False)
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        rollout = Rollout(tuple(prompts), tokens_BT, mask_BT, logps_BT, mask_BT[:, 0], texts)
        totals_PG = score_groups(rollout, FUNCTIONS, cfg, 0)[1][..., 0]
    loss_cfg = cfg.loss
    advantages_PG = group_advantages(
        totals_PG, loss_cfg.std_eps, loss_cfg.baseline, loss_cfg.scale, cfg.group.tolerance
    )
    weights_BT = token_weights(
        mask_BT, loss_cfg.aggregation, num_tokens=mask_BT.sum().item(), num_completions=len(mask_BT), max_tokens=num
    )
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
                ref_logps_BT=ref_logps_BT,
                beta=loss_cfg.beta,
            )
            loss.backward()
    with meter("update"):
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.optim.grad_clip)
        bench.optimizer.step()
        bench.optimizer.zero_grad()
    return tokens_BT, logps_BT


WAYS = {"ours": ours, "repeated": repeated}


def write_clip(path: Path, num_frames: int) -> None:
    """Drifting gradients, so that frames differ and compress as videos do."""
    ramp = np.linspace(0, 255, SIDE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=CLIP_FPS)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for i in range(num_frames):
            planes = [np.roll(ramp, shift)[None].repeat(SIDE, 0) for shift in (i, -i, 3 * i)]
            pixels = np.stack([planes[0], planes[1].T, planes[2]], axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_bench(policy: Policy, reference: Policy, size: tuple[int, int, int], num_videos: int, folder: Path) -> Bench:
    p, c, g = size
    write_clip(folder / "clip.mp4", 2 * ((p - 22) // 16))
    cfg = GrpoConfig(
        run=RunConfig(dir=str(folder / f"run_{p}_{c}_{g}"), tracker="none"),
        model=ModelConfig(path=str(folder)),
        data=DataConfig(batch_size=num_videos, micro_batch_size=1),
        rollout=RolloutConfig(group_size=g, max_new_tokens=c, micro_batch_size=num_videos),
        loss=LossConfig(beta=0.04),
    )
    prompt, _ = make_inputs(policy, p, c, g)
    prompts = [
        dataclasses.replace(prompt, sample=Sample(f"bench/{i}", "tvg", "", "", duration=60.0, segments=((1.0, 9.0),)))
        for i in range(num_videos)
    ]
    run = Run(cfg.run.dir, "", 0, "none", resume=False, keep=1)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    return Bench(policy, reference, optimizer, prompts, folder / "clip.mp4", cfg, run)


@dataclass(frozen=True)
class Result:
    """Of one size: medians by way and phase ("step": all of it), and the largest difference of log-probs."""

    token_ratio: float
    seconds: dict[str, dict[str, float]]
    mib: dict[str, dict[str, float]]
    difference: float  # of log-probs; nan where sampled tokens differ

    def ratio(self, phase: str, kind: str = "seconds") -> float:
        values = getattr(self, kind)
        return values["repeated"][phase] / values["ours"][phase]


def measure(bench: Bench, repeats: int) -> Result:
    """A warm-up of each way, a step of each for its memory, then timed steps by turns."""
    outputs = {name: way(bench, Meter()) for name, way in WAYS.items()}
    (tokens, logps), (their_tokens, their_logps) = outputs["ours"], outputs["repeated"]
    difference = (logps - their_logps).abs().max().item() if torch.equal(tokens, their_tokens) else math.nan
    del outputs, tokens, logps, their_tokens, their_logps
    mib, rounds = {}, {name: [] for name in WAYS}
    for name, way in WAYS.items():
        meter = Meter(memory=True)
        way(bench, meter)
        mib[name] = meter.found
    for _ in range(repeats):
        for name, way in WAYS.items():
            meter, start = Meter(), now()
            way(bench, meter)
            rounds[name].append(meter.found | {"step": now() - start})
    seconds = {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in rounds.items()}
    r, num_prompt = bench.cfg.rollout, len(bench.prompts[0].ids)
    g, c = r.group_size, r.max_new_tokens
    return Result(g * (num_prompt + c) / (num_prompt + g * c), seconds, mib, difference)


def print_result(size: tuple[int, int, int], result: Result) -> None:
    print(f"P = {size[0]}, C = {size[1]}, G = {size[2]}: token ratio {result.token_ratio:.2f}", end="")
    print(f", largest difference of log-probs {result.difference:.1e}")
    print(f"{'':10} {'ours s':>9} {'repeated':>9} {':1':>6} {'ours MiB':>9} {'repeated':>9} {':1':>6}")
    for phase in (*PHASES, "step"):
        s = [result.seconds[name][phase] for name in WAYS]
        line = f"{phase:10} {s[0]:9.4f} {s[1]:9.4f} {result.ratio(phase):6.2f}"
        if phase in ("generate", "update"):
            line += " {:9.1f} {:9.1f}".format(*(result.mib[name][phase] for name in WAYS))
            line += f" {result.ratio(phase, 'mib'):6.2f}"
        print(line)
    print(flush=True)


def draw(results: dict[tuple[int, int, int], Result], path: str) -> None:
    """Time ratios of the whole step and of its phases against the token ratio."""
    figure = Figure(figsize=(5.2, 4.0), layout="constrained")
    ax = figure.subplots()
    ordered = sorted(results.items(), key=lambda item: item[1].token_ratio)
    tokens = [result.token_ratio for _, result in ordered]
    for phase, marker in (("step", "o"), ("generate", "^"), ("update", "s")):
        ax.plot(tokens, [result.ratio(phase) for _, result in ordered], marker=marker, label=phase)
    ax.plot(tokens, tokens, color="grey", linestyle=":", label="tokens")
    for (p, _, g), result in ordered:
        ax.annotate(f"P {p}, G {g}", (result.token_ratio, 1), xycoords=("data", "axes fraction"), rotation=45, size=7)
    ax.set(xlabel="token ratio G (P + C) / (P + G C)", ylabel="time, repeated prompt / shared prompt", ylim=(0, None))
    ax.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "P,C,G"}
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="prompt and completion tokens, completions", **size)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--figure", help="write a PNG of the ratios")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    env = environment()
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    load = f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    print(f"{env['devices'][0]}; {load}; torch {env['packages']['torch']}; commit {commit}")
    print(f"tower frozen, reference model, AdamW; medians of {args.repeats}, by turns; :1 is repeated / ours\n")
    results = {}
    for sizes in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            policy, reference = (make_policy(device, folder) for _ in range(2))
            results[sizes] = measure(make_bench(policy, reference, sizes, 1, Path(folder)), args.repeats)
        print_result(sizes, results[sizes])
    if args.figure:
        draw(results, args.figure)
    main_size = results.get(MAIN_SIZE) or results[args.sizes[-1]]
    last = {f"{phase}_ratio": main_size.ratio(phase) for phase in ("step", "generate", "update")}
    last |= {"memory_ratio": main_size.ratio("update", "mib"), "token_ratio": main_size.token_ratio}
    print(json.dumps({name: round(value, 3) for name, value in last.items()} | {"diff": main_size.difference}))


if __name__ == "__main__":
    main()
