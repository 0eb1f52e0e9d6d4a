"""G completions per video over one prefill, sampled by Hugging Face `generate`.

Not a serving engine: the prompt of each video runs once, all its completions read one cache of it, and one logits
processor draws every token, so that a sample depends on (seed, step, sample id, g) alone and its log-prob is recorded
exactly as policy.py will score it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from config import RolloutConfig
from grpo import completion_mask
from model.attention import GroupLayer
from policy import Policy, prompt_positions
from prompts import Prompt


@dataclass(frozen=True)
class Rollout:
    """B = P * G completions, completion g of prompt p in row p * G + g."""

    prompts: tuple[Prompt, ...]
    video_embeds: tuple[Tensor, ...]  # of each prompt, (video tokens, H)
    tokens_BT: Tensor  # padded at the end
    mask_BT: Tensor  # True up to and including EOS
    logps_BT: Tensor  # as sampled, float32; 0 past the end
    truncated_B: Tensor  # True where no EOS came within max_new_tokens
    texts: list[str]

    @property
    def completions(self) -> list[list[list[int]]]:
        """Token ids without padding: P lists of G lists."""
        rows = [tokens[mask].tolist() for tokens, mask in zip(self.tokens_BT.cpu(), self.mask_BT.cpu())]
        return [rows[i : i + self.group_size] for i in range(0, len(rows), self.group_size)]

    @property
    def group_size(self) -> int:
        return len(self.texts) // len(self.prompts)

    def take(self, groups: Sequence[int]) -> "Rollout":
        """The rollout of these groups alone, in this order."""
        rows = [p * self.group_size + g for p in groups for g in range(self.group_size)]
        return Rollout(
            prompts=tuple(self.prompts[p] for p in groups),
            video_embeds=tuple(self.video_embeds[p] for p in groups),
            tokens_BT=self.tokens_BT[rows],
            mask_BT=self.mask_BT[rows],
            logps_BT=self.logps_BT[rows],
            truncated_B=self.truncated_B[rows],
            texts=[self.texts[row] for row in rows],
        )

    @staticmethod
    def join(rollouts: Sequence["Rollout"]) -> "Rollout":
        """Several rollouts of one group size as one."""
        return Rollout(
            prompts=tuple(prompt for rollout in rollouts for prompt in rollout.prompts),
            video_embeds=tuple(embeds for rollout in rollouts for embeds in rollout.video_embeds),
            tokens_BT=_stack([rollout.tokens_BT for rollout in rollouts], 0),
            mask_BT=_stack([rollout.mask_BT for rollout in rollouts], False),
            logps_BT=_stack([rollout.logps_BT for rollout in rollouts], 0.0),
            truncated_B=torch.cat([rollout.truncated_B for rollout in rollouts]),
            texts=[text for rollout in rollouts for text in rollout.texts],
        )


class GumbelSampler(LogitsProcessor):
    """Draw each row's next token with that row's own generator, record its log-prob, and leave it the only choice.

    argmax(log p + Gumbel noise) is a sample of p. With `seeds` None it is the plain argmax.
    """

    def __init__(self, policy: Policy, seeds: Sequence[int] | None):
        device = policy.device
        self.policy, self.logps = policy, []
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps_BV = self.policy.log_softmax(scores)
        keys_BV = logps_BV
        if self.generators is not None:
            noise_BV = torch.empty_like(logps_BV)
            for row_V, generator in zip(noise_BV, self.generators, strict=True):
                row_V.exponential_(generator=generator)
            keys_BV = logps_BV - noise_BV.clamp_min_(1e-30).log_()
        chosen_B1 = keys_BV.argmax(-1, keepdim=True)
        self.logps.append(logps_BV.gather(1, chosen_B1).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


def row_seed(seed: int, step: int, sample_id: str, g: int) -> int:
    """63 bits that depend on the run's seed, the step, the sample and the completion, and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sample_id}/{g}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    video_embeds: Sequence[Tensor],
    cfg: RolloutConfig,
    seed: int | None = 0,
    step: int = 0,
    occurrences: Sequence[int] | None = None,
    synced: bool = False,
) -> Rollout:
    """Sample `cfg.group_size` completions of each prompt, at the policy's own temperature.

    `policy` is the unwrapped model, and `video_embeds` holds each prompt's (video tokens, H). With `seed` None decoding
    is greedy. `occurrences[p]` is how often prompt p's sample stands earlier in the step's batch (0 by default): its
    completions are numbered on, so that they are not the same again. `cfg.micro_batch_size` prompts run at a time,
    which changes no sample. With `synced` it goes on until all processes are done, whose calls must be the same
    (weights that ZeRO-3 has cut up). The model is in eval mode meanwhile, because in training mode with gradient
    checkpointing transformers would drop the cache, and with it the prompt.
    """
    was_training = policy.training
    policy.eval()
    parts, before = [], occurrences or [0] * len(prompts)
    for i in range(0, len(prompts), cfg.micro_batch_size):
        some = slice(i, i + cfg.micro_batch_size)
        seeds = None
        if seed is not None:
            numbers = [range(n * cfg.group_size, (n + 1) * cfg.group_size) for n in before[some]]
            seeds = [row_seed(seed, step, p.sample.id, g) for p, own in zip(prompts[some], numbers) for g in own]
        parts.append(_generate(policy, prompts[some], video_embeds[some], cfg, seeds, synced))
    policy.train(was_training)
    tokens_BT = _stack([tokens for tokens, _ in parts], policy.pad_id)
    mask_BT = completion_mask(tokens_BT, policy.eos_ids)
    ends_B = tokens_BT.gather(1, mask_BT.sum(1, keepdim=True) - 1)
    truncated_B = ~torch.isin(ends_B, torch.tensor(policy.eos_ids, device=policy.device)).squeeze(1)
    # EOS alone is left out of the text: another special token that was sampled is seen, by the reward as well
    rows = zip(tokens_BT.cpu(), mask_BT.cpu(), truncated_B.tolist())
    kept = [tokens[mask].tolist()[: None if truncated else -1] for tokens, mask, truncated in rows]
    return Rollout(
        prompts=tuple(prompts),
        video_embeds=tuple(video_embeds),
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        logps_BT=_stack([logps for _, logps in parts], 0.0) * mask_BT,
        truncated_B=truncated_B,
        texts=policy.tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )


def _generate(policy, prompts, video_embeds, cfg, seeds, synced) -> tuple[Tensor, Tensor]:
    """Prefill once per prompt, decode G completions over its cache; tokens and log-probs (B, T)."""
    ids, mask, positions, deltas = _left_pad(policy, prompts)
    model = policy.model
    cache = model.model.language_model(
        inputs_embeds=policy.embed(ids, torch.cat(list(video_embeds))),
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
    ).past_key_values
    cache.crop(-1)  # generate() runs the last prompt token again, for its logits
    padding_PL, bias = mask[:, :-1] == 0, None
    if len({len(prompt.ids) for prompt in prompts}) > 1:
        bias = torch.zeros_like(padding_PL, dtype=model.dtype).masked_fill(padding_PL, -torch.inf)[:, None, None]
    cache.layers = [GroupLayer(layer, bias, cfg.max_new_tokens) for layer in cache.layers]
    ids, mask = ids.repeat_interleave(cfg.group_size, 0), mask.repeat_interleave(cfg.group_size, 0)
    model.model.rope_deltas = deltas.repeat_interleave(cfg.group_size, 0)
    sampler = GumbelSampler(policy, seeds)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=cfg.max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([sampler]),
        synced_gpus=synced,
    )
    model.model.rope_deltas = None
    if not all(layer.prompt.num_reads for layer in cache.layers):
        raise RuntimeError("the prompt's cache was not read: transformers hands keys over in another way than it did")
    return output[:, ids.shape[1] :], torch.stack(sampler.logps, 1)


def _left_pad(policy: Policy, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts of unequal length on the left of one batch: ids and mask (P, L), positions (3, P, L), deltas (P, 1).

    A completion token's position is its index among the real tokens plus the delta.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), policy.pad_id)
    mask = torch.zeros_like(ids)
    positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
    deltas = torch.zeros(len(prompts), 1, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        num = len(prompt.ids)
        positions[:, row, longest - num :], next_position = prompt_positions(prompt, policy.model.config)
        ids[row, longest - num :] = torch.tensor(prompt.ids)
        mask[row, longest - num :] = 1
        deltas[row] = next_position - num
    return tuple(x.to(policy.device) for x in (ids, mask, positions, deltas))


def _stack(parts: list[Tensor], fill: float) -> Tensor:
    """Concatenate (b, t) tensors of unequal t along b, filled at the end."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
