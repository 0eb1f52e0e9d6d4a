"""One whole GRPO step, ours against the way public trainers do it: time, memory, distance from the floor, agreement.

    python benchmarks/bench_step.py [--sizes 1046,64,8 1046,64,16] [--repeats 5] [--figure step_ratio.png]
    python benchmarks/bench_step.py --model 3b [--checkpointing]    # random weights of Qwen2.5-VL-3B's shapes; a GPU

A step reads clips, runs the vision tower, samples G completions of exactly C tokens after each prompt of P, rewards
them, scores them under a reference model, and updates the policy (AdamW, learning rate 0, so that every step does the
same). Both ways have equal weights, inputs, seeds and tokens, and take turns in one process; their tower is frozen.
The 3b model is bfloat16, and takes (4096, 256, 8) with 4 videos and (16384, 256, 8) with 1; others have 1 video.

    ours       groups.sample_groups and train_grpo.update, as `train` calls them
    repeated   Hugging Face's generate on all rows at once with the tower run for every row, then reference and policy
               forwards over G rows of P + C tokens, one video at a time, the tower run for every row again; the head
               on completion tokens only, which not all public trainers do

Ratios are repeated / ours, more is better; the token ratio is G (P + C) / (P + G C). Memory is the peak of a phase
above what was held before the step. `generate` is tower and sampling, of which `decode` is ours from the first token
on; `update` is the policy's forward, backward and optimizer step without the reference. Floors are of our way, see
floors.py. Greedy tokens are compared, and the log-probs of equal tokens. A way that runs out of the GPU's memory has
no number from that phase on. The last line is JSON for (1046, 64, 8), or the first size without it.
"""

import argparse
import gc
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_prefix import score
from floors import Floor, measure_speed, now, step_floors
from matplotlib.figure import Figure
from torch import Tensor
from ways import WAYS, Bench, Meter, make_bench, sample_repeated

from preflight.dryrun import Device
from rollout import generate
from runtime.environment import environment

SIZES = {  # (P, C, G) by model
    "tiny": [(278, 32, 8), (1046, 64, 8), (2070, 64, 8), (1046, 64, 16)],
    "3b": [(4096, 256, 8), (16384, 256, 8)],
}
MAIN_SIZE = (1046, 64, 8)
VIDEOS = {(4096, 256, 8): 4}  # in a step; 1 at other sizes
PHASES = ("data", "generate", "decode", "reward", "reference", "update")
PARTS = {  # of a phase, by the floors' names
    "generate": ("vision", "prefill", "decode"),
    "decode": ("decode",),
    "reference": ("reference",),
    "update": ("update", "optimizer"),
}


@dataclass(frozen=True)
class Result:
    """Of one size: medians by way and phase ("step": all of it), nan where memory ran out; floors; agreement."""

    token_ratio: float
    num_tokens: int  # sampled in a step
    num_calls: int  # of the decoder, one for a token of every row
    seconds: dict[str, dict[str, float]]
    mib: dict[str, dict[str, float]]
    floors: dict[str, Floor]
    speed: Device
    same_tokens: float  # share of greedy tokens
    diff: float  # of log-probs of the same tokens, at most

    def ratio(self, phase: str, kind: str = "seconds") -> float:
        values = getattr(self, kind)
        return values["repeated"][phase] / values["ours"][phase]

    def flops(self, phase: str) -> float:
        return sum(self.floors[part].flops for part in PARTS[phase])

    def floor(self, phase: str) -> float:
        """Seconds; of the step, those of generate, reference and update: data and reward have none."""
        if phase == "step":
            return sum(self.floor(part) for part in ("generate", "reference", "update"))
        return sum(self.floors[part].seconds(self.speed) for part in PARTS[phase])

    def share(self, phase: str) -> float:
        """FLOP/s of our way over those of a matrix product."""
        return self.flops(phase) / self.seconds["ours"][phase] / self.speed.flops

    def over_floor(self, phase: str) -> float:
        return self.seconds["ours"][phase] / self.floor(phase)


def take(name: str, bench: Bench, memory: bool = False) -> tuple[dict[str, float], tuple[Tensor, Tensor] | None]:
    """One step of a way: what was measured of its phases and its output, None where a GPU's memory ran out."""
    meter, start, output = Meter(memory), now(), None
    try:
        output = WAYS[name](bench, meter)
        meter.found |= {} if memory else {"step": now() - start}
    except torch.OutOfMemoryError:
        bench.optimizer.zero_grad()
    gc.collect()
    return {phase: meter.found.get(phase, math.nan) for phase in (*PHASES, "step")}, output


def agreement(bench: Bench, tokens_BT: Tensor) -> tuple[float, float]:
    """Share of equal tokens under greedy sampling; largest difference of the log-probs of `tokens_BT`, once scored."""
    policy, prompts, r = bench.policy.eval(), bench.read(), bench.cfg.rollout
    try:
        greedy = generate(policy, prompts, policy.embed_each(prompts), r, seed=None)
        same = (greedy.tokens_BT == sample_repeated(bench, prompts, greedy=True)[0]).float().mean().item()
        diffs = []
        for prompt, tokens_GT in zip(prompts, tokens_BT.split(r.group_size), strict=True):
            with torch.no_grad():
                scored = [score(policy, prompt, tokens_GT.tolist(), runs) for runs in (0, r.group_size)]
            diffs.append((scored[0] - scored[1]).abs().max().item())
        return same, max(diffs)
    except torch.OutOfMemoryError:
        return math.nan, math.nan


def measure(bench: Bench, speed: Device, repeats: int) -> Result:
    """A warm-up of each way, a step of each for its memory, then timed steps by turns."""
    outputs = {name: take(name, bench)[1] for name in WAYS}
    same, diff = agreement(bench, outputs["ours"][0]) if outputs["ours"] else (math.nan, math.nan)
    del outputs
    mib = {name: take(name, bench, memory=True)[0] for name in WAYS}
    rounds: dict[str, list] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name in WAYS:
            rounds[name].append(take(name, bench)[0])
    seconds = {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in rounds.items()}
    r, num_prompt, num = bench.cfg.rollout, len(bench.prompts[0].ids), len(bench.prompts)
    g, c = r.group_size, r.max_new_tokens
    floors = step_floors(bench.policy, bench.cfg, bench.prompts[0], bench.policy.device.type)
    token_ratio = g * (num_prompt + c) / (num_prompt + g * c)
    return Result(token_ratio, num * g * c, c, seconds, mib, floors, speed, same, diff)


def print_result(size: tuple[int, int, int], num: int, result: Result) -> None:
    print(f"P = {size[0]}, C = {size[1]}, G = {size[2]}, videos {num}: token ratio {result.token_ratio:.2f}", end="")
    print(f"; greedy tokens equal {result.same_tokens:.1%}, log-probs to {result.diff:.1e}")
    rates = [result.num_tokens / result.seconds[name]["step"] for name in WAYS]
    print(f"sampled tokens per second of the step: ours {rates[0]:,.0f}, repeated {rates[1]:,.0f}")
    print(f"{'':10} {'ours s':>9} {'repeated':>9} {':1':>6} {'GFLOP':>10} {'of matmul':>9} {'floor s':>9}", end="")
    print(f" {'x floor':>8} {'ours MiB':>9} {'repeated':>9} {':1':>6}")
    for phase in (*PHASES, "step"):
        s = [result.seconds[name][phase] for name in WAYS]
        line = f"{phase:10} {s[0]:9.4f} {s[1]:9.4f} {result.ratio(phase):6.2f}"
        if phase in PARTS:
            line += f" {result.flops(phase) / 1e9:10.2f} {result.share(phase):9.1%}"
        if phase in (*PARTS, "step"):
            line += f"{'' if phase in PARTS else ' ' * 21} {result.floor(phase):9.5f} {result.over_floor(phase):8.2f}"
        if phase in ("generate", "update"):
            line += " {:9.1f} {:9.1f}".format(*(result.mib[name][phase] for name in WAYS))
            line += f" {result.ratio(phase, 'mib'):6.2f}"
        print(line)
    token = [1e3 * x / result.num_calls for x in (result.seconds["ours"]["decode"], result.floor("decode"))]
    print(f"decoding: {token[0]:.3f} ms for a token of every row, floor {token[1]:.3f} ms\n", flush=True)


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


def last_line(result: Result) -> str:
    """JSON, null where memory ran out."""
    last = {f"{phase}_ratio": result.ratio(phase) for phase in ("step", "generate", "update")}
    last |= {"memory_ratio": result.ratio("update", "mib"), "token_ratio": result.token_ratio}
    last |= {"step_over_floor": result.over_floor("step"), "decode_over_floor": result.over_floor("decode")}
    last |= {"update_share": result.share("update"), "same_tokens": result.same_tokens, "diff": result.diff}
    last |= {"tokens_per_s": result.num_tokens / result.seconds["ours"]["step"]}
    return json.dumps({name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in last.items()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "P,C,G"}
    parser.add_argument("--model", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--sizes", nargs="+", help="prompt and completion tokens, completions", **size)
    parser.add_argument("--videos", type=int, help="in a step, at every size")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in both ways")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--figure", help="write a PNG of the ratios")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    env = environment()
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    load = f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    print(f"{env['devices'][0]}; {load}; torch {env['packages']['torch']}; commit {commit}")
    speed = measure_speed(device, torch.bfloat16 if args.model == "3b" else torch.float32)
    checkpoints = ", gradient checkpointing" if args.checkpointing else ""
    print(f"matrix product {speed.flops / 1e12:.3g} TFLOP/s, copy {speed.bytes / 1e9:.3g} GB/s; model {args.model}")
    print(
        f"tower frozen, reference model, AdamW{checkpoints}; medians of {args.repeats}, by turns; :1 repeated / ours\n"
    )
    results = {}
    for sizes in args.sizes or SIZES[args.model]:
        num = args.videos or VIDEOS.get(sizes, 1)
        with tempfile.TemporaryDirectory() as folder:
            bench = make_bench(args.model, device, sizes, num, args.checkpointing, Path(folder))
            results[sizes] = measure(bench, speed, args.repeats)
            del bench  # its models, before the next ones are made
        print_result(sizes, num, results[sizes])
    if args.figure:
        draw(results, args.figure)
    print(last_line(results.get(MAIN_SIZE) or next(iter(results.values()))))


if __name__ == "__main__":
    main()
