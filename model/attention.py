"""Attention over a shared prompt: what transformers calls for text layers and vision windows of our models.

Not a cache or a model. A completion's token sees its prompt and its own past. These are two attentions, each without a
mask, so that flash kernels apply, no completion sees another one's keys, and a prompt's keys are neither copied nor
masked; their outputs are merged by the log-sum-exp of their scores. Gradients are exact: given the merged output and
log-sum-exp, the backward of each part is that part's share (FlashAttention, arXiv 2205.14135, algorithm 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

aten = torch.ops.aten
LSE_MULTIPLE = 32  # CUDA's efficient kernel reads rows of the log-sum-exp that are padded to a multiple of this


@dataclass(frozen=True)
class Span:
    """Where one video's prompt and its completions lie in the packed row."""

    start: int
    prompt_end: int
    end: int
    lengths: tuple[int, ...]  # tokens of each completion
    places: Tensor  # (end - prompt_end,): each completion token's place in a table of G rows of max(lengths)


def make_span(start: int, num_prompt: int, lengths: Sequence[int], device: torch.device) -> Span:
    """
    >>> make_span(0, 5, [1, 3, 2], torch.device("cpu")).places.tolist()
    [0, 3, 4, 5, 6, 7]
    """
    longest, end = max(lengths), start + num_prompt
    places = torch.cat([row * longest + torch.arange(num) for row, num in enumerate(lengths)])
    return Span(start, end, end + sum(lengths), tuple(lengths), places.to(device))


@dataclass
class SharedPrompt:
    """One layer's keys and values (P, kv heads, L, D) of P prompts, which the completions of each of them share."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None  # (P, 1, 1, L): -inf on padding; None where there is none
    num_reads: int = 0  # by group_attention; 0 after sampling: the completions never saw the prompt


def choose_kernel(device: str, dtype: torch.dtype, head_size: int, has_bias: bool, capability: tuple[int, int]) -> str:
    """The kernel that computes attention: "cpu", "flash", "efficient", or "plain" where no fused one will do.

    `device` is a device's type, `capability` the CUDA compute capability (major, minor). CUDA's flash kernel takes
    bfloat16 from capability 8.0 on. The efficient kernel takes float32 on any card. Both need a head size that is a
    multiple of 8, and flash also needs one of at most 256. AMD's builds of torch have kernels with other contracts,
    which are not used.

    >>> for dtype in (torch.bfloat16, torch.float32):
    ...     print([choose_kernel("cuda", dtype, 128, False, capability) for capability in ((9, 0), (7, 5))])
    ['flash', 'plain']
    ['efficient', 'efficient']
    """
    if device == "cpu":
        return "cpu"
    if device != "cuda" or torch.version.hip or has_bias or head_size % 8:
        return "plain"
    if dtype == torch.bfloat16 and capability >= (8, 0) and head_size <= 256:
        return "flash"
    return "efficient" if dtype == torch.float32 else "plain"


def kernel_of(query: Tensor, bias: Tensor | None = None) -> str:
    """`choose_kernel` of a query on its device."""
    capability = _capability(query.device) if query.is_cuda else (0, 0)
    return choose_kernel(query.device.type, query.dtype, query.shape[3], bias is not None, capability)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend(query, key, value, is_causal: bool, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention (B, heads, S, D) and the log-sum-exp of each query's scores (B, heads, S).

    Keys and values (B, heads, L, D). Causal means that query s sees the keys up to s, and needs L = S, because kernels
    align other shapes differently. `bias` broadcasts to (B, heads, S, L) and is added to the scores. On a CPU the
    output is float32 at least.
    """
    kernel = kernel_of(query, bias)
    if kernel == "cpu":
        query, key, value, bias = _exact(query, key, value, bias)
        mask = None if bias is None else bias.expand(len(query), 1, query.shape[2], -1)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]
    if kernel == "efficient":
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )
        return out, lse[..., : query.shape[2]]  # without the padding
    return _plain(query, key, value, is_causal, scale, bias)


def attend_backward(grad, query, key, value, out, lse, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, if exp(scores - lse) are the weights that `out` was made with.

    Each kernel gets exactly what it reads. CUDA's kernels find the log-sum-exp by its pointer and ignore strides: flash
    reads (B, heads, S), contiguous; efficient reads rows that are padded to a multiple of 32, and takes a row of `out`
    to follow the one before it after heads x D numbers. Both take any `grad` of the query's type.
    """
    kernel, lse = kernel_of(query), lse.contiguous()
    if kernel == "cpu":
        grad, query, key, value, out = _exact(grad, query, key, value, out)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, is_causal, scale=scale
        )
    if kernel == "plain":
        return _plain_backward(grad, query, key, value, out, lse, is_causal, scale)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    if kernel == "flash":
        state = torch.empty(2, dtype=torch.uint64, device=query.device)  # for dropout, which we do not have
        shape = (None, None, query.shape[2], key.shape[2], 0.0, is_causal, state, state[:0])
        return aten._scaled_dot_product_flash_attention_backward(grad, query, key, value, out, lse, *shape, scale=scale)
    lse = pad(lse, (0, -lse.shape[2] % LSE_MULTIPLE), value=torch.inf)
    state = torch.empty(0, dtype=torch.int64, device=query.device)
    wanted = [True, True, True, False]  # the last one is the bias
    found = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, lse, state, state, 0.0, wanted, is_causal, scale=scale
    )
    return found[:3]


def _exact(*tensors: Tensor | None) -> list[Tensor | None]:
    """In float32 at least: in bfloat16 the CPU's kernel takes another exponential where a row of keys ends, and the
    log-prob of a token would depend on how many keys stand beside its own."""
    return [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    """In float32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril() if is_causal else None
    return scores if past is None else scores.masked_fill(~past, -torch.inf)


def _plain(query, key, value, is_causal, scale, bias=None):
    """`attend` for devices and types without a kernel that returns the log-sum-exp."""
    scores = _scores(query, key, is_causal, scale)
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value.to(scores.dtype)).to(query.dtype), lse


def _plain_backward(grad, query, key, value, out, lse, is_causal, scale):
    weights = (_scores(query, key, is_causal, scale) - lse[..., None]).exp()
    grad, query, key, value, out = (x.to(weights.dtype) for x in (grad, query, key, value, out))
    grad_scores = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the keys of both, from two attentions (..., S, D) of the same queries over different keys."""
    both = torch.logaddexp(lse, other_lse)
    return out * (lse - both).exp()[..., None] + other * (other_lse - both).exp()[..., None], both


class CompletionAttention(torch.autograd.Function):
    """Of the N completion tokens of one video: query (1, heads, N, D), key and value (1, kv heads, P + N, D)."""

    @staticmethod
    def forward(ctx, query, key, value, span: Span, scale: float) -> Tensor:
        num = span.prompt_end - span.start
        out, lse = attend(_fold(query, key), key[:, :, :num], value[:, :, :num], False, scale)
        own, own_lse = attend(*_tables(query, key[:, :, num:], value[:, :, num:], span), True, scale)
        out, lse = out.reshape(query.shape), lse.reshape(query.shape[:3])
        out, lse = merge(out, lse, _rows(own, span), _rows(own_lse[..., None], span)[..., 0])
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.span, ctx.scale = span, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        span, num, kv_heads = ctx.span, ctx.span.prompt_end - ctx.span.start, key.shape[1]
        folded = [_fold(x, key) for x in (grad, query, out)]
        grads = attend_backward(
            *folded[:2], key[:, :, :num], value[:, :, :num], folded[2], _fold(lse, key), False, ctx.scale
        )
        tables = _tables(query, key[:, :, num:], value[:, :, num:], span)
        out_table, lse_table = _table(out, span), _table(lse[..., None], span)[..., 0]
        own = attend_backward(_table(grad, span), *tables, out_table, lse_table, True, ctx.scale)
        grad_q, *own_kv = (_rows(x, span) for x in own)
        own_kv = [x.unflatten(1, (kv_heads, -1)).sum(2) for x in own_kv]  # of a key that several heads of queries read
        grad_kv = [torch.cat(pair, dim=2).to(key.dtype) for pair in zip(grads[1:], own_kv)]
        return (grads[0].reshape(query.shape) + grad_q).to(query.dtype), *grad_kv, None, None


def _fold(x: Tensor, key: Tensor) -> Tensor:
    """(1, heads, N, ...) as (1, kv heads, heads / kv heads * N, ...): the heads of one key as more queries of it."""
    return x.reshape(1, key.shape[1], -1, *x.shape[3:])


def _table(x: Tensor, span: Span) -> Tensor:
    """(1, heads, N, D) as (G, heads, T, D), with zeros past the end of each completion."""
    num, longest = len(span.lengths), max(span.lengths)
    table = x.new_zeros(x.shape[1], num * longest, x.shape[3]).index_copy_(1, span.places, x[0])
    return table.unflatten(1, (num, longest)).transpose(0, 1)


def _tables(query: Tensor, key: Tensor, value: Tensor, span: Span) -> list[Tensor]:
    """The completions' own, keys and values repeated for the heads that read them."""
    num = query.shape[1] // key.shape[1]
    return [_table(query, span), *(_table(x, span).repeat_interleave(num, dim=1) for x in (key, value))]


def _rows(table: Tensor, span: Span) -> Tensor:
    """(G, heads, T, D) as (1, heads, N, D): what _table made of it."""
    return table.transpose(0, 1).flatten(1, 2)[:, span.places][None]


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, spans=None, **kwargs):
    """Attention of a packed row: prompts plainly causal, completions over their prompt and themselves.

    Without `spans` this is transformers' sdpa (prefill), or, where the cache keeps prompts apart
    (rollout.GroupLayer), `group_attention`.
    Shapes: query (1, heads, S, D), key and value (1, kv heads, S, D); returns (1, S, heads, D), None.
    """
    if hasattr(key, "prompt"):
        return group_attention(query, key, value, key.prompt, scaling), None
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    outputs, sizes = [], [span.end - span.start for span in spans]  # one split: a slice each costs its backward O(S)
    kwargs |= {"scaling": scaling, "is_causal": True}
    rows = zip(spans, query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
    for span, q, k, v in rows:
        num = span.prompt_end - span.start
        q_prompt, q_completions = q.split([num, q.shape[2] - num], dim=2)
        k_prompt, v_prompt = k[:, :, :num], v[:, :, :num]
        outputs.append(sdpa_attention_forward(module, q_prompt, k_prompt, v_prompt, None, **kwargs)[0])
        outputs.append(CompletionAttention.apply(q_completions, k, v, span, scaling).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def group_attention(query: Tensor, key: Tensor, value: Tensor, prompt: SharedPrompt, scale: float) -> Tensor:
    """Attention of one new token of each of P x G completions, over its prompt and its own past.

    The G tokens are queries of one call over the keys of their prompt, which stand there once.
    Shapes: query (B, heads, 1, D), key and value (B, kv heads, t, D) of the completions; returns (B, 1, heads, D).
    """
    prompt.num_reads += 1
    num, kv_heads = prompt.keys.shape[:2]
    size, heads = len(query) // num, query.shape[1] // kv_heads  # completions of a prompt; queries of a key
    folded = query.reshape(num, size, kv_heads, heads, -1).transpose(1, 2).flatten(2, 3)
    out, lse = attend(folded, prompt.keys, prompt.values, False, scale, prompt.bias)
    out, lse = (x.unflatten(2, (size, heads)).transpose(1, 2).flatten(0, 1) for x in (out, lse))
    own, own_lse = attend(query.reshape(-1, kv_heads, heads, query.shape[3]), key, value, False, scale)
    return merge(out, lse, own, own_lse)[0].flatten(1, 2)[:, None].to(query.dtype)


def window_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """Vision attention within windows of (1, heads, N, D) patches, all windows of one length in one call.

    Window i is the patches cu_seq_lens_q[i] to cu_seq_lens_q[i + 1]. Returns (1, N, heads, D), None.
    """
    kwargs = {name: kwargs[name] for name in ("scaling", "dropout", "is_causal")}
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    outputs, places = [], []
    for length in lengths.unique().tolist():
        rows = starts[lengths == length, None] + torch.arange(length, device=starts.device)
        q, k, v = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))
        outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
        places.append(rows.flatten())
    return torch.cat(outputs)[torch.cat(places).argsort()][None], None


AttentionInterface.register("shared_prefix", shared_prefix_attention)
# "flash" in the name makes transformers hand over all windows at once, not one by one
AttentionInterface.register("flash_windows", window_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


class GroupLayer(DynamicLayer):
    """A layer's cache in which P prompts stand once, and only what their P x G completions add stands per row.

    There is room for `most_new` tokens of each: none is copied twice. `update` hands the prompts' keys and values
    over beside the completions' own, for attention.group_attention.
    """

    def __init__(self, layer: DynamicLayer, bias: Tensor | None, most_new: int):
        super().__init__()
        self.prompt = SharedPrompt(layer.keys, layer.values, bias)
        self.most_new, self.num_new, self.room = most_new, 0, None

    def get_seq_length(self) -> int:
        return self.prompt.keys.shape[2] + self.num_new

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        new, start = (key_states, value_states), self.num_new
        if self.room is None:
            self.room = [x.new_empty(*x.shape[:2], self.most_new, x.shape[3]) for x in new]
        self.num_new += key_states.shape[2]
        for room, x in zip(self.room, new):
            room[:, :, start : self.num_new] = x
        self.keys, self.values = (room[:, :, : self.num_new] for room in self.room)
        self.keys.prompt = self.prompt
        return self.keys, self.values
