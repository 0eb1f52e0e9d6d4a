"""Attention over a shared prompt equals torch's own under a dense mask, values and gradients, whatever kernel runs."""

import pytest
import torch
from test_policy import tree_mask
from torch.nn.functional import scaled_dot_product_attention

from model.attention import (
    CompletionAttention,
    SharedPrompt,
    _plain,
    _plain_backward,
    attend,
    attend_backward,
    group_attention,
    make_span,
    merge,
)

SCALE = 0.3


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def completions_inputs(lengths, heads, kv_heads, dtype=torch.float64, num_prompt=11, dim=8):
    span = make_span(5, num_prompt, lengths, torch.device("cpu"))
    num = sum(lengths)
    shapes = (1, heads, num, dim), *2 * [(1, kv_heads, num_prompt + num, dim)]
    return span, draw(*shapes, dtype=dtype)


def dense(query, key, value, span):
    return scaled_dot_product_attention(query, key, value, tree_mask(span), scale=SCALE, enable_gqa=True)


@pytest.mark.parametrize("lengths", [[1], [4, 4, 4], [3, 1, 7, 2], [1, 1], [130, 5]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
def test_completions_see_their_prompt_and_their_own_past(lengths, heads, kv_heads):
    """Against the dense mask, values and all three gradients, in float64."""
    span, inputs = completions_inputs(lengths, heads, kv_heads)
    ours, expected = CompletionAttention.apply(*inputs, span, SCALE), dense(*inputs, span)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, expected)]
    for grad, expected_grad in zip(*grads):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


def test_in_bfloat16_it_is_as_exact_as_torchs_own():
    """Errors against float64 of the rounded inputs: ours is at most 1.5 times that of the dense mask."""
    span, inputs = completions_inputs([30, 50, 9], 4, 2, torch.bfloat16, num_prompt=200, dim=32)
    exact = dense(*(x.detach().double() for x in inputs), span)
    ours = (CompletionAttention.apply(*inputs, span, SCALE).double() - exact).square().mean().sqrt()
    torchs = (dense(*inputs, span).double() - exact).square().mean().sqrt()
    assert 0 < ours < 1.5 * torchs


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_plain_form_equals_the_kernel(is_causal):
    """Output, log-sum-exp and gradients; the plain form serves devices without the kernel."""
    query, key, value, grad = (x.detach() for x in draw(*4 * [(2, 3, 6, 8)]))
    kernel, plain = attend(query, key, value, is_causal, SCALE), _plain(query, key, value, is_causal, SCALE)
    for ours, theirs in zip(plain, kernel, strict=True):
        torch.testing.assert_close(ours, theirs.contiguous(), atol=1e-12, rtol=0)
    arguments = (grad, query, key, value, *kernel, is_causal, SCALE)
    for ours, theirs in zip(_plain_backward(*arguments), attend_backward(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_the_plain_form_takes_the_bias():
    query, key, value = (x.detach() for x in draw((2, 3, 4, 8), *2 * [(2, 3, 6, 8)]))
    bias = torch.zeros(2, 1, 1, 6, dtype=torch.float64)
    bias[1, ..., :2] = -torch.inf
    for ours, theirs in zip(*(f(query, key, value, False, SCALE, bias) for f in (_plain, attend)), strict=True):
        torch.testing.assert_close(ours, theirs.contiguous(), atol=1e-12, rtol=0)


def test_merging_by_hand():
    """One query; scores ln 1 and ln 3 of values 0 and 4: weights 1/4 and 3/4, so 3; log-sum-exp ln 4."""
    zero, four = torch.zeros(1, 1), torch.full((1, 1), 4.0)
    out, lse = merge(zero, torch.tensor([0.0]), four, torch.tensor([3.0]).log())
    assert out.item() == pytest.approx(3.0) and lse.exp().item() == pytest.approx(4.0)


@pytest.mark.parametrize("num_padding", [0, 3])
def test_group_attention_is_attention_over_the_repeated_prompt(num_padding):
    """Two prompts, the second left-padded or not, with three completions each: against torch's, all keys repeated."""
    num, group, num_kv, heads, length, own, dim = 2, 3, 2, 4, 7, 5, 8
    prompts, completions = (num, num_kv, length, dim), (num * group, num_kv, own, dim)
    inputs = draw((num * group, heads, 1, dim), prompts, prompts, completions, completions)
    query, prompt_key, prompt_value, key, value = (x.detach() for x in inputs)
    is_real = torch.arange(length) >= torch.tensor([[0], [num_padding]])
    bias = torch.zeros(num, 1, 1, length, dtype=torch.float64).masked_fill(~is_real[:, None, None], -torch.inf)
    shared = SharedPrompt(prompt_key, prompt_value, bias if num_padding else None)
    ours = group_attention(query, key, value, shared, SCALE)
    keys, values = (
        torch.cat([prompt.repeat_interleave(group, 0), each], 2).repeat_interleave(heads // num_kv, 1)
        for prompt, each in ((prompt_key, key), (prompt_value, value))
    )
    mask = torch.cat([is_real.repeat_interleave(group, 0), torch.ones(num * group, own, dtype=torch.bool)], 1)
    expected = scaled_dot_product_attention(query, keys, values, mask[:, None, None], scale=SCALE)
    torch.testing.assert_close(ours, expected.transpose(1, 2), atol=1e-12, rtol=0)
    assert shared.num_reads == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(dtype, atol):
    span, inputs = completions_inputs([30, 50, 9], 4, 2, num_prompt=200, dim=32)
    exact = CompletionAttention.apply(*inputs, span, SCALE)
    weights = torch.randn_like(exact)
    expected = [exact, *torch.autograd.grad((exact * weights).sum(), inputs)]
    moved = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    ours = CompletionAttention.apply(*moved, make_span(5, 200, [30, 50, 9], torch.device("cuda")), SCALE)
    grads = torch.autograd.grad((ours * weights.to("cuda", dtype)).sum(), moved)
    for found, wanted in zip((ours, *grads), expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), wanted, atol=atol * wanted.abs().max().item(), rtol=0)
