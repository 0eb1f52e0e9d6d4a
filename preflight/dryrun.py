"""A training step on PyTorch's meta device, whose tensors have shapes and no data: what it holds and computes by phase.

The code that trains (policy.py, the cache and the sampler of rollout.py, the optimizer) runs forward and backward, and
the sizes of the tensors that are alive are added up. No weights and no GPU are needed. Only attention has a stand-in.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForImageTextToText

from config import ModelConfig
from model import attention
from model.attention import GroupLayer
from model.folder import freeze_and_adapt
from policy import Policy, pack, packed_logps
from prompts import Prompt
from rollout import GumbelSampler

META = torch.device("meta")


@dataclass(frozen=True)
class Device:
    """What a device reaches, not its peaks. An operation takes the longest of its three times."""

    flops: float  # per second
    bytes: float  # of memory read and written per second
    launch_s: float  # seconds of any operation, however small
    type: str = "cpu"  # or "cuda"; type and capability decide which kernel computes attention
    capability: tuple[int, int] = (0, 0)  # of CUDA


@dataclass
class Phase:
    """One part of a step: bytes held when it began, the most at one time in it, FLOPs and seconds with its repeats."""

    held: int = 0
    peak: int = 0
    flops: float = 0.0
    seconds: float = 0.0


class DryRun(TorchDispatchMode):
    """A context in which operations on meta tensors are counted, into the phase that `begin` has named.

    Tensors made inside are counted as long as they live, and weights are not. Small tensors of indices may be real, so
    that code decides by their values as always. Where they meet a meta tensor they become one. Stand-ins take the
    memory of a fused kernel of attention. Its plain form is run as in training.
    """

    def __init__(self, device: Device):
        super().__init__()
        self.device = device
        self.live = 0  # bytes
        self.cache = 0  # bytes of the KV cache at its largest, once `sample` has run
        self.phases: dict[str, Phase] = {}
        self._phase, self._repeat = Phase(), 1.0  # before the first has begun
        self._sizes: dict[int, weakref.ref] = {}  # storages by address
        self._known: dict[tuple, tuple] = {}  # results of operations and their FLOPs by inputs: layers are alike

    def __enter__(self) -> "DryRun":
        self._real = torch.nn.functional.scaled_dot_product_attention, attention.attend, attention.attend_backward
        torch.nn.functional.scaled_dot_product_attention = self._attention
        attention.attend, attention.attend_backward = self._attend, self._attend_backward
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch.nn.functional.scaled_dot_product_attention, attention.attend, attention.attend_backward = self._real

    def begin(self, name: str, repeat: float = 1.0) -> None:
        """What runs from here on belongs to phase `name`; a real step runs it `repeat` times."""
        self._phase, self._repeat = self.phases.setdefault(name, Phase()), repeat
        self._phase.held = max(self._phase.held, self.live)
        self._phase.peak = max(self._phase.peak, self.live)

    def count(self, flops: float, num_bytes: float) -> None:
        """One operation in the present phase."""
        seconds = max(flops / self.device.flops, num_bytes / self.device.bytes, self.device.launch_s)
        self._phase.flops += self._repeat * flops
        self._phase.seconds += self._repeat * seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_view(func):
            return func(*args, **kwargs)
        inputs: list[Tensor] = []
        key = func, _scan(args, inputs), _scan(kwargs, inputs)
        num_meta = sum(x.is_meta for x in inputs)
        if not num_meta:
            self._hold(out := func(*args, **kwargs))
            return out
        if num_meta < len(inputs):
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(META), (args, kwargs))
        if func._schema.is_mutable:  # in place: no data changes here, and no shape does
            self.count(0, sum(x.nbytes for x in inputs))
            return args[0] if func._schema.returns else None
        if key not in self._known:
            kwargs = {name: META if name == "device" else value for name, value in kwargs.items()}
            out = func(*args, **kwargs)
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self._known[key] = tree_map_only(Tensor, _like, out), flops  # not `out`: it may be a view of the inputs
        known, flops = self._known[key]
        out = tree_map_only(Tensor, _like, known)
        num_bytes = self._hold(out)
        if "empty" not in func.__name__:
            self.count(flops, num_bytes + sum(x.nbytes for x in inputs))
        return out

    def _hold(self, made) -> int:
        """Count new tensors until they are gone; returns their bytes."""
        tensors: list[Tensor] = []
        _scan(made, tensors)
        before = self.live
        for storage in [x.untyped_storage() for x in tensors if x.is_meta]:
            address, size = storage._cdata, storage.nbytes()
            self._sizes[address] = weakref.ref(storage, partial(self._release, address, size))
            self.live += size
        self._phase.peak = max(self._phase.peak, self.live)
        return self.live - before

    def _release(self, address: int, size: int, _) -> None:
        self.live -= size
        del self._sizes[address]

    def _kernel(self, query: Tensor, has_bias: bool) -> str:
        device = self.device
        return attention.choose_kernel(device.type, query.dtype, query.shape[3], has_bias, device.capability)

    def _attention(self, query, key, value, attn_mask=None, is_causal=False, **kwargs) -> Tensor:
        if self._kernel(query, has_bias=False) == "plain":
            return self._real[0](query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)
        return _Attention.apply(query, key, value, attn_mask, self, _flops(query, key, is_causal))

    def _attend(self, query, key, value, is_causal, scale, bias=None) -> tuple[Tensor, Tensor]:
        if self._kernel(query, bias is not None) == "plain":
            return attention._plain(query, key, value, is_causal, scale, bias)
        self.count(_flops(query, key, is_causal), 0)
        return _fused_outputs(query)

    def _attend_backward(self, grad, query, key, value, out, lse, is_causal, scale) -> tuple[Tensor, ...]:
        kernel = self._kernel(query, has_bias=False)
        if kernel == "plain":
            return attention._plain_backward(grad, query, key, value, out, lse, is_causal, scale)
        self.count(2.5 * _flops(query, key, is_causal), 0)  # five products
        # CUDA's kernels want the output in another layout, and flash adds up the query's gradient in float32
        copies = [] if kernel == "cpu" else [out.transpose(1, 2).contiguous()]
        copies += [query.new_empty(query.shape, dtype=torch.float32)] if kernel == "flash" else []
        return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _flops(query: Tensor, key: Tensor, is_causal: bool) -> float:
    """Of the two products of attention, forward."""
    return 4 * query.shape[:-1].numel() * key.shape[2] / (2 if is_causal else 1) * query.shape[3]


def _fused_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, laid out as a fused kernel does."""
    batch, heads, num, size = query.shape
    out = query.new_empty(batch, num, heads, size).transpose(1, 2)
    return out, query.new_empty(batch, heads, num, dtype=torch.float32)


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its output, one float32 a row; a boolean mask in the dtype of the rest."""

    @staticmethod
    def forward(ctx, query, key, value, mask, run, flops):
        mask = None if mask is None else mask.to(query.dtype)
        out, log_sums = _fused_outputs(query)
        ctx.save_for_backward(query, key, value, mask, out, log_sums)
        ctx.run, ctx.flops = run, flops
        run.count(flops, 0)
        return out

    @staticmethod
    def backward(ctx, _):
        query, key, value, *_ = ctx.saved_tensors
        ctx.run.count(2.5 * ctx.flops, 0)  # five products
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), None, None, None


def meta_policy(cfg: ModelConfig, config, tokenizer) -> Policy:
    """What policy.load_policy makes of a model folder, from the folder's configuration and without weights."""
    with META:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, cfg.dtype), attn_implementation="shared_prefix"
        )
    return Policy(model, tokenizer, adapter=freeze_and_adapt(model, cfg))


@dataclass(frozen=True)
class Call:
    """One call of the model's: prompts of one length, `group_size` completions of `num_new` tokens each."""

    prompts: Sequence[Prompt]
    embeds: Sequence[Tensor]  # of each prompt's video; none where the tower runs anew
    group_size: int
    num_new: int
    repeat: float  # calls like this one in a step

    def pack(self, policy: Policy):
        completions = [[[0] * self.num_new] * self.group_size] * len(self.prompts)
        return pack(self.prompts, completions, policy.model.config, META)

    @property
    def video_embeds(self) -> Tensor | None:
        return torch.cat(list(self.embeds)) if self.embeds else None


@torch.no_grad()
def sample(run: DryRun, policy: Policy, call: Call) -> None:
    """What rollout.generate does with one micro-batch.

    Two of its steps are run: the one half way stands for all in FLOPs and time, and the last one holds the most.
    """
    policy.eval()
    text, num, longest = policy.model.model.language_model, len(call.prompts), len(call.prompts[0].ids)
    num_rows, kinds = num * call.group_size, set(text.config.layer_types)
    run.begin("prefill", call.repeat)
    ids = torch.tensor([prompt.ids for prompt in call.prompts])
    # lengths are not really equal: several prompts are padded, and so there is a mask
    mask = None if num == 1 else torch.empty(num, 1, longest, longest, dtype=torch.bool, device=META)
    cache = text(
        inputs_embeds=policy.embed(ids, call.video_embeds),
        position_ids=torch.zeros(3, num, longest, dtype=torch.long),
        attention_mask=dict.fromkeys(kinds, mask),
        use_cache=True,
    ).past_key_values
    del mask
    cache.crop(-1)
    bias = None if num == 1 else torch.empty(num, 1, 1, longest - 1, dtype=policy.model.dtype, device=META)
    cache.layers = [GroupLayer(layer, bias, call.num_new) for layer in cache.layers]
    num_done = 0
    for num_before, steps in ((call.num_new // 2, call.repeat * call.num_new), (call.num_new - 1, 0)):
        run.begin("decode", 0)
        for layer in cache.layers:
            _, heads, _, size = layer.prompt.keys.shape
            past = layer.prompt.keys.new_empty(num_rows, heads, num_before - num_done, size)
            layer.update(past, past)
        del past
        num_done = num_before + 1
        run.begin("decode", steps)
        hidden_B1H = text(
            inputs_embeds=policy.model.get_input_embeddings()(ids[:, -1:].repeat_interleave(call.group_size, 0)),
            position_ids=torch.zeros(3, num_rows, 1, dtype=torch.long),
            attention_mask=dict.fromkeys(kinds),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        run.begin("sampler", steps)
        logits_BV = policy.model.lm_head(hidden_B1H)[:, -1].to(torch.float32, copy=True)
        GumbelSampler(policy, range(num_rows))(None, logits_BV)
        del hidden_B1H, logits_BV
    parts = [(layer.prompt.keys, layer.prompt.values, layer.keys, layer.values) for layer in cache.layers]
    run.cache = sum(x.nbytes for part in parts for x in part)


@torch.no_grad()
def score(run: DryRun, policy: Policy, call: Call) -> None:
    """The reference's log-probs of one micro-batch."""
    policy.eval()
    run.begin("reference", call.repeat)
    with policy.adapter_off():
        packed_logps(policy, call.pack(policy), call.video_embeds, call.num_new)


def update(run: DryRun, policy: Policy, call: Call, entropy_grad: bool, keep_gradients: bool) -> None:
    """Forward and backward of one micro-batch. Without `keep_gradients` each is dropped as soon as it is complete."""
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    hooks = []
    if not keep_gradients:
        hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]

    def leave_layers(_module, _inputs, output) -> None:
        run.begin("head", call.repeat)
        output.last_hidden_state.register_hook(lambda _: run.begin("backward", call.repeat))

    hooks.append(policy.model.model.language_model.register_forward_hook(leave_layers))
    run.begin("forward", call.repeat)
    scored = packed_logps(policy, call.pack(policy), call.video_embeds, call.num_new, entropy_grad)
    sum(x.sum() for x in scored if x.requires_grad).backward()
    for hook in hooks:
        hook.remove()


def optimize(run: DryRun, optimizer: torch.optim.Optimizer) -> int:
    """Two steps of an optimizer on one device; returns the bytes of its state. Gradients are not counted."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    with run:
        optimizer.step()  # which makes the state, before any phase
        state = run.live
        run.begin("optimizer")
        optimizer.step()
    optimizer.zero_grad()
    return state


@cache
def _is_view(func) -> bool:
    schema = func._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def _scan(tree, tensors: list[Tensor]):
    """A key that is equal for equal arguments, tensors by their layout; appends those to `tensors`."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, list | tuple):
        return tuple([_scan(part, tensors) for part in tree])
    if isinstance(tree, dict):
        return tuple([(name, _scan(part, tensors)) for name, part in tree.items()])
    return type(tree), tree


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
