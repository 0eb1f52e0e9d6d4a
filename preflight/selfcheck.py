"""The start-up self-check: what makes a run's numbers wrong without an error, looked for before the first step.

Not a test of this code (tests/): it asks whether the model folder, the libraries, the data and the other processes are
what this code takes them for. `check_ranks` compares the processes, `check_model` scores two short completions of one
real sample per process. They change no random state, no place in the data and no metric; run.self_check=false switches
them off.
"""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from config import flat
from data import PromptReader
from model.attention import make_span
from policy import Packed, Policy, pack, prompt_positions
from preflight import kernelcheck
from prompts import Prompt
from records.record import Sample
from rollout import generate
from runtime.environment import code_hash
from runtime.run import Run
from video.budget import Geometry
from video.frames import Video

NUM_TRIED = 8  # samples until one can be read; what becomes of a run where none can is for the loader to say
GROUP_SIZE, NEW_TOKENS, PROBE_TOKENS = 2, 8, 8
# Of the mean |difference| of log-probs that should be equal. Measured on tiny models of both families, trained ones and
# random ones, and on random ones of 28 layers: at most 5e-6 (2e-5 for a single token) in float32; 0.026 (0.094) in
# bfloat16, where logits between 16 and 32 are 0.125 apart.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# The check of attention tries so many completions of at most this length. That is more than one block of a kernel, and
# takes milliseconds.
MOST_COMPLETIONS, LONGEST_COMPLETION = 8, 150
LEAST_SEEN = 1e-3  # the largest change of a log-prob by a blank video; measured 0.5 and more, 0 where it is not seen
# Patches (time, height, width) of a video, seconds per time step, and its time positions in the released models
LAYOUTS = (
    ((3, 4, 4), 1.5, {"qwen2_5_vl": (0, 3, 6), "qwen2_vl": (0, 1, 2)}),
    ((4, 2, 2), 0.65, {"qwen2_5_vl": (0, 1, 2, 3), "qwen2_vl": (0, 1, 2, 3)}),
    ((1, 4, 8), 1.0, {"qwen2_5_vl": (0,), "qwen2_vl": (0,)}),
)
MROPE_SECTION = [16, 24, 24]  # of the released models, whose heads have 128 dimensions
OTHER_VERSION = "another version of transformers than those in requirements.txt"


def check_ranks(policy: Policy, samples: Sequence[Sample], cfg, run: Run) -> None:
    """Raises ValueError, on all processes, where two of them have other settings, code, weights or samples.

    `policy` is the model as it was loaded: once it is wrapped, all processes have the weights of the first.
    """
    if not cfg.run.self_check:
        return
    ids = "\n".join(sample.id for sample in samples)
    facts = flat(dataclasses.asdict(cfg)) | {name: version(name) for name in ("torch", "transformers")}
    facts |= {"code": code_hash(), "weights": policy.fingerprint()}
    facts |= {"chat template": _hash(str(policy.tokenizer.chat_template)), "samples": f"{len(samples)} {_hash(ids)}"}
    if found := differences(run.engine.gather_rows([facts])):
        causes = "another checkout, environment, model folder or annotation file on one of the machines"
        raise ValueError(_message([f"processes differ in {'; '.join(found)}. Usual causes: {causes}."]))


def differences(facts: Sequence[dict[str, Any]]) -> list[str]:
    """What is not equal in the facts of all ranks, and who has what.

    >>> differences([{"run.seed": 0, "torch": "2.13"}, {"run.seed": 1, "torch": "2.13"}])
    ['run.seed (0 on rank 0, 1 on rank 1)']
    """
    found = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        ranks: dict[str, list[int]] = {}
        for rank, fact in enumerate(facts):
            ranks.setdefault(str(fact.get(name)), []).append(rank)
        if len(ranks) > 1:
            found.append(f"{name} ({', '.join(f'{value} on {_ranks(who)}' for value, who in ranks.items())})")
    return found


@torch.no_grad()
def check_model(
    policy: nn.Module,
    reference: Policy | None,
    samples: Sequence[Sample],
    reader: PromptReader,
    cfg,
    run: Run,
) -> None:
    """Raises ValueError, on all processes, when one of them finds something wrong; else prints a line.

    `policy` may be wrapped. `reference` is what it must equal; None where there is none, or training has begun. Of the
    samples, process r takes the r-th, or the next one that can be read.
    """
    if not cfg.run.self_check:
        return
    start, raw, was_training = time.perf_counter(), run.engine.unwrap(policy), policy.training
    _raise_together(folder_failures(raw, reader.geometry) + position_failures(raw.model.config), run)
    prompt = first_prompt(samples, reader, run.engine.rank)
    if missing := run.engine.sums({"missing": float(prompt is None)})["missing"]:
        if run.is_main:
            print(f"self-check: left out, {missing:.0f} processes found no video to read", file=sys.stderr)
        return
    policy.eval()
    with run.engine.whole_weights(cfg.model.gather_weights) as whole:
        video_embeds = raw.embed_videos([prompt])
        budget = cfg.video.total_pixels // reader.geometry.factor**2
        _raise_together(count_failures(prompt, len(video_embeds), raw, budget), run)
        _raise_together(attention_failures(raw, len(prompt.ids), ragged_lengths(cfg)), run)
        rollout = generate(raw, [prompt], [video_embeds], GROUP_SIZE, NEW_TOKENS, micro_batch_size=1, synced=not whole)
    packed = pack([prompt], [[*rollout.completions[0], probe(prompt, raw)]], raw.model.config, raw.device)
    logps_N = policy(packed)[0]
    sampled_N = rollout.logps_BT[rollout.mask_BT]
    causes = f"matrix products of lower precision than model.dtype (autocast, TF32), {OTHER_VERSION}"
    failures = gap_failures("sampled = scored", sampled_N, logps_N[: len(sampled_N)], raw.model.dtype, causes)
    failures += use_failures(policy, packed, video_embeds, logps_N) + video_failures(policy, packed, logps_N)
    if reference is not None:
        with run.engine.unwrap(reference).adapter_off():
            theirs_N = reference(packed)[0]
        causes = "adapters that do not start at 0, a model folder that was written to in between"
        failures += gap_failures("reference = policy", theirs_N, logps_N, raw.model.dtype, causes)
    _raise_together(failures, run)
    policy.train(was_training)
    if run.is_main:
        names = ["equal processes", "rotary positions", "token counts", "gradients of attention", "sampled = scored"]
        names += ["video seen"]
        names += [] if reference is None else ["reference = policy"]
        print(f"self-check: {len(names)} checks in {time.perf_counter() - start:.1f} s ({', '.join(names)})")


def first_prompt(samples: Sequence[Sample], reader: PromptReader, rank: int) -> Prompt | None:
    """The prompt of sample number `rank`, or of the next one whose video can be read; None after NUM_TRIED of them."""
    mine = [samples[(rank + i) % len(samples)] for i in range(min(NUM_TRIED, len(samples)))]
    return next((prompt for prompt in reader.ahead(mine, window=0) if isinstance(prompt, Prompt)), None)


def probe(prompt: Prompt, policy: Policy) -> list[int]:
    """Text of the prompt, as one more completion: unlikely, so its log-probs move where a sure model's stay at 0."""
    banned = set(policy.banned.tolist())
    return [i for i in prompt.ids if i not in banned][-PROBE_TOKENS:]


def folder_failures(policy: Policy, geometry: Geometry) -> list[str]:
    """Whether the files of the model folder agree with each other and with the released ones."""
    config, id_of = policy.model.config, policy.tokenizer.convert_tokens_to_ids
    text, vision = config.text_config, config.vision_config
    pairs = {
        "video_token_id": (config.video_token_id, id_of("<|video_pad|>")),
        "image_token_id": (config.image_token_id, id_of("<|image_pad|>")),
        "patch_size": (vision.patch_size, geometry.patch_size),
        "spatial_merge_size": (vision.spatial_merge_size, geometry.merge_size),
        "temporal_patch_size": (vision.temporal_patch_size, geometry.temporal_patch_size),
    }
    if text.hidden_size // text.num_attention_heads == 128:
        pairs["mrope_section"] = (text.rope_parameters.get("mrope_section"), MROPE_SECTION)
    differing = [f"{name} {ours} ({theirs} expected)" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if not differing:
        return []
    return [
        f"model folder: config.json has {', '.join(differing)}, by its tokenizer, its preprocessor file and the "
        "released models. Usual causes: files of another model in the folder, tokens added to the tokenizer."
    ]


def position_failures(config) -> list[str]:
    """Whether policy.py's positions under this config are those of the released models, written out here once more."""
    vision, before = config.vision_config, 2  # tokens of text before the video; one comes after it
    for (t, h, w), seconds, times in LAYOUTS:
        video = Video(torch.empty(0), (t, h, w), seconds, [], t * h * w // 4, 0)
        ours_3P, _ = prompt_positions(Prompt(None, [0] * (before + video.num_tokens + 1), before, video), config)
        grid = [(i, y, x) for i in times[config.model_type] for y in range(h // 2) for x in range(w // 2)]
        places = [(i, i, i) for i in range(before)] + [tuple(before + i for i in place) for place in grid]
        theirs_3P = torch.tensor([*places, (max(map(max, places)) + 1,) * 3]).T
        if not torch.equal(ours_3P, theirs_3P):
            return [
                f"rotary positions: a video of {t} x {h} x {w} patches, {seconds} s a step, after {before} tokens of "
                f"text has {_shown(ours_3P, before)}; in the released {config.model_type} {_shown(theirs_3P, before)}. "
                "Usual causes: a config.json with another vision_config.tokens_per_second than 2 (here "
                f"{getattr(vision, 'tokens_per_second', None)}; 4 where the key is missing) or spatial_merge_size than "
                f"2 (here {vision.spatial_merge_size})."
            ]
    return []


def _shown(positions_3P: Tensor, before: int) -> str:
    axes = zip(("time", "height", "width"), positions_3P[:, before:-1])
    return ", ".join([*(f"{name} {axis.unique().tolist()}" for name, axis in axes), f"text at {positions_3P[0, -1]}"])


def count_failures(prompt: Prompt, num_embeds: int, policy: Policy, budget: int) -> list[str]:
    """Whether placeholders, the tower's embeddings and the plan agree, and the plan keeps to its budget of tokens."""
    placeholders, planned = prompt.ids.count(policy.model.config.video_token_id), prompt.video.num_tokens
    if placeholders == num_embeds == planned <= budget:
        return []
    return [
        f"token counts: sample {prompt.sample.id} has {placeholders} video placeholders in its prompt, {num_embeds} "
        f"embeddings from the vision tower and {planned} planned tokens, of {budget} at most (video.total_pixels). "
        f"Usual causes: a preprocessor file of another model, {OTHER_VERSION}."
    ]


def ragged_lengths(cfg) -> list[int]:
    """Tokens of the completions that attention is tried with: as many as a group has, from one to long ones."""
    rollout = getattr(cfg, "rollout", None)  # supervised tuning has none
    num, most = (rollout.group_size, rollout.max_new_tokens) if rollout else (2, LONGEST_COMPLETION)
    return torch.linspace(1, min(most, LONGEST_COMPLETION), min(num, MOST_COMPLETIONS)).long().tolist()


def attention_failures(policy: Policy, num_prompt: int, lengths: Sequence[int]) -> list[str]:
    """Whether the packed attention has the values and gradients that it should, on this device and in this type.

    A kernel that reads its inputs in another way than it is taken to returns wrong gradients without an error.
    """
    model, dtype = policy.model.model.language_model, policy.model.dtype
    span, layer = make_span(0, num_prompt, lengths, policy.device), model.layers[0].self_attn
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    errors = kernelcheck.attention_errors(layer, [span], (heads, kv_heads, layer.head_dim), dtype)
    tolerance = kernelcheck.TOLERANCE[dtype]
    wrong = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= tolerance]
    if not wrong:
        return []
    shape = f"{num_prompt} prompt tokens and {len(lengths)} completions of {lengths[0]} to {lengths[-1]}"
    return [
        f"gradients of attention: on {policy.device}, with {shape}, the packed attention is not plain attention in "
        f"float32. Norm of the difference over the norm, of which {str(dtype)[6:]} allows {tolerance:g}: "
        f"{', '.join(wrong)}. Usual causes: a kernel with another contract (`python benchmarks/gpu.py` tries each of "
        "them), matrix products of lower precision than model.dtype (TF32)."
    ]


def gap_failures(name: str, ours_N: Tensor, theirs_N: Tensor, dtype: torch.dtype, causes: str) -> list[str]:
    """Whether two ways to the same log-probs agree, but for the rounding of the weights' dtype."""
    gap_N = (ours_N - theirs_N).abs()
    if gap_N.mean() <= TOLERANCE[dtype]:
        return []
    return [
        f"{name}: log-probs of {len(gap_N)} tokens differ by {gap_N.mean():.2g} on average, {gap_N.max():.2g} at most; "
        f"{str(dtype)[6:]} allows {TOLERANCE[dtype]:g} on average. Usual causes: {causes}."
    ]


def use_failures(policy: nn.Module, packed: Packed, video_embeds: Tensor, logps_N: Tensor) -> list[str]:
    """Whether the model uses the rotary positions it is given, along each axis."""
    unused = []
    for axis, name in enumerate(("time", "height", "width")):
        positions_3S = packed.positions_3S.clone()
        positions_3S[axis] *= 8
        if torch.equal(policy(replace(packed, positions_3S=positions_3S), video_embeds)[0], logps_N):
            unused.append(name)
    if not unused:
        return []
    return [
        f"rotary positions: {len(logps_N)} log-probs stay exactly as they are when those along {', '.join(unused)} are "
        f"multiplied by 8: the model does not use them. Usual causes: {OTHER_VERSION}."
    ]


def video_failures(policy: nn.Module, packed: Packed, logps_N: Tensor) -> list[str]:
    """Whether log-probs depend on what the video shows: against one that is all grey."""
    (prompt,) = packed.prompts
    blank = replace(prompt, video=replace(prompt.video, patches=torch.zeros_like(prompt.video.patches)))
    change = (policy(replace(packed, prompts=(blank,)))[0] - logps_N).abs().max().item()
    if change > LEAST_SEEN:
        return []
    return [
        f"video seen: with a blank one in the place of {prompt.sample.video} {len(logps_N)} log-probs change by "
        f"{change:.2g} at most, not by more than {LEAST_SEEN:g}. Usual causes: a vision tower whose weights are 0 or "
        f"were not loaded, a video that is blank itself, {OTHER_VERSION}."
    ]


def _raise_together(failures: list[str], run: Run) -> None:
    """Every process raises what any of them has found: one that ended alone would leave the others waiting."""
    ranks: dict[str, list[int]] = {}
    for rank, text in run.engine.gather_rows([(run.engine.rank, text) for text in failures]):
        ranks.setdefault(text, []).append(rank)
    if ranks:
        alone = run.engine.world_size == 1
        raise ValueError(_message([text if alone else f"{_ranks(who)}: {text}" for text, who in ranks.items()]))


def _message(failures: list[str]) -> str:
    return "\n- ".join(["the start-up self-check failed (run.self_check=false switches it off):", *failures])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
