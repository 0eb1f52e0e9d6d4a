"""The dry run against real runs: what is alive at the most, FLOPs, the cache, the optimizer's state."""

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import make_policy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoTokenizer

import config
from model import attention
from model.optim import make_optimizer
from policy import pack, packed_logps
from preflight.dryrun import META, Call, Device, DryRun, meta_policy, optimize, sample, score, update
from prompts import Prompt
from records.record import Sample
from rollout import generate
from video.frames import Video

DEVICE = Device(flops=1e12, bytes=1e12, launch_s=1e-6)
AMPERE = replace(DEVICE, type="cuda", capability=(8, 0))
GRID, TEXT, G, T = (4, 16, 16), 30, 4, 40  # 256 video tokens


class Meter(TorchDispatchMode):
    """The bytes of real tensors made inside that are alive, and the most of them; independent of
    preflight/dryrun.py."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self.seen.keys():
                self.note(x.untyped_storage())
        return out

    def note(self, storage) -> None:
        address, size = storage._cdata, storage.nbytes()

        def gone(_):
            self.live -= size
            del self.seen[address]

        self.seen[address] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def peak_of(self, call) -> int:
        before = self.peak = self.live
        with self:
            call()
        return self.peak - before


def make_prompt(model, num_text: int = TEXT, device=None) -> Prompt:
    patches = torch.zeros(GRID[0] * GRID[1] * GRID[2], 1176, device=device)
    video = Video(patches, GRID, 1.0, [], 256, 0)
    ids = [1] * 10 + [model.video_token_id] * 256 + [1] * (num_text - 10)
    return Prompt(Sample("x", "tvg", "", ""), ids, 10, video)


def both(world, family: str, **cfg):
    """The real policy and the one without data, which never ends a completion early."""
    real = make_policy(world, family, **cfg)
    real.banned = torch.cat([real.banned, torch.tensor(real.eos_ids)])
    path = str(world / ("model" if family == "qwen2_5_vl" else "model_qwen2_vl"))
    model = AutoConfig.from_pretrained(path)
    return real, meta_policy(config.ModelConfig(path=path, **cfg), model, AutoTokenizer.from_pretrained(path))


KINDS = {
    "frozen tower": {},
    "trained tower": {"freeze_vision": False},
    "checkpointing": {"freeze_vision": False, "gradient_checkpointing": True},
    "adapters": {"lora_rank": 4, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", ["checkpointing", "adapters"])
def test_the_most_that_is_alive_is_that_of_a_real_update(world, kind):
    """Reference, forward and backward, both with the real code; the real ones on real tensors."""
    check_update(world, "qwen2_5_vl", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_for_every_kind(world, family, kind):
    check_update(world, family, kind)


def test_the_plain_form_of_attention_is_counted_where_it_will_run(world, monkeypatch):
    """As on a device without a fused kernel: whole matrices of scores, which the plan left out."""
    monkeypatch.setattr(attention, "kernel_of", lambda *_: "plain")
    with sdpa_kernel(SDPBackend.MATH):
        plain = check_update(world, "qwen2_5_vl", "frozen tower", device="mps", rel=0.04)
    monkeypatch.undo()
    assert plain > 1.2 * check_update(world, "qwen2_5_vl", "frozen tower")


def test_kernels_of_a_gpu_hold_little_more_than_that_of_a_cpu(world):
    """The output in another layout, and with flash the query's gradient in float32; plain below capability 8.0."""
    _, meta = both(world, "qwen2_5_vl", dtype="bfloat16", lora_rank=4)
    call, peaks = Call([make_prompt(meta.model.config, device=META)], (), G, T, 1), {}
    for device, capability in (("cpu", (0, 0)), ("cuda", (8, 0)), ("cuda", (7, 5))):
        run = DryRun(replace(DEVICE, type=device, capability=capability))
        with run:
            update(run, meta, call, entropy_grad=False, keep_gradients=False)
        peaks[device, capability] = max(phase.peak for phase in run.phases.values())
    cpu, ampere, turing = peaks.values()
    queries = G * T * 4 * 32  # completion tokens, heads, head size
    assert 0 <= ampere - cpu <= (2 + 4) * queries
    assert turing > 1.2 * ampere


@pytest.mark.parametrize(
    ("device", "capability", "more"),
    [("cpu", (0, 0), 0), ("cuda", (8, 0), 2 + 4), ("cuda", (7, 5), None)],
)
def test_what_a_backward_pass_of_attention_holds(device, capability, more):
    """Per number of the query: flash wants the output in another layout, and adds up a gradient in float32."""
    tensors = [torch.empty(1, 2, 50, 8, dtype=torch.bfloat16, device=META) for _ in range(5)]
    lse, run = torch.empty(1, 2, 50, device=META), DryRun(replace(DEVICE, type=device, capability=capability))
    with run:
        run.begin("backward")
        found = attention.attend_backward(*tensors, lse, True, 1.0)
    size, peak = tensors[0].numel(), run.phases["backward"].peak
    if more is None:
        assert peak > 3 * 4 * 2 * 50 * 50  # three float32 matrices of scores
    else:
        assert peak == 3 * 2 * size + more * size
    assert len(found) == 3


def test_prompts_of_unequal_length_are_sampled_without_a_fused_kernel(world):
    """On a GPU their padding needs a bias, which no fused kernel takes: scores are held, and more calls are made."""
    _, meta = both(world, "qwen2_5_vl")
    found = {}
    for num in (1, 2):
        prompts, run = [make_prompt(meta.model.config, device=META)] * num, DryRun(AMPERE)
        with run:
            run.begin("vision")
            embeds = meta.embed_each(prompts)
            sample(run, meta, Call(prompts, embeds, G, T, 1))
        found[num] = run.phases["decode"].seconds
    assert found[2] > 1.1 * found[1]  # a launch costs as much for one prompt as for two


def check_update(world, family: str, kind: str, device: str = "cpu", rel: float = 0.01) -> int:
    """Compares both, and returns the most that a forward and backward pass holds."""
    real, meta = both(world, family, **KINDS[kind])
    prompt, embeds = make_prompt(real.model.config), []
    if real.vision_is_frozen:
        embeds = real.embed_each([prompt])

    def scored(entropy_grad: bool):
        packed = pack([prompt], [[[1] * T] * G], real.model.config, "cpu")
        return packed_logps(real, packed, torch.cat(embeds) if embeds else None, T, entropy_grad)

    meter = Meter()
    with torch.no_grad(), real.adapter_off():
        reference = meter.peak_of(lambda: scored(False))
    real.train()
    for p in real.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    trained = meter.peak_of(lambda: sum(x.sum() for x in scored(True)).backward())

    prompt = make_prompt(meta.model.config, device=META)
    call = Call([prompt], [x.to(META) for x in embeds], G, T, 1)
    run = DryRun(replace(DEVICE, type=device))
    with run:
        score(run, meta, call)
        update(run, meta, call, entropy_grad=True, keep_gradients=False)
    assert run.live == 0
    if embeds:  # else patches weigh more than the tiny tower, and those of the host are counted for a moment
        assert run.phases["reference"].peak == pytest.approx(reference, rel=rel)
    found = max(run.phases[name].peak for name in ("forward", "head", "backward"))
    assert found == pytest.approx(trained, rel=rel)
    return found


def test_kept_gradients_are_counted(world):
    """Without dropping them, all trained weights' gradients are alive at the end."""
    _, meta = both(world, "qwen2_5_vl", freeze_vision=False)
    run = DryRun(DEVICE)
    with run:
        update(run, meta, Call([make_prompt(meta.model.config, device=META)], (), G, T, 1), False, keep_gradients=True)
    assert run.live == sum(p.nbytes for p in meta.parameters())


def test_sampling_holds_what_generate_does(world, family):
    """Two prompts of unequal length, through the tower, prefill and Hugging Face's loop."""
    real, meta = both(world, family)
    prompts = [make_prompt(real.model.config, TEXT - i) for i in range(2)]
    meter, kept = Meter(), []
    meter.peak_of(lambda: kept.extend(real.embed_each(prompts)))
    sampled = meter.peak_of(lambda: generate(real, prompts, kept, config.RolloutConfig(G, 1.0, T, 2)))
    run, prompts = DryRun(DEVICE), [make_prompt(meta.model.config, device=META)] * 2
    with run:
        run.begin("vision")
        embeds = meta.embed_each(prompts)
        held = run.live
        sample(run, meta, Call(prompts, embeds, G, T, 1))
    found = max(run.phases[name].peak for name in ("prefill", "decode", "sampler")) - held
    assert found == pytest.approx(sampled, rel=0.02)
    # 4 layers x keys and values x 2 heads x 32 float32 x (2 prompts without their last token, 8 completions of 40)
    assert run.cache == 4 * 2 * 2 * 32 * 4 * (2 * (256 + TEXT - 1) + 8 * T)
    assert run.phases["sampler"].held >= run.cache


def test_flops_and_seconds_of_a_product():
    """(4, 8) x (8, 16): 2 x 512 FLOPs forward, twice that backward; an operation takes its slowest part."""
    a = torch.empty(4, 8, device=META, requires_grad=True)
    b = torch.empty(8, 16, device=META, requires_grad=True)
    run = DryRun(Device(flops=1.0, bytes=1e9, launch_s=1e-9))
    with run:
        run.begin("forward", repeat=3)
        out = a @ b
        run.begin("backward")
        out.backward(torch.empty_like(out))
    assert run.phases["forward"].flops == 3 * 1024
    assert run.phases["forward"].seconds == pytest.approx(3 * 1024)
    assert run.phases["backward"].flops == 2 * 1024
    slow = DryRun(Device(flops=1e30, bytes=1.0, launch_s=1e-9))
    with slow, torch.no_grad():
        slow.begin("x")
        a @ b
    assert slow.phases["x"].seconds == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    launched = DryRun(Device(flops=1e30, bytes=1e30, launch_s=0.5))
    with launched, torch.no_grad():
        launched.begin("x")
        (a @ b).view(16, 4).add_(1)  # a view costs nothing
    assert launched.phases["x"].seconds == 1.0


def test_flops_of_attention():
    """6 rows see 10 keys, 2 heads of 4: 2 products of 2 x 4 FLOPs a pair; causal: half the pairs; five backward."""
    q, k = (torch.empty(1, 2, n, 4, device=META, requires_grad=True) for n in (6, 10))
    run = DryRun(DEVICE)
    with run:
        run.begin("masked")
        mask = torch.empty(6, 10, dtype=torch.bool, device=META)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        run.begin("backward")
        out.sum().backward()
        run.begin("causal")
        torch.nn.functional.scaled_dot_product_attention(k, k, k, is_causal=True)
    assert run.phases["masked"].flops == 2 * 60 * 2 * 8
    assert run.phases["backward"].flops == 2.5 * 2 * 60 * 2 * 8
    assert run.phases["causal"].flops == 2 * 50 * 2 * 8
    assert out.shape == q.shape and q.grad.shape == q.shape and k.grad.shape == k.shape


def test_the_real_functions_are_back_afterwards():
    def functions():
        return torch.nn.functional.scaled_dot_product_attention, attention.attend, attention.attend_backward

    before = functions()
    with pytest.raises(KeyError), DryRun(DEVICE):
        assert not set(before) & set(functions())
        raise KeyError
    assert before == functions()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_loaded_model(world, family, kind):
    real, meta = both(world, family, **KINDS[kind])
    found = [[(name, p.shape, p.dtype, p.requires_grad) for name, p in x.named_parameters()] for x in (real, meta)]
    assert found[0] == found[1]
    assert all(p.is_meta for p in meta.parameters())


def test_optimizer_state_is_counted_as_it_is_made(world):
    """AdamW: two numbers a trained parameter; in one call for all, as on a GPU, one more while it steps."""
    _, meta = both(world, "qwen2_5_vl", freeze_vision=True)
    trained = sum(p.nbytes for p in meta.parameters() if p.requires_grad)
    cfg = config.OptimConfig()
    for foreach, low, high in ((True, 0.99, 1.01), (False, 0.01, 0.5)):
        optimizer, run = make_optimizer(meta, cfg), DryRun(DEVICE)
        for group in optimizer.param_groups:
            group["foreach"] = foreach
        state = optimize(run, optimizer)
        assert state == 2 * trained
        assert low * trained <= run.phases["optimizer"].peak - state <= high * trained
    muon = optimize(DryRun(DEVICE), make_optimizer(meta, replace(cfg, muon_lr=1e-2)))
    assert trained < muon < 2 * trained  # one number for a matrix
    assert not any(p.grad is not None for p in meta.parameters())


def test_the_state_is_that_of_a_real_optimizer(world):
    real, meta = both(world, "qwen2_5_vl", freeze_vision=False)
    cfg = config.OptimConfig(muon_lr=1e-2)
    optimizer = make_optimizer(real, cfg)
    for p in real.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = {**optimizer.state, **optimizer.adamw.state}
    size = sum(x.nbytes for state in held.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim())
    assert optimize(DryRun(DEVICE), make_optimizer(meta, cfg)) == size
