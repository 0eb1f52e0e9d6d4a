"""What model/attention.py hands to the kernels of a GPU: tried on a CPU, by an emulation of what these kernels read."""

import copy
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, make_cfg, make_policy, make_prompts, open_run, rewards_of, sgd
from cuda_kernels import CudaKernels, emulate, forward
from test_attention import SCALE, completions_inputs, dense, draw
from test_update import UPDATE, recorded_rollout

import train_grpo
from groups import choose_groups
from model import attention
from model.attention import (
    CompletionAttention,
    SharedPrompt,
    attend,
    attend_backward,
    choose_kernel,
    group_attention,
    make_span,
)
from policy import pad_rows
from preflight import kernelcheck
from preflight.kernelcheck import attention_errors

KERNELS = [("flash", torch.bfloat16), ("flash", torch.float32), ("efficient", torch.float32)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a value or a gradient, relative to the largest
GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of one update: norm of the difference over the norm


def assert_near(ours, expected, dtype):
    for found, wanted in zip(ours, expected, strict=True):
        atol = TOLERANCE[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(found.double(), wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("name, dtype", KERNELS)
@pytest.mark.parametrize("lengths", [[1], [4, 4, 4], [3, 1, 7, 2], [130, 5]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
def test_completions_see_their_prompt_and_their_own_past(monkeypatch, name, dtype, lengths, heads, kv_heads):
    """Against a dense mask in float64. The log-sum-exp was handed over with strides that CUDA does not look at, so that
    a row read the value of another completion, and the gradients of a run on a GPU would have been wrong."""
    span, inputs = completions_inputs(lengths, heads, kv_heads, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    kernels = emulate(monkeypatch, name)
    ours = CompletionAttention.apply(*inputs, span, SCALE)
    expected = dense(*exact, span)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    assert kernels.calls == {name: 2, f"{name}_backward": 2}  # over the prompt, and over their own past
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert_near([ours, *grads], [expected, *wanted], dtype)


@pytest.mark.parametrize("name, dtype", KERNELS)
def test_group_attention_is_attention_over_the_repeated_prompt(monkeypatch, name, dtype):
    num, group, num_kv, heads, length, own, dim = 2, 3, 2, 4, 7, 5, 8
    prompts, completions = (num, num_kv, length, dim), (num * group, num_kv, own, dim)
    shapes = (num * group, heads, 1, dim), prompts, prompts, completions, completions
    query, prompt_key, prompt_value, key, value = (x.detach() for x in draw(*shapes, dtype=dtype))
    kernels = emulate(monkeypatch, name)
    ours = group_attention(query, key, value, SharedPrompt(prompt_key, prompt_value, None), SCALE)
    keys, values = (
        torch.cat([prompt.repeat_interleave(group, 0), each], 2).repeat_interleave(heads // num_kv, 1).double()
        for prompt, each in ((prompt_key, key), (prompt_value, value))
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), keys, values, scale=SCALE)
    assert kernels.calls == {name: 2}
    assert_near([ours], [expected.transpose(1, 2)], dtype)


@pytest.mark.parametrize("name, dtype", KERNELS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_layout_in_memory_changes_no_gradient(monkeypatch, name, dtype, is_causal):
    """Every argument of `attend_backward` as a transposed view, or with a gap between its rows, or both."""
    query, key, value, grad = (x.detach() for x in draw(*4 * [(2, 3, 40, 8)], dtype=dtype))
    emulate(monkeypatch, name)
    arguments = [grad, query, key, value, *attend(query, key, value, is_causal, SCALE)]
    expected = attend_backward(*arguments, is_causal, SCALE)

    def gaps(x):
        return torch.cat([x, x + 1], 2)[:, :, : x.shape[2]]

    def turned(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    for change in (gaps, turned, lambda x: gaps(turned(x))):
        ours = attend_backward(*map(change, arguments), is_causal, SCALE)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_what_no_kernel_takes_is_computed_plainly(monkeypatch):
    """A head size that is no multiple of 8, a bias, a type without a kernel: no kernel is called."""
    kernels = emulate(monkeypatch, "efficient")
    for size, dtype, bias in ((12, torch.float32, None), (8, torch.float32, torch.zeros(1, 1, 1, 6)), (8, None, None)):
        inputs = [x.detach() for x in draw(*3 * [(1, 2, 6, size)], dtype=dtype or torch.bfloat16)]
        ours, lse = attend(*inputs, False, SCALE, bias)
        expected, expected_lse = forward(*inputs, None, SCALE)
        torch.testing.assert_close(ours, expected, atol=1e-2 if dtype is None else 1e-6, rtol=0)
        torch.testing.assert_close(lse, expected_lse)
        if bias is None:
            assert len(attend_backward(ours, *inputs, ours, lse, False, SCALE)) == 3
    assert kernels.calls == {}


@pytest.mark.parametrize("device, dtype, size, has_bias, capability, expected", [
    ("cpu", torch.bfloat16, 128, False, (0, 0), "cpu"),
    ("cuda", torch.bfloat16, 128, False, (8, 0), "flash"),
    ("cuda", torch.bfloat16, 128, False, (7, 5), "plain"),  # was flash, which ends the run there
    ("cuda", torch.bfloat16, 264, False, (9, 0), "plain"),
    ("cuda", torch.bfloat16, 36, False, (9, 0), "plain"),
    ("cuda", torch.bfloat16, 128, True, (9, 0), "plain"),
    ("cuda", torch.float32, 128, False, (9, 0), "efficient"),
    ("cuda", torch.float64, 128, False, (9, 0), "plain"),
    ("mps", torch.float32, 128, False, (0, 0), "plain"),
])  # fmt: skip
def test_which_kernel_is_chosen(device, dtype, size, has_bias, capability, expected):
    assert choose_kernel(device, dtype, size, has_bias, capability) == expected


def test_builds_for_amd_take_the_plain_form(monkeypatch):
    """Their torch calls its devices cuda, too, but its kernels have other contracts."""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert choose_kernel("cuda", torch.bfloat16, 128, False, (9, 4)) == "plain"
    assert choose_kernel("cpu", torch.bfloat16, 128, False, (0, 0)) == "cpu"


def test_a_mix_up_of_rows_is_seen_at_real_shapes(monkeypatch):
    """Queries of one size would hide it: with 1,000 keys all their log-sum-exps are nearly equal."""
    emulate(monkeypatch, "flash")
    layer = SimpleNamespace(num_key_value_groups=8, is_causal=True, training=False)
    spans = [make_span(0, 1000, [3, 20], torch.device("cpu"))]
    right = attention_errors(layer, spans, (16, 2, 128), torch.bfloat16)
    assert max(right.values()) < kernelcheck.TOLERANCE[torch.bfloat16]
    whole = attention.attend_backward
    monkeypatch.setattr(
        attention,
        "attend_backward",
        lambda grad, q, k, v, out, lse, *rest: whole(grad, q, k, v, out, lse.roll(1, 2), *rest),
    )
    wrong = attention_errors(layer, spans, (16, 2, 128), torch.bfloat16)
    assert min(wrong[name] for name in wrong if name != "values") > 1


def test_the_emulation_notices_what_the_kernels_would_not_forgive():
    """Else the tests above would prove nothing: strides are ignored, and other types, sizes and rows are refused."""
    kernels = CudaKernels()
    query, key, value, grad = (x.detach() for x in draw(*4 * [(2, 2, 40, 8)], dtype=torch.bfloat16))
    out, lse, *_ = kernels._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=SCALE)
    shape = (None, None, 40, 40, 0.0, False, None, None)
    lse_with_strides = lse.transpose(0, 1).contiguous().transpose(0, 1)
    right, wrong = (
        kernels._scaled_dot_product_flash_attention_backward(grad, query, key, value, out, x, *shape, scale=SCALE)
        for x in (lse, lse_with_strides)
    )
    assert (right[0] - wrong[0]).abs().max() > 0.1
    with pytest.raises(AssertionError, match="only supports"):
        kernels._scaled_dot_product_flash_attention(*3 * [query.float()], 0.0, False, scale=SCALE)
    single = [x.float() for x in (grad, query, key, value)]
    out, lse, *_ = kernels._scaled_dot_product_efficient_attention(*single[1:], None, True, 0.0, False, scale=SCALE)
    assert lse.shape == (2, 2, 64) and (lse[..., 40:] == torch.inf).all()
    rest = (None, None, 0.0, [True, True, True, False], False)
    efficient_backward = kernels._scaled_dot_product_efficient_attention_backward
    efficient_backward(*single, None, out, lse, *rest, scale=SCALE)
    for spoiled in ((out, lse[..., :40].contiguous()), (out.contiguous(), lse)):
        with pytest.raises(RuntimeError, match="out of bounds"):
            efficient_backward(*single, None, *spoiled, *rest, scale=SCALE)
    with pytest.raises(AssertionError, match="would not find"):
        kernels._scaled_dot_product_flash_attention_for_cpu()


# ---- one update ----------------------------------------------------------------------------------------------------


def repeated(policy, packed, video_embeds, num_columns, entropy_grad=False):
    """In the place of policy.packed_logps: every completion behind a prompt of its own, through torch's attention."""
    found = importlib.import_module("gpu").repeated_logps(policy, packed, video_embeds, entropy_grad)
    return tuple(pad_rows(values_N, packed.lengths_B, num_columns) for values_N in found)


def one_update(world, tmp_path, name: str, dtype: str, lora: bool, monkeypatch, whole=None):
    """Gradients of one update of four videos with ragged completions, and the rollout that it is of."""
    overrides = (*UPDATE, f"run.dir={tmp_path}/{name}", "data.micro_batch_size=3", "loss.entropy=0.01")
    cfg = make_cfg(world, tmp_path, *overrides)
    run = open_run(cfg)
    model = {"lora_rank": 4, "lora_alpha": 8.0} if lora else {}
    raw, reference = (make_policy(world, sharpen=sharpen, dtype=dtype, **model) for sharpen in (3.0, 2.5))
    generator = torch.Generator().manual_seed(2)
    for policy in (raw, reference):
        for key, weight in policy.named_parameters():
            if "lora_B" in key:  # at 0, as adapters start, they would leave lora_A without a gradient
                weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))
            if dtype == "float32":  # the same numbers in both types
                weight.data.copy_(weight.data.bfloat16())
    reference.requires_grad_(False)
    rollout = whole or recorded_rollout(raw, make_prompts(world, raw, num=4))
    tokens_NG = rollout.mask_BT.sum(1).view(4, 4)
    totals_NG = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    optimizer = sgd(raw, cfg.optim)
    policy, prepared = run.engine.accelerator.prepare(raw, optimizer)
    rollout = replace(rollout, video_embeds=tuple(raw.embed_each(rollout.prompts)))
    batch = choose_groups(rewards_of(totals_NG, tokens_NG=tokens_NG, places=range(4)), cfg)
    with monkeypatch.context() as patch:
        if name == "repeated":
            patch.syspath_prepend(str(REPO / "benchmarks"))
            patch.setattr(train_grpo, "packed_logps", repeated)
        else:
            kernels = emulate(patch, name)
        train_grpo.update(policy, reference, prepared, rollout, batch, cfg, run)
    if name != "repeated":
        assert kernels.calls[f"{name}_backward"] == 2 * 4 * 4  # two parts of attention, four layers, four videos
    return {key: p.float() for (key, _), p in zip(trained(raw), optimizer.grads, strict=True)}, rollout


def trained(policy):
    return [(name, p) for name, p in policy.named_parameters() if p.requires_grad]


def relative_error(ours: dict, expected: dict) -> float:
    assert ours.keys() == expected.keys()
    difference = sum((ours[key] - expected[key]).square().sum() for key in expected)
    return (difference / sum(value.square().sum() for value in expected.values())).sqrt().item()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_update_is_that_of_the_repeated_prompt(world, tmp_path, monkeypatch, lora):
    """Log-probs, KL, entropy, loss and all gradients, against torch's own attention in float32."""
    expected, rollout = one_update(world, tmp_path, "repeated", "float32", lora, monkeypatch)
    for name, dtype in (("flash", "float32"), ("efficient", "float32"), ("flash", "bfloat16")):
        folder = tmp_path / dtype
        ours, _ = one_update(world, folder, name, dtype, lora, monkeypatch, copy.deepcopy(rollout))
        error = relative_error(ours, expected)
        assert 0 < error < GRADIENT_ERROR[getattr(torch, dtype)], (name, dtype)
