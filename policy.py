"""The policy: a Qwen2-VL / Qwen2.5-VL model that scores G completions over one shared prompt.

`Policy.forward` is what `accelerator.prepare` wraps, and the only thing that is called with gradients: it takes packed
completions and returns their log-probs and entropies.

One row holds, per video, the prompt and then its G completions, ragged and without padding:

    [prompt 1 | c 1,1 | ... | c 1,G][prompt 2 | c 2,1 | ...]

A completion token sees its prompt and its own past. Its rotary position goes on where the prompt ends, whatever
completions stand between; the first token of each completion is predicted by the prompt's last hidden state.
"""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from config import ModelConfig
from model.attention import Span, make_span
from model.folder import banned_ids, load_model, stop_ids
from model.positions import rope_positions
from prompts import Prompt

HEAD_CHUNK = 512  # most completion tokens in a chunk of the head: their (chunk, V) float32 logits are all that is kept


@dataclass(frozen=True)
class Packed:
    """Videos with their completions in one row of S tokens; N completion tokens in all, B completions."""

    prompts: tuple[Prompt, ...]
    spans: tuple[Span, ...]
    ids_S: Tensor
    positions_3S: Tensor  # rotary positions (time, height, width)
    predictor_N: Tensor  # index in the row of the token that predicts completion token n
    targets_N: Tensor  # completion token ids
    lengths_B: Tensor  # tokens per completion, in the order of the row
    num_chunks: int  # in which the head takes the completion tokens


def prompt_positions(prompt: Prompt, config) -> tuple[Tensor, int]:
    """Rotary positions (3, P) of a prompt and the position of its first completion token, under a model's config."""
    after = len(prompt.ids) - prompt.video_start - prompt.video.num_tokens
    grid = (*prompt.video.grid_thw, prompt.video.second_per_grid)
    tokens_per_second = config.vision_config.tokens_per_second if config.model_type == "qwen2_5_vl" else None
    return rope_positions([prompt.video_start, grid, after], config.vision_config.spatial_merge_size, tokens_per_second)


def pack(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Sequence[int]]],
    config,
    device,
    most_tokens: int = 0,
) -> Packed:
    """Lay videos and their completions (token ids, each at least one) out in one row, see the head of this file.

    `most_tokens`: completion tokens of the longest row of any process, where all have to call the head equally often.
    """
    spans, ids, positions, predictor, targets, lengths = [], [], [], [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        start, prompt_end = len(ids), len(ids) + len(prompt.ids)
        prompt_3P, next_position = prompt_positions(prompt, config)
        ids += prompt.ids
        positions.append(prompt_3P)
        for tokens in group:
            predictor += [prompt_end - 1, *range(len(ids), len(ids) + len(tokens) - 1)]
            positions.append((next_position + torch.arange(len(tokens))).expand(3, -1))
            ids += tokens
            targets += tokens
            lengths.append(len(tokens))
        spans.append(make_span(start, len(prompt.ids), [len(tokens) for tokens in group], device))
    return Packed(
        prompts=tuple(prompts),
        spans=tuple(spans),
        ids_S=torch.tensor(ids, device=device),
        positions_3S=torch.cat(positions, dim=1).to(device),
        predictor_N=torch.tensor(predictor, device=device),
        targets_N=torch.tensor(targets, device=device),
        lengths_B=torch.tensor(lengths, device=device),
        num_chunks=-(-max(len(targets), most_tokens) // HEAD_CHUNK),
    )


class Policy(nn.Module):
    """A video language model as a distribution over completions.

    `temperature` divides the logits and `banned` ids have probability 0, in sampling and scoring alike. `adapter` is
    peft's wrapper of `model`, None without LoRA. `vision_is_frozen`: nothing under the tower or merger is trained.
    """

    def __init__(self, model, tokenizer, temperature: float = 1.0, adapter: PeftModel | None = None):
        super().__init__()
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.__dict__["adapter"] = adapter  # not a submodule: its parameters are those of `model`
        # read once: peft takes requires_grad away while the adapter is off
        self.vision_is_frozen = not any(p.requires_grad for p in model.model.visual.parameters())
        self.register_buffer("banned", banned_ids(model.config, tokenizer), persistent=False)
        self.eos_ids, self.pad_id = stop_ids(model.generation_config, tokenizer)
        # generate() fills what it is not told from the checkpoint (a repetition penalty, a near-zero temperature)
        self.model.generation_config = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)

    @property
    def device(self) -> torch.device:
        return self.banned.device

    def adapter_off(self) -> AbstractContextManager:
        """A context in which the policy is the model it started from: the reference. Nothing happens without LoRA.

        Embeddings made before hold the merger's adapter, if any: inside, let `forward` run the tower again.
        """
        return nullcontext() if self.adapter is None else self.adapter.disable_adapter()

    def embed_videos(self, prompts: Sequence[Prompt]) -> Tensor:
        """Run the vision tower once over all videos; (sum of their tokens, H) in the order of the prompts.

        Their patches are on the policy's device, see data.make_reader.
        """
        patches = torch.cat([prompt.video.patches for prompt in prompts])
        grids = torch.tensor([prompt.video.grid_thw for prompt in prompts], device=self.device)
        return torch.cat(self.model.model.get_video_features(patches, grids).pooler_output)

    @torch.no_grad()
    def embed_each(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Each prompt's video embeddings (video tokens, H), without gradient, from one run of the tower."""
        return list(self.embed_videos(prompts).split([prompt.video.num_tokens for prompt in prompts]))

    def embed(self, ids: Tensor, video_embeds: Tensor) -> Tensor:
        """Token embeddings (..., H) of ids (...), the video placeholders filled with `video_embeds` in order."""
        embeds = self.model.get_input_embeddings()(ids)
        holes = (ids == self.model.config.video_token_id).unsqueeze(-1).expand_as(embeds)
        return embeds.masked_scatter(holes, video_embeds.to(embeds.dtype))

    def forward(
        self, packed: Packed, video_embeds: Tensor | None = None, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each completion token, and the entropy (nats) of the distribution it came from.

        `video_embeds` (sum of video tokens, H) spares the tower a run; None runs it, with gradients if it has any.
        The entropy has a gradient only with `entropy_grad`, for a bonus in the loss.
        Returns two float32 tensors (N,), in the order of `packed.targets_N`.
        """
        if video_embeds is None:
            video_embeds = self.embed_videos(packed.prompts)
        text_model = self.model.model.language_model
        hidden_1SH = text_model(
            inputs_embeds=self.embed(packed.ids_S[None], video_embeds),
            position_ids=packed.positions_3S[:, None],
            attention_mask=dict.fromkeys(text_model.config.layer_types),  # ours needs none: spans say it all
            use_cache=False,
            spans=packed.spans,
        ).last_hidden_state
        return self._head(hidden_1SH[0, packed.predictor_N], packed.targets_N, packed.num_chunks, entropy_grad)

    def _head(self, hidden_NH: Tensor, targets_N: Tensor, num: int, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        chunks = list(zip(hidden_NH.tensor_split(num), targets_N.tensor_split(num)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            parts = [checkpoint(self._head_chunk, *chunk, entropy_grad, use_reentrant=False) for chunk in chunks]
        else:
            parts = [self._head_chunk(*chunk, entropy_grad) for chunk in chunks]
        logps, entropies = zip(*parts)
        return torch.cat(logps), torch.cat(entropies)

    def _head_chunk(self, hidden_NH: Tensor, targets_N: Tensor, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        logps_NV = self.log_softmax(self.model.lm_head(hidden_NH))
        logps_N = logps_NV.gather(1, targets_N[:, None]).squeeze(1)
        if not entropy_grad:
            logps_NV = logps_NV.detach()
        # 0 for the -inf of banned ids: p log p and its gradient are 0 there, not NaN
        return logps_N, -(logps_NV.exp() * logps_NV.masked_fill(logps_NV == -torch.inf, 0.0)).sum(-1)

    def fingerprint(self) -> str:
        """A hash of up to 64 numbers of every weight: equal for equal weights, wherever they lie and on any device."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            some = weight.flatten()[:: max(1, weight.numel() // 64)][:64]
            digest.update(name.encode() + some.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Float32 log-probs (..., V) of the distribution that is sampled from and scored."""
        return (logits.float() / self.temperature).index_fill(-1, self.banned, -torch.inf).log_softmax(-1)


def load_policy(cfg: ModelConfig, temperature: float = 1.0) -> Policy:
    """The policy of `model.folder.load_model`, whose errors it raises."""
    model, tokenizer, adapter = load_model(cfg)
    return Policy(model, tokenizer, temperature, adapter)


def pad_rows(values_N: Tensor, lengths_B: Tensor, num_columns: int) -> Tensor:
    """(N,) values of ragged completions to (B, num_columns), 0 past the end of each.

    >>> pad_rows(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2]), 3).tolist()
    [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]
    """
    mask_BT = torch.arange(num_columns, device=lengths_B.device) < lengths_B[:, None]
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


def packed_logps(
    policy: nn.Module, packed: Packed, video_embeds: Tensor | None, num_columns: int, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, num_columns) of packed completions, 0 past their ends; `policy` may be wrapped."""
    logps_N, entropy_N = policy(packed, video_embeds, entropy_grad)
    return pad_rows(logps_N, packed.lengths_B, num_columns), pad_rows(entropy_N, packed.lengths_B, num_columns)
