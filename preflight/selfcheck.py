"""The start-up self-check: what makes a run's numbers wrong without an error, looked for before the first step.

The tests of this code (tests/) cannot know whether the model folder, the libraries, the data and the other processes
are what this code takes them for. `check_ranks` compares the processes, and `check_model` scores two short completions
of one real sample per process. They change no random state, no place in the data and no metric. run.self_check=false
switches them off.
"""

import dataclasses
import hashlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from config import GrpoConfig, LossConfig, RolloutConfig, SftConfig, flat, to_yaml
from data import PromptReader
from model.attention import make_span
from policy import Packed, Policy, pack, prompt_positions
from preflight import kernelcheck
from prompts import Prompt
from records.record import Sample
from rollout import generate
from runtime.engine import check_batch, check_engine
from runtime.environment import code_hash
from runtime.run import Run, warn
from video.budget import Geometry
from video.frames import Video

NUM_TRIED = 8  # samples until one can be read; what becomes of a run where none can is for the loader to say
SIZES, PROBE_TOKENS = RolloutConfig(group_size=2, max_new_tokens=8, micro_batch_size=1), 8
# Allowed mean |difference| of log-probs that should be equal. Measured on tiny models of both families, trained ones
# and random ones, and on random ones of 28 layers: at most 5e-6 (2e-5 for a single token) in float32, and 0.026 (0.094)
# in bfloat16, where logits between 16 and 32 are 0.125 apart.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
MOST_COMPLETIONS, LONGEST_COMPLETION = 8, 150  # for attention: more than one block of a kernel, and milliseconds
LEAST_SEEN = 1e-3  # the largest change of a log-prob by a blank video; measured 0.5 and more, 0 where it is not seen
# Patches (time, height, width) of a video, seconds per time step, and its time positions in the released models
LAYOUTS = (
    ((3, 4, 4), 1.5, {"qwen2_5_vl": (0, 3, 6), "qwen2_vl": (0, 1, 2)}),
    ((4, 2, 2), 0.65, {"qwen2_5_vl": (0, 1, 2, 3), "qwen2_vl": (0, 1, 2, 3)}),
    ((1, 4, 8), 1.0, {"qwen2_5_vl": (0,), "qwen2_vl": (0,)}),
)
MROPE_SECTION = [16, 24, 24]  # of the released models, whose heads have 128 dimensions
OTHER_VERSION = "another version of transformers than those in requirements.txt"


def cautions(cfg: GrpoConfig | SftConfig) -> list[str]:
    """What a training can do and its user hardly means, one line each."""
    found = []
    if cfg.model.lora_rank and cfg.optim.lr < 5e-6:
        rate = f"optim.lr={cfg.optim.lr:g} is a rate for full tuning"
        found.append(f"{rate}: the adapters of model.lora_rank want about ten times as much, see configs/lora.yaml")
    if isinstance(cfg, GrpoConfig) and cfg.loss.updates_per_rollout == 1 and cfg.loss.old_logps == "policy":
        names = ("ratio", "clip", "clip_low", "clip_high")
        values = {name: getattr(cfg.loss, name) for name in names}
        changed = [f"loss.{name}={value}" for name, value in values.items() if value != getattr(LossConfig, name)]
        if changed:
            why = "changes nothing at loss.updates_per_rollout=1, where every ratio is 1"
            found.append(f"{', '.join(changed)} {why}: set it to 2 or more")
    return found


def open_run(cfg: GrpoConfig | SftConfig, resume: bool) -> Run:
    """The run of a training, once its configuration is checked. Raises ValueError; cautions are warnings."""
    check_engine(cfg)
    run = Run(cfg.run, to_yaml(cfg), resume)
    check_batch(cfg.data.batch_size, run.engine.world_size)
    for text in cautions(cfg) if run.is_main else ():
        warn(text)
    return run


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
        ranks = _ranks_by_text((rank, str(fact.get(name))) for rank, fact in enumerate(facts))
        if len(ranks) > 1:
            found.append(f"{name} ({', '.join(f'{value} on {who}' for value, who in ranks.items())})")
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
    _raise_together([*folder_failures(raw, reader.geometry), *position_failures(raw.model.config)], run)
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
        rollout = generate(raw, [prompt], [video_embeds], SIZES, synced=not whole)
    # text of the prompt is one more completion: unlikely, so its log-probs move where a sure model's own stay at 0
    banned = set(raw.banned.tolist())
    probe = [i for i in prompt.ids if i not in banned][-PROBE_TOKENS:]
    packed = pack([prompt], [[*rollout.completions[0], probe]], raw.model.config, raw.device)
    logps_N, sampled_N = policy(packed)[0], rollout.logps_BT[rollout.mask_BT]
    causes = f"matrix products of lower precision than model.dtype (autocast, TF32), {OTHER_VERSION}"
    failures = [*gap_failures("sampled = scored", sampled_N, logps_N[: len(sampled_N)], raw.model.dtype, causes)]
    failures += [*use_failures(policy, packed, video_embeds, logps_N), *video_failures(policy, packed, logps_N)]
    if reference is not None:
        with run.engine.unwrap(reference).adapter_off():
            theirs_N = reference(packed)[0]
        causes = "adapters that do not start at 0, a model folder that was written to in between"
        failures += gap_failures("reference = policy", theirs_N, logps_N, raw.model.dtype, causes)
    _raise_together(failures, run)
    policy.train(was_training)
    if run.is_main:
        names = "equal processes, rotary positions, token counts, gradients of attention, sampled = scored, video seen"
        names += ", reference = policy" if reference is not None else ""
        print(f"self-check: {names.count(',') + 1} checks in {time.perf_counter() - start:.1f} s ({names})")


def first_prompt(samples: Sequence[Sample], reader: PromptReader, rank: int) -> Prompt | None:
    """The prompt of sample number `rank`, or of the next one whose video can be read; None after NUM_TRIED of them."""
    mine = [samples[(rank + i) % len(samples)] for i in range(min(NUM_TRIED, len(samples)))]
    return next((prompt for prompt in reader.ahead(mine, window=0) if isinstance(prompt, Prompt)), None)


def folder_failures(policy: Policy, geometry: Geometry) -> Iterator[str]:
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
    if differing := [f"{name} {ours} ({theirs} expected)" for name, (ours, theirs) in pairs.items() if ours != theirs]:
        yield (
            f"model folder: config.json has {', '.join(differing)}, by its tokenizer, its preprocessor file and the "
            "released models. Usual causes: files of another model in the folder, tokens added to the tokenizer."
        )


def position_failures(config) -> Iterator[str]:
    """Whether policy.py's positions under this config are those of the released models, written out here once more."""
    vision, before = config.vision_config, 2  # tokens of text before the video; one comes after it
    for (t, h, w), seconds, times in LAYOUTS:
        video = Video(torch.empty(0), (t, h, w), seconds, [], t * h * w // 4, 0)
        ours_3P, _ = prompt_positions(Prompt(None, [0] * (before + video.num_tokens + 1), before, video), config)
        grid = [(i, y, x) for i in times[config.model_type] for y in range(h // 2) for x in range(w // 2)]
        places = [(i, i, i) for i in range(before)] + [tuple(before + i for i in place) for place in grid]
        theirs_3P = torch.tensor([*places, (max(map(max, places)) + 1,) * 3]).T
        if not torch.equal(ours_3P, theirs_3P):
            yield (
                f"rotary positions: a video of {t} x {h} x {w} patches, {seconds} s a step, after {before} tokens of "
                f"text has {_shown(ours_3P, before)}; in the released {config.model_type} {_shown(theirs_3P, before)}. "
                "Usual causes: a config.json with another vision_config.tokens_per_second than 2 (here "
                f"{getattr(vision, 'tokens_per_second', None)}; 4 where the key is missing) or spatial_merge_size than "
                f"2 (here {vision.spatial_merge_size})."
            )
            return


def _shown(positions_3P: Tensor, before: int) -> str:
    axes = zip(("time", "height", "width"), positions_3P[:, before:-1])
    return ", ".join([*(f"{name} {axis.unique().tolist()}" for name, axis in axes), f"text at {positions_3P[0, -1]}"])


def count_failures(prompt: Prompt, num_embeds: int, policy: Policy, budget: int) -> Iterator[str]:
    """Whether placeholders, the tower's embeddings and the plan agree, and the plan keeps to its budget of tokens."""
    placeholders, planned = prompt.ids.count(policy.model.config.video_token_id), prompt.video.num_tokens
    if not placeholders == num_embeds == planned <= budget:
        yield (
            f"token counts: sample {prompt.sample.id} has {placeholders} video placeholders in its prompt, "
            f"{num_embeds} embeddings from the vision tower and {planned} planned tokens, of {budget} at most "
            f"(video.total_pixels). Usual causes: a preprocessor file of another model, {OTHER_VERSION}."
        )


def ragged_lengths(cfg) -> list[int]:
    """Tokens of the completions that attention is tried with: as many as a group has, from one to long ones."""
    rollout = getattr(cfg, "rollout", None)  # supervised tuning has none
    num, most = (rollout.group_size, rollout.max_new_tokens) if rollout else (2, LONGEST_COMPLETION)
    return torch.linspace(1, min(most, LONGEST_COMPLETION), min(num, MOST_COMPLETIONS)).long().tolist()


def attention_failures(policy: Policy, num_prompt: int, lengths: Sequence[int]) -> Iterator[str]:
    """Whether the packed attention has the values and gradients that it should, on this device and in this type.

    A kernel that reads its inputs in another way than it is taken to returns wrong gradients without an error.
    """
    model, dtype = policy.model.model.language_model, policy.model.dtype
    span, layer = make_span(0, num_prompt, lengths, policy.device), model.layers[0].self_attn
    shape = model.config.num_attention_heads, model.config.num_key_value_heads, layer.head_dim
    errors, tolerance = kernelcheck.attention_errors(layer, [span], shape, dtype), kernelcheck.TOLERANCE[dtype]
    if wrong := [f"{name} {error:.2g}" for name, error in errors.items() if not error <= tolerance]:  # NaN is wrong
        yield (
            f"gradients of attention: on {policy.device}, with {num_prompt} prompt tokens and {len(lengths)} "
            f"completions of {lengths[0]} to {lengths[-1]}, the packed attention is not plain attention in float32. "
            f"Norm of the difference over the norm, of which {str(dtype)[6:]} allows {tolerance:g}: "
            f"{', '.join(wrong)}. Usual causes: a kernel with another contract (`python benchmarks/gpu.py` tries each "
            "of them), matrix products of lower precision than model.dtype (TF32)."
        )


def gap_failures(name: str, ours_N: Tensor, theirs_N: Tensor, dtype: torch.dtype, causes: str) -> Iterator[str]:
    """Whether two ways to the same log-probs agree, but for the rounding of the weights' dtype."""
    gap_N = (ours_N - theirs_N).abs()
    if not gap_N.mean() <= TOLERANCE[dtype]:  # NaN is wrong
        yield (
            f"{name}: log-probs of {len(gap_N)} tokens differ by {gap_N.mean():.2g} on average, {gap_N.max():.2g} at "
            f"most; {str(dtype)[6:]} allows {TOLERANCE[dtype]:g} on average. Usual causes: {causes}."
        )


def use_failures(policy: nn.Module, packed: Packed, video_embeds: Tensor, logps_N: Tensor) -> Iterator[str]:
    """Whether the model uses the rotary positions it is given, along each axis."""
    unused = []
    for axis, name in enumerate(("time", "height", "width")):
        positions_3S = packed.positions_3S.clone()
        positions_3S[axis] *= 8
        if torch.equal(policy(replace(packed, positions_3S=positions_3S), video_embeds)[0], logps_N):
            unused.append(name)
    if unused:
        yield (
            f"rotary positions: {len(logps_N)} log-probs stay exactly as they are when those along {', '.join(unused)} "
            f"are multiplied by 8: the model does not use them. Usual causes: {OTHER_VERSION}."
        )


def video_failures(policy: nn.Module, packed: Packed, logps_N: Tensor) -> Iterator[str]:
    """Whether log-probs depend on what the video shows: against one that is all grey."""
    (prompt,) = packed.prompts
    blank = replace(prompt, video=replace(prompt.video, patches=torch.zeros_like(prompt.video.patches)))
    change = (policy(replace(packed, prompts=(blank,)))[0] - logps_N).abs().max().item()
    if not change > LEAST_SEEN:  # NaN is wrong
        yield (
            f"video seen: with a blank one in the place of {prompt.sample.video} {len(logps_N)} log-probs change by "
            f"{change:.2g} at most, not by more than {LEAST_SEEN:g}. Usual causes: a vision tower whose weights are 0 "
            f"or were not loaded, a video that is blank itself, {OTHER_VERSION}."
        )


def _raise_together(failures: Iterable[str], run: Run) -> None:
    """Every process raises what any of them has found: one that ended alone would leave the others waiting."""
    ranks = _ranks_by_text(run.engine.gather_rows([(run.engine.rank, text) for text in failures]))
    if ranks:
        alone = run.engine.world_size == 1
        raise ValueError(_message([text if alone else f"{who}: {text}" for text, who in ranks.items()]))


def _message(failures: list[str]) -> str:
    return "\n- ".join(["the start-up self-check failed (run.self_check=false switches it off):", *failures])


def _ranks_by_text(texts: Iterable[tuple[int, str]]) -> dict[str, str]:
    """Who has each text: `rank 0, 2`."""
    ranks = defaultdict(list)
    for rank, text in texts:
        ranks[text].append(str(rank))
    return {text: f"rank {', '.join(who)}" for text, who in ranks.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
