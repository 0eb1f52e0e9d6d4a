"""The packed attention against attention by its definition: values and gradients, on the device at hand.

Fused kernels read some of their inputs by a pointer alone, so that a wrong layout gives wrong gradients and no error.
The self-check tries the kernel of a run before the first step, and benchmarks/gpu.py tries every kernel of the device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.attention import Span, shared_prefix_attention

# Allowed errors, by type. A wrong layout gives 1 and more. A CPU that emulated the kernels of a GPU had at most 6e-6 in
# float32 and 0.023 in bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def attention_errors(
    layer: nn.Module | None,
    spans: Sequence[Span],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    exact: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Errors of the packed attention of random numbers in `dtype`, against `plain_attention` of them in `exact`.

    `shape`: heads, kv heads, head size; `layer`: the module that transformers calls attention for. An error is the norm
    of the difference over the norm. Compared are the values at the last token of each prompt and at the tokens of the
    completions, and the gradients of query, key and value that come from there.
    """
    (heads, kv_heads, size), num, device = shape, spans[-1].end, spans[0].places.device
    generator, scale = torch.Generator(device).manual_seed(0), size**-0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # some queries are sure of their keys and others are not: their log-sum-exps differ, and a mix-up of rows is seen
    query = draw(1, heads, num, size) * draw(1, heads, num, 1).exp()
    inputs = [x.to(dtype) for x in (query, draw(1, kv_heads, num, size), draw(1, kv_heads, num, size))]
    scored = torch.cat([torch.arange(span.prompt_end - 1, span.end, device=device) for span in spans])
    weights = draw(1, len(scored), heads, size).to(dtype)

    def values_and_gradients(kind: torch.dtype, attention: Callable) -> list[Tensor]:
        leaves = [x.to(kind, copy=True).requires_grad_() for x in inputs]
        with torch.enable_grad():
            values = attention(*leaves)
            return [values, *torch.autograd.grad((values * weights.to(kind)).sum(), leaves)]

    ours = values_and_gradients(
        dtype, lambda *qkv: shared_prefix_attention(layer, *qkv, None, scale, spans=spans)[0][:, scored]
    )
    theirs = values_and_gradients(exact, lambda *qkv: plain_attention(*qkv, spans, scale))
    names = ("values", "gradient of query", "gradient of key", "gradient of value")
    pairs = zip(names, ours, theirs, strict=True)
    return {name: ((a.to(exact) - b).norm() / b.norm()).item() for name, a, b in pairs}


def plain_attention(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
    """Attention by its definition, of the last token of each prompt and of each completion over its prompt and itself.

    Shapes: query (1, heads, S, D), key and value (1, kv heads, S, D); returns (1, such tokens of S, heads, D).
    """
    outputs, (key, value) = [], (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    for span in spans:
        parts = [(span.prompt_end - 1, span.prompt_end - 1, span.prompt_end)]  # end of the prompt, own start, own end
        for length in span.lengths:
            parts.append((span.prompt_end, parts[-1][2], parts[-1][2] + length))
        for shared, start, end in parts:
            keys, values = (torch.cat([x[:, :, span.start : shared], x[:, :, start:end]], 2) for x in (key, value))
            scores = query[:, :, start:end] @ keys.mT * scale
            past = torch.ones(scores.shape[2:], dtype=torch.bool, device=key.device).tril(shared - span.start)
            outputs.append(scores.masked_fill(~past, -torch.inf).softmax(-1) @ values)
    return torch.cat(outputs, 2).transpose(1, 2)
