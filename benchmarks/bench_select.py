"""What K = 8 responses to an item cost against one: select_data.score_prompts on one video.

    python benchmarks/bench_select.py [--size 1046,64] [--repeats 9]

Exactly C tokens a response after a prompt of P, the tiny Qwen2.5-VL of bench_prefix.py, K by turns in one process.
Every call starts from patches and token ids. What it spends is timed inside it:

    tower     the vision tower, once per video whatever K is
    prefill   the prompt through the language model, once; texts of the responses
    decode    Hugging Face's generate() over that cache: C steps of K rows, the sampler among them
    reward    rewards of the K responses and the row written of them

Prompt work is tower + prefill, what K calls of one response would do K times. `apart` is that, 8 calls of K = 1. The
last line is JSON: K = 8 over K = 1, of the whole call and of the prompt work, and `apart` over K = 8.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_prefix import make_inputs, make_policy

import select_data
from config import RolloutConfig, RuleConfig, SelectConfig
from policy import Policy
from prompts import Prompt
from runtime.environment import environment

K = 8
PARTS = ("tower", "prefill", "decode", "reward")


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(owner, name: str, seconds: dict[str, float], part: str) -> None:
    """Have every call of `owner.name` leave its time in `seconds[part]`."""
    original = getattr(owner, name)

    def timed(*args, **kwargs):
        start = now()
        result = original(*args, **kwargs)
        seconds[part] = now() - start
        return result

    setattr(owner, name, timed)


def timed_call(policy: Policy, prompt: Prompt, cfg: SelectConfig, seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of one call and of its parts; `seconds` is what `watch` writes into."""
    start = now()
    select_data.score_prompts(policy, [prompt], [], cfg)
    whole, sampling = now() - start, seconds["sampling"]
    found = {"tower": seconds["tower"], "prefill": sampling - seconds["decode"], "decode": seconds["decode"]}
    return found | {"reward": whole - seconds["tower"] - sampling, "whole": whole}


def measure(policy: Policy, prompt: Prompt, num_completion: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of K = 1 and of K, by part, and of their ratio in each round; two calls of each warm up."""
    seconds: dict[str, float] = {}
    watch(policy, "embed_each", seconds, "tower")
    watch(policy.model, "generate", seconds, "decode")
    watch(select_data, "generate", seconds, "sampling")
    rule = RuleConfig(rule="mean_range")  # which K = 1 is enough for
    sizes = {k: RolloutConfig(group_size=k, max_new_tokens=num_completion) for k in (1, K)}
    rounds = []
    for _ in range(repeats + 2):
        both = [timed_call(policy, prompt, SelectConfig(rollout=sizes[k], select=rule), seconds) for k in (1, K)]
        for s in both:
            s["prompt work"] = s["tower"] + s["prefill"]
        rounds.append([*both, {name: both[1][name] / both[0][name] for name in both[0]}])
    columns = list(zip(*rounds[2:]))
    return {
        kind: {name: median(s[name] for s in column) for name in column[0]}
        for kind, column in zip(("one", "k", "ratio"), columns)
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "P,C", "default": (1046, 64)}
    parser.add_argument("--size", help="prompt and completion tokens", **size)
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy("cuda" if torch.cuda.is_available() else "cpu", folder)
    prompt, _ = make_inputs(policy, *args.size)
    sample = dataclasses.replace(prompt.sample, duration=60.0, segments=((1.0, 9.0),))
    found = measure(policy, dataclasses.replace(prompt, sample=sample), args.size[1], args.repeats)
    env, load = environment(), f"{os.getloadavg()[0]:.1f} processes running in the last minute"
    commit = f"{env['commit']}{' and uncommitted changes' if env['diff'] else ''}"
    print(f"{env['devices'][0]}; {load}; torch {env['packages']['torch']}; commit {commit}")
    print(f"P = {args.size[0]}, C = {args.size[1]}; medians of {args.repeats} rounds, the ratio's of each round\n")
    print(f"{'':12} {'K = 1, s':>9} {'share':>6} {f'K = {K}, s':>9} {'share':>6} {'ratio':>6}")
    one, k, ratio = found["one"], found["k"], found["ratio"]
    for name in (*PARTS, "prompt work", "whole"):
        shares = [f"{part[name] / part['whole']:6.0%}" for part in (one, k)]
        print(f"{name:12} {one[name]:9.4f} {shares[0]} {k[name]:9.4f} {shares[1]} {ratio[name]:6.2f}")
    last = {"k8_over_k1_time": ratio["whole"], "k8_over_k1_prompt_work": ratio["prompt work"]}
    last |= {"apart_over_k8_time": K / ratio["whole"]}
    print(json.dumps({name: round(value, 3) for name, value in last.items()}))


if __name__ == "__main__":
    main()
