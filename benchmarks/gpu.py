"""Whether one NVIDIA GPU computes what this code takes it to compute: one command, no weights, no network.

    python benchmarks/gpu.py                 # a GPU with 24 GB, about two minutes
    python benchmarks/gpu.py --shrink        # small shapes, on a CPU too

The parts, whose checks are written to OUT/gpu.json as they are done (--out, by default runs/gpu):

    attention   values and gradients of the packed attention by the kernels that training takes and by the plain form,
                and values of the attention while sampling, against attention by its definition in float64
    packed      log-probs and gradients of a model with two layers at the widths of Qwen2.5-VL-3B, of packed rows
                against the prompt repeated for every completion
    sampling    log-probs that the same model noted while it sampled, against those of scoring

An error of attention or of gradients is the norm of the difference over the norm. The last line is JSON, and the exit
code is 1 if an error is larger than what is allowed.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import arguments

if __name__ == "__main__":  # the arguments are read before torch is imported, which takes seconds
    arguments.of_gpu(None, __doc__)

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import tiny
from config import RolloutConfig
from model import attention
from model.attention import SharedPrompt, make_span
from policy import Packed, Policy, pack
from preflight import kernelcheck
from preflight.selfcheck import TOLERANCE as LOGP_TOLERANCE
from prompts import Prompt
from records.record import Sample
from rollout import generate
from runtime.environment import environment
from video.frames import Video

REPO = Path(__file__).resolve().parents[1]
SHAPE_3B = REPO / "configs" / "models" / "Qwen" / "Qwen2.5-VL-3B-Instruct"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRADIENT_TOLERANCE = 1e-4  # float32
ROUNDING = 1.5  # in bfloat16 the error of packed rows against float32 may be this many times that of repeated prompts


@dataclass(frozen=True)
class Sizes:
    heads: tuple[int, int, int]  # heads, kv heads, head size
    prompt: int  # tokens
    longest: int  # tokens of the longest completion
    group: int  # completions of a prompt
    grids: tuple[tuple[int, int, int], ...]  # patches along time, height, width
    new_tokens: int  # sampled for each completion


LARGE = Sizes((16, 2, 128), 2000, 300, 8, ((16, 16, 16), (9, 16, 16)), 64)
SMALL = Sizes((4, 2, 32), 50, 40, 4, ((4, 4, 8), (2, 4, 8)), 6)


@dataclass(frozen=True)
class Check:
    part: str
    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


class Layer(nn.Module):
    """What transformers asks of the module that it calls attention for."""

    is_causal = True

    def __init__(self, num_key_value_groups: int):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Attention without a bias is computed by this kernel within the block, whatever would be chosen."""
    chosen = attention.kernel_of
    attention.kernel_of = lambda query, bias=None: kernel if bias is None else chosen(query, bias)
    try:
        yield
    finally:
        attention.kernel_of = chosen


def kernels_of(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The one that training would take for a type, and the plain form."""
    chosen = attention.kernel_of(torch.empty(1, 1, 1, 128, dtype=dtype, device=device))
    return list(dict.fromkeys((chosen, "plain")))


def check_attention(sizes: Sizes, device: torch.device) -> Iterator[Check]:
    layer, longest = Layer(sizes.heads[0] // sizes.heads[1]), sizes.longest
    prompts = {"equal prompts": [sizes.prompt] * 2, "unequal prompts": [sizes.prompt, sizes.prompt // 2 + 3]}
    lengths = {"equal completions": [longest // 2] * sizes.group}
    lengths |= {"ragged": torch.linspace(1, longest, sizes.group).long().tolist()}
    for type_name, dtype in TYPES.items():
        for kernel in kernels_of(device, dtype):
            for prompts_name, nums in prompts.items():
                for lengths_name, ragged in lengths.items():
                    spans = make_spans(nums, ragged, device)
                    with forced(kernel):
                        errors = kernelcheck.attention_errors(layer, spans, sizes.heads, dtype, torch.float64)
                    values, *gradients = errors.values()
                    for what, error in {"values": values, "gradients": max(gradients)}.items():
                        name = f"{type_name}, {kernel}, {prompts_name}, {lengths_name}: {what}"
                        yield Check("attention", name, error, kernelcheck.TOLERANCE[dtype])
            for prompts_name, nums in prompts.items():
                with forced(kernel):
                    error = sampling_error(sizes, nums, dtype, device)
                name = f"{type_name}, {kernel}, {prompts_name}: values while sampling"
                yield Check("attention", name, error, kernelcheck.TOLERANCE[dtype])


def make_spans(num_prompts: list[int], lengths: list[int], device: torch.device) -> list[attention.Span]:
    spans = []
    for num in num_prompts:
        spans.append(make_span(spans[-1].end if spans else 0, num, lengths, device))
    return spans


def sampling_error(sizes: Sizes, num_prompts: list[int], dtype: torch.dtype, device: torch.device) -> float:
    """Of attention.group_attention, with prompts that are padded on the left where they are unequal."""
    (heads, kv_heads, size), longest = sizes.heads, max(num_prompts)
    num, num_rows, own = len(num_prompts), len(num_prompts) * sizes.group, sizes.longest
    generator, scale = torch.Generator(device).manual_seed(0), size**-0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, key, value = draw(num_rows, heads, 1, size), *(draw(num_rows, kv_heads, own, size) for _ in range(2))
    prompt_key, prompt_value = (draw(num, kv_heads, longest, size) for _ in range(2))
    is_padding = torch.arange(longest, device=device) < longest - torch.tensor(num_prompts, device=device)[:, None]
    bias = None
    if is_padding.any():
        bias = torch.zeros(num, 1, 1, longest, dtype=dtype, device=device)
        bias.masked_fill_(is_padding[:, None, None], -torch.inf)
    ours = attention.group_attention(query, key, value, SharedPrompt(prompt_key, prompt_value, bias), scale)
    keys, values = (
        torch.cat([prompt.repeat_interleave(sizes.group, 0), each], 2).repeat_interleave(heads // kv_heads, 1).double()
        for prompt, each in ((prompt_key, key), (prompt_value, value))
    )
    scores = query.double() @ keys.mT * scale
    scores[..., :longest].masked_fill_(is_padding.repeat_interleave(sizes.group, 0)[:, None, None], -torch.inf)
    plain = (scores.softmax(-1) @ values).transpose(1, 2)
    return ((ours.double() - plain).norm() / plain.norm()).item()


def make_policy(type_name: str, shrink: bool, device: torch.device, folder: Path) -> Policy:
    """A model with two layers and random weights, the same numbers in every type; the tiny world's tokenizer."""
    if not (folder / "config.json").exists():
        tiny.write_model(folder, seed=0, family="qwen2_5_vl")
    own = AutoConfig.from_pretrained(folder).to_dict()
    shape = own if shrink else AutoConfig.from_pretrained(SHAPE_3B).to_dict()
    shape |= {name: value for name, value in own.items() if name.endswith("_token_id")}
    shape["text_config"] |= {"num_hidden_layers": 2, "layer_types": None}
    shape["vision_config"] |= {"depth": 2}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**shape), dtype=torch.float32, attn_implementation="shared_prefix"
        )
    model.set_attn_implementation({"vision_config": "flash_windows"})
    model.model.visual.requires_grad_(False)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(3.0)  # distributions that are far from uniform
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return Policy(model.to(TYPES[type_name]), AutoTokenizer.from_pretrained(folder)).to(device).eval()


def make_prompts(policy: Policy, sizes: Sizes, grids: tuple[tuple[int, int, int], ...]) -> list[Prompt]:
    """Prompts of random text around videos of noise."""
    generator, prompts = torch.Generator().manual_seed(0), []
    for i, (t, h, w) in enumerate(grids):
        text = torch.randint(0, 256, (20,), generator=generator).tolist()
        patches = torch.randn(t * h * w, 1176, generator=generator).to(policy.device)
        video = Video(patches, (t, h, w), 1.0, [], t * h * w // 4, 0)
        ids = text[:6] + [policy.model.config.video_token_id] * video.num_tokens + text[6:]
        prompts.append(Prompt(Sample(f"gpu/{i}", "tvg", "", ""), ids, 6, video))
    return prompts


def repeated_logps(policy: Policy, packed: Packed, video_embeds: Tensor, entropy_grad: bool = False):
    """What `policy(packed, ...)` returns, with every completion behind a prompt of its own, by torch's attention."""
    hidden, embeds_1SH = [], policy.embed(packed.ids_S[None], video_embeds)
    for span in packed.spans:
        start = span.prompt_end
        for num in span.lengths:
            places = [*range(span.start, span.prompt_end), *range(start, start + num)]
            hidden_1SH = policy.model.model.language_model(
                inputs_embeds=embeds_1SH[:, places], position_ids=packed.positions_3S[:, None, places], use_cache=False
            ).last_hidden_state
            hidden.append(hidden_1SH[0, -num - 1 : -1])
            start += num
    return policy._head(torch.cat(hidden), packed.targets_N, packed.num_chunks, entropy_grad)


def logps_and_gradients(score, policy: Policy, packed: Packed, embeds: Tensor, weights_N: Tensor):
    """Log-probs (N,) and all gradients of their weighted sum, as one float32 vector."""
    policy.zero_grad()
    logps_N, _ = score(policy, packed, embeds)
    (logps_N * weights_N).sum().backward()
    grads = [p.grad.float().flatten() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    return logps_N.detach(), torch.cat(grads)


def check_packed(sizes: Sizes, device: torch.device, shrink: bool, folder: Path) -> Iterator[Check]:
    found = {}
    lengths = torch.linspace(1, sizes.longest, sizes.group).long().tolist()
    generator = torch.Generator().manual_seed(1)
    completions = [[torch.randint(0, 256, (num,), generator=generator).tolist() for num in lengths]] * 2
    weights_N = torch.randn(2 * sum(lengths), generator=generator).to(device)
    for type_name in TYPES:
        policy = make_policy(type_name, shrink, device, folder)
        prompts = make_prompts(policy, sizes, sizes.grids)
        packed = pack(prompts, completions, policy.model.config, device)
        embeds = torch.cat(policy.embed_each(prompts))
        for way, score in (("packed", Policy.__call__), ("repeated", repeated_logps)):
            found[way, type_name] = logps_and_gradients(score, policy, packed, embeds, weights_N)
    exact_N, exact_gradients = found["repeated", "float32"]

    def errors(way: str, type_name: str) -> tuple[float, float]:
        logps_N, gradients = found[way, type_name]
        difference = (gradients - exact_gradients).norm() / exact_gradients.norm()
        return (logps_N - exact_N).abs().mean().item(), difference.item()

    logps, gradients = errors("packed", "float32")
    yield Check("packed", "float32: log-probs against the repeated prompt", logps, LOGP_TOLERANCE[torch.float32])
    yield Check("packed", "float32: gradients against the repeated prompt", gradients, GRADIENT_TOLERANCE)
    names = ("log-probs", "gradients")
    for what, ours, theirs in zip(names, errors("packed", "bfloat16"), errors("repeated", "bfloat16"), strict=True):
        yield Check("packed", f"bfloat16: {what} against the repeated prompt in float32", ours, ROUNDING * theirs)


def check_sampling(sizes: Sizes, device: torch.device, shrink: bool, folder: Path) -> Iterator[Check]:
    for type_name, dtype in TYPES.items():
        policy = make_policy(type_name, shrink, device, folder)
        for name, grids in (("equal prompts", sizes.grids[:1] * 2), ("unequal prompts", sizes.grids)):
            prompts = make_prompts(policy, sizes, grids)
            embeds = policy.embed_each(prompts)
            rollout = generate(policy, prompts, embeds, RolloutConfig(sizes.group, 1.0, sizes.new_tokens, 2))
            packed = pack(prompts, rollout.completions, policy.model.config, device)
            with torch.no_grad():
                scored_N = policy(packed, torch.cat(embeds))[0]
            gap = (rollout.logps_BT[rollout.mask_BT] - scored_N).abs().mean().item()
            name = f"{type_name}, {name}: sampled against scored log-probs"
            yield Check("sampling", name, gap, LOGP_TOLERANCE[dtype])


def main(argv: list[str] | None = None) -> int:
    args = arguments.of_gpu(argv, __doc__)
    if not (args.shrink or torch.cuda.is_available()):
        raise SystemExit("error: torch finds no NVIDIA GPU here; --shrink runs small shapes on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, out, here, checks = SMALL if args.shrink else LARGE, Path(args.out), environment(), []
    with arguments.user_errors():
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        more = (args.shrink, Path(folder))
        for run_part, rest in ((check_attention, ()), (check_packed, more), (check_sampling, more)):
            for check in run_part(sizes, device, *rest):
                checks.append(check)
                mark = "ok" if check.passed else "FAILED"
                row = f"{check.part:<10} {check.name:<75} {check.error:8.2g} of {check.allowed:8.2g}  {mark}"
                print(row, flush=True)
                rows = [asdict(check) | {"passed": check.passed} for check in checks]
                content = {"environment": here, "shrink": args.shrink, "checks": rows}
                (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    failed = [check for check in checks if not check.passed]
    print(json.dumps({"checks": len(checks), "failed": len(failed), "device": here["devices"][0]}))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
