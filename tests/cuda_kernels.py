"""The attention kernels of CUDA on a CPU, as far as their contracts go: what they read, ignore, refuse and return.

Taken from torch's sources: aten/src/ATen/native/transformers/cuda, the files attention_backward.cu,
flash_attn/flash_api.cpp, mem_eff_attention/kernel_forward.h and kernel_backward.h.
"""

import torch

from model import attention
from model.attention import LSE_MULTIPLE, choose_kernel

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


class CudaKernels:
    """Stands in the place of torch.ops.aten. `calls` counts the calls of each kernel by its name.

    Products are taken in float32 and rounded to the type of the inputs where the kernels round them. `any_type` lets
    flash take float32, so that what it reads can be checked to more digits than bfloat16 has.
    """

    def __init__(self, any_type: bool = False):
        self.any_type, self.calls = any_type, {}

    def __getattr__(self, name: str):
        raise AssertionError(f"a tensor on a GPU would not find aten.{name}")

    def _scaled_dot_product_flash_attention(self, query, key, value, dropout_p, is_causal, *, scale):
        self._enter("flash", query, key, value)
        self._check_flash(query, key, value)
        out, lse = forward(query, key, value, lower_right(query, key) if is_causal else None, scale)
        return rows_of_heads(out), lse.contiguous(), *7 * [None]

    def _scaled_dot_product_flash_attention_backward(
        self, grad, query, key, value, out, lse, *shape_and_dropout, scale
    ):
        cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *_ = shape_and_dropout
        assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, query.shape[2], key.shape[2], 0.0)
        self._enter("flash_backward", query, key, value)
        self._check_flash(query, key, value, out, grad)
        assert grad.shape == out.shape == query.shape and lse.dtype == torch.float32
        batch, heads, num, _ = query.shape
        lse = read(lse, (batch, heads, num), (heads * num, num, 1))  # by its pointer
        mask = lower_right(query, key) if is_causal else None
        return backward(grad, query, key, value, out, lse, mask, scale)

    def _scaled_dot_product_efficient_attention(
        self, query, key, value, bias, compute_log_sumexp, dropout_p, is_causal, *, scale
    ):
        assert bias is None and compute_log_sumexp and dropout_p == 0.0
        self._enter("efficient", query, key, value)
        self._check_efficient(query, key, value)
        out, lse = forward(query, key, value, upper_left(query, key) if is_causal else None, scale)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_MULTIPLE), value=torch.inf)
        return rows_of_heads(out), padded, None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, query, key, value, bias, out, lse, seed, offset, dropout_p, wanted, is_causal, *, scale
    ):
        assert bias is None and dropout_p == 0.0 and wanted == [True, True, True, False]
        self._enter("efficient_backward", query, key, value)
        self._check_efficient(query, key, value, out, grad)
        batch, heads, num, size = query.shape
        assert heads == 1 or lse.stride(1) % 8 == 0, "LSE is not correctly aligned (strideH)"
        assert batch == 1 or lse.stride(0) % 8 == 0, "LSE is not correctly aligned (strideB)"
        assert grad.shape == out.shape == query.shape and lse.dtype == torch.float32
        padded = num + -num % LSE_MULTIPLE
        lse = read(lse, (batch, heads, padded), (lse.stride(0), lse.stride(1), 1))  # to the end of its last block
        assert (lse[..., num:] == torch.inf).all(), "queries past the end have weights"
        out = read(out, out.shape, (out.stride(0), out.stride(1), heads * size, 1))  # a row's stride is taken as known
        mask = upper_left(query, key) if is_causal else None
        return *backward(grad, query, key, value, out, lse[..., :num], mask, scale), None

    def _enter(self, name: str, query, key, value) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        (batch, heads, _, size), (_, _, num, _) = query.shape, key.shape
        assert key.shape == value.shape == (batch, heads, num, size)
        assert all(x.stride(3) == 1 for x in (query, key, value)), "the last dimension is not contiguous"

    def _check_flash(self, query, *others) -> None:
        assert query.dtype in HALF or self.any_type, "FlashAttention only supports fp16 and bf16"
        assert all(x.dtype == query.dtype for x in others)
        assert query.shape[3] % 8 == 0 and query.shape[3] <= 256

    def _check_efficient(self, query, *others) -> None:
        assert query.dtype in (torch.float32, torch.float16)
        assert all(x.dtype == query.dtype for x in others)  # the kernel would read another type as this one
        for x in (query, *others):
            assert (x.storage_offset() * x.itemsize) % 16 == 0 and x.stride(2) % 4 == 0, "not correctly aligned"


def lower_right(query, key):
    """Flash's causal mask: the last query sees all keys."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])


def upper_left(query, key):
    """The efficient kernel's causal mask: the first query sees one key."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()


def read(x, shape, strides):
    """What is found at a tensor's pointer. Raises RuntimeError past the end of its memory."""
    return torch.as_strided(x, shape, strides, x.storage_offset())


def rows_of_heads(out):
    """The layout of the kernels' outputs: (B, S, heads, D) in memory."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def scores_of(query, key, mask, scale):
    scores = query.float() @ key.float().mT * scale
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def forward(query, key, value, mask, scale):
    scores = scores_of(query, key, mask, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(query.dtype)
    return (weights.float() @ value.float()).to(query.dtype), lse


def backward(grad, query, key, value, out, lse, mask, scale):
    weights = (scores_of(query, key, mask, scale) - lse[..., None]).exp()
    q, k, v, o, g = (x.float() for x in (query, key, value, out, grad))
    grad_scores = (weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale).to(query.dtype).float()
    grads = grad_scores @ k, grad_scores.mT @ q, weights.to(query.dtype).float().mT @ g
    return tuple(rows_of_heads(x.to(query.dtype)) for x in grads)


def emulate(monkeypatch, name: str) -> CudaKernels:
    """Have model/attention.py compute on the CPU what it would on a GPU that has the kernel `name`: flash or
    efficient."""
    kernels = CudaKernels(any_type=name == "flash")
    capability = (9, 0) if name == "flash" else (7, 5)

    def kernel_of(query, bias=None):
        dtype = torch.bfloat16 if name == "flash" and query.dtype == torch.float32 else query.dtype
        return choose_kernel("cuda", dtype, query.shape[3], bias is not None, capability)

    monkeypatch.setattr(attention, "aten", kernels)
    monkeypatch.setattr(attention, "kernel_of", kernel_of)
    return kernels


def as_it_was(grad, query, key, value, out, lse, is_causal, scale):
    """attention.attend_backward with the defect that it had: the log-sum-exp goes to CUDA's kernel with its strides."""
    shape = (None, None, query.shape[2], key.shape[2], 0.0, is_causal, None, None)
    return attention.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, *shape, scale=scale
    )
