"""Shared against repeated prompt: time, memory and agreement of sampling, scoring and the update.

    python benchmarks/bench_prefix.py [--sizes 278,32 1046,64] [--repeats 5]

One video, G completions of exactly C tokens after a prompt of P; the tiny Qwen2.5-VL; equal weights, inputs
and attention kernels on all sides, in one process, by turns. Every call starts from patches and token ids.

    shared     ours (rollout.generate, Policy.forward): the tower once, the prompt once
    repeated   Hugging Face's generate and forward on G rows of P + C tokens, the tower run for every row, as
               public trainers do; the head on completion tokens only, which not all of them do
    once       the same rows, the tower run once and its output expanded

The tower is frozen: its output carries no gradient on any side. Ratios are baseline over shared, more is
better; the token ratio is G (P + C) / (P + G C). Memory is the peak of a call above what was held before it.
Differences: of log-probs, absolute, nan where sampled tokens differ; of gradients, relative to a parameter's
largest. The last line is JSON for (1046, 64), or the last size without it, against `repeated`.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import LogitsProcessorList

import tiny
from config import ModelConfig, RolloutConfig
from policy import Policy, load_policy, pack, prompt_positions
from prompts import Prompt
from records.record import Sample
from rollout import GumbelSampler, generate, row_seed
from runtime.clock import peak_bytes, restart_peak
from runtime.environment import environment
from video.frames import Video

G = 8
SIZES = [(278, 32), (1046, 64), (2070, 64)]  # (P, C); 22 tokens of each prompt are text
MAIN_SIZE = (1046, 64)
TOWER_RUNS = {"shared": 0, "repeated": G, "once": 1}  # of the baselines; 0 stands for ours


def make_policy(device: str, folder: str) -> Policy:
    """The tiny model, its distributions sharpened; EOS is banned, so that every completion has C tokens."""
    if not Path(folder, "config.json").exists():
        tiny.write_model(Path(folder), seed=0, family="qwen2_5_vl")
    policy = load_policy(ModelConfig(path=folder, freeze_vision=True)).to(device).eval()
    policy.model.model.language_model.norm.weight.data.mul_(3.0)
    policy.banned = torch.cat([policy.banned, torch.tensor(policy.eos_ids, device=device)])
    return policy


def make_inputs(
    policy: Policy, num_prompt: int, num_completion: int, group_size: int = G
) -> tuple[Prompt, list[list[int]]]:
    """Synthetic patches, 16 tokens a time step, 22 or more text tokens around them; random completions."""
    generator, steps = torch.Generator().manual_seed(0), (num_prompt - 22) // 16
    if steps < 1:
        raise SystemExit(f"error: --sizes: a prompt needs at least 38 tokens, got {num_prompt}")
    patches = torch.randn(steps * 8 * 8, 3 * 2 * 14 * 14, generator=generator).to(policy.device)
    video = Video(patches, (steps, 8, 8), 1.0, [float(i) for i in range(2 * steps)], steps * 16, 0)
    text = torch.randint(0, 256, (num_prompt - steps * 16,), generator=generator).tolist()
    ids = text[:6] + [policy.model.config.video_token_id] * video.num_tokens + text[6:]
    completions = torch.randint(0, 256, (group_size, num_completion), generator=generator).tolist()
    return Prompt(Sample("bench", "tvg", "", ""), ids, 6, video), completions


def sample(policy: Policy, prompt: Prompt, completions: list, tower_runs: int) -> tuple[Tensor, Tensor]:
    """Tokens (G, C) and their log-probs, of as many completions as are given, and as long."""
    group_size, num_new, device = len(completions), len(completions[0]), policy.device
    if tower_runs == 0:
        rollout = generate(policy, [prompt], policy.embed_each([prompt]), RolloutConfig(group_size, 1.0, num_new))
        return rollout.tokens_BT, rollout.logps_BT
    sampler = GumbelSampler(policy, [row_seed(0, 0, prompt.sample.id, g) for g in range(group_size)])
    ids = torch.tensor([prompt.ids] * tower_runs, device=device)  # generate() expands what the tower gave
    positions = prompt_positions(prompt, policy.model.config)[0][:, None].repeat(1, tower_runs, 1)
    output = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions.to(device),
        pixel_values_videos=prompt.video.patches.repeat(tower_runs, 1),
        video_grid_thw=torch.tensor([prompt.video.grid_thw] * tower_runs, device=device),
        num_return_sequences=group_size // tower_runs,
        max_new_tokens=num_new,
        do_sample=True,  # of what the sampler leaves: one token
        top_k=0,
        logits_processor=LogitsProcessorList([sampler]),
    )
    return output[:, ids.shape[1] :], torch.stack(sampler.logps, 1)


def score(policy: Policy, prompt: Prompt, completions: list, tower_runs: int) -> Tensor:
    """Log-probs (G * C,) of the completions."""
    group_size, num = len(completions), len(completions[0])
    if tower_runs == 0:
        packed = pack([prompt], [completions], policy.model.config, policy.device)
        return policy(packed, policy.embed_each([prompt])[0])[0]
    videos = torch.cat(policy.embed_each([prompt] * tower_runs) * (group_size // tower_runs))
    positions_3P, after = prompt_positions(prompt, policy.model.config)
    positions_3S = torch.cat([positions_3P, (after + torch.arange(num)).expand(3, -1)], 1).to(policy.device)
    ids_BS = torch.tensor([prompt.ids + tokens for tokens in completions], device=policy.device)
    logits_BTV = policy.model(
        inputs_embeds=policy.embed(ids_BS, videos),
        position_ids=positions_3S[:, None].expand(-1, group_size, -1),
        use_cache=False,
        logits_to_keep=num + 1,
    ).logits[:, :-1]
    return policy.log_softmax(logits_BTV).gather(2, ids_BS[:, -num:, None]).flatten()


def update(policy: Policy, prompt: Prompt, completions: list, tower_runs: int) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the log-probs."""
    logps_N = score(policy, prompt, completions, tower_runs)
    (logps_N * torch.linspace(-1, 1, len(logps_N), device=policy.device)).mean().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return gradients


PHASES = {"generate": sample, "score": torch.no_grad()(score), "update": update}


def difference(phase: str, ours, theirs) -> float:
    """Of what two variants returned, see the head of this file."""
    if phase == "score":
        return (ours - theirs).abs().max().item()
    if phase == "generate":
        return (ours[1] - theirs[1]).abs().max().item() if torch.equal(ours[0], theirs[0]) else math.nan
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()).item() for k in ours)


def seconds(call: Callable) -> float:
    """Time of the second of two calls in a row: no variant pays for the memory another one gave back."""
    call()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held_bytes() -> int | None:
    """Memory held now, of the CUDA device or of the process; `peak_bytes` starts again from it. None: not known."""
    gc.collect()
    if not torch.cuda.is_available() and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory kept from earlier calls would hide what this one uses
    return restart_peak()


def peak_mib(call: Callable) -> float:
    """Peak memory of a call in MiB, above what is held before it; nan where it is not known."""
    before = held_bytes()
    call()
    return math.nan if before is None else (peak_bytes() - before) / 2**20


def measure(phase: str, repeats: int, *inputs) -> dict[str, tuple[float, float, float]]:
    """Median seconds, peak MiB and difference to ours, by variant: a warm-up, then they take turns."""
    calls = {name: partial(PHASES[phase], *inputs, runs) for name, runs in TOWER_RUNS.items()}
    outputs = {name: call() for name, call in calls.items()}
    diffs = {name: difference(phase, outputs["shared"], outputs[name]) for name in calls}
    del outputs
    peaks = {name: peak_mib(call) for name, call in calls.items()}
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: (median(t[name] for t in times), peaks[name], diffs[name]) for name in calls}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    size = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "P,C", "default": SIZES}
    parser.add_argument("--sizes", nargs="+", help="prompt and completion tokens", **size)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each variant")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy("cuda" if torch.cuda.is_available() else "cpu", folder)
    env, found = environment(), {}
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    load = f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    print(f"{env['devices'][0]}; {load}; torch {env['packages']['torch']}; commit {commit}")
    print(f"G = {G}, tower frozen; medians of {args.repeats}; :1 is baseline / shared, then that of tokens\n")
    print("    P   C phase    baseline shared s baseline    :1 tokens shared MiB baseline    :1 difference")
    for p, c in args.sizes:
        inputs, tokens = make_inputs(policy, p, c), G * (p + c) / (p + G * c)
        for phase in PHASES:
            result = measure(phase, args.repeats, policy, *inputs)
            s, mib, _ = result.pop("shared")
            for name, (base_s, base_mib, diff) in result.items():
                row = f"{p:5} {c:3} {phase:<8} {name:<8} {s:8.4f} {base_s:8.4f} {base_s / s:5.2f}"
                row += f" {tokens:6.2f} {mib:10.1f} {base_mib:8.1f} {base_mib / mib:5.2f} {diff:10.1e}"
                print(row, flush=True)
            found[p, c, phase] = result["repeated"][0] / s, max(diff for _, _, diff in result.values())
    p, c = MAIN_SIZE if MAIN_SIZE in args.sizes else args.sizes[-1]
    last = {f"{phase}_ratio": round(found[p, c, phase][0], 3) for phase in ("update", "score", "generate")}
    last["update_token_ratio"] = round(G * (p + c) / (p + G * c), 3)
    last |= {"max_abs_diff": found[p, c, "score"][1], "max_abs_grad_diff": found[p, c, "update"][1]}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
