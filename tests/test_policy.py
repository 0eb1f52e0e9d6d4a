"""The shared-prefix forward against the plain one, rotary positions against the released models' own, load and save."""

import json
from collections import Counter

import pytest
import torch
from conftest import REPO, make_cfg, make_policy, make_prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import config
from data import make_reader
from model.folder import save_model
from model.positions import rope_positions
from policy import load_policy, pack, packed_logps, prompt_positions
from preflight.dryrun import META, Call, Device, DryRun, meta_policy, score, update
from records.files import read_samples
from video import frames
from video.budget import seen_step
from video.frames import patchify

MROPE = json.loads((REPO / "tests" / "golden" / "mrope.json").read_text())


class Copies(TorchDispatchMode):
    """Bytes of the tensors that go from the host to the meta device, by dtype."""

    def __init__(self):
        super().__init__()
        self.num_bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), out))
        if given and not any(x.is_meta for x in given) and any(x.is_meta for x in made):
            self.num_bytes.update({x.dtype: x.nbytes for x in given})
        return out


def completions_for(prompts, num_groups=3, seed=0):
    """Ragged random completions of 1 to 7 tokens below id 256."""
    generator = torch.Generator().manual_seed(seed)

    def one():
        length = int(torch.randint(1, 8, (), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    return [[one() for _ in range(num_groups)] for _ in prompts]


def repeated_logps(policy, prompts, completions):
    """The plain way: one row per completion, its prompt repeated, the vision tower run each time; (N,) log-probs."""
    text_model, parts = policy.model.model.language_model, []
    for prompt, group in zip(prompts, completions):
        for tokens in group:
            positions, after = prompt_positions(prompt, policy.model.config)
            positions = torch.cat([positions, (after + torch.arange(len(tokens))).expand(3, -1)], 1)
            ids = torch.tensor([prompt.ids + tokens])
            embeds = policy.embed(ids, policy.embed_videos([prompt]))
            hidden = text_model(
                inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False
            ).last_hidden_state
            logps = policy.log_softmax(policy.model.lm_head(hidden[0, len(prompt.ids) - 1 : -1]))
            parts.append(logps.gather(1, torch.tensor(tokens)[:, None]).squeeze(1))
    return torch.cat(parts)


def tree_mask(span):
    """(N, P + N) bool: a completion token sees the prompt and its own completion's past."""
    owner = torch.repeat_interleave(torch.tensor(span.lengths))
    own_past = (owner[:, None] == owner[None, :]).tril()
    return torch.cat([torch.ones(len(owner), span.prompt_end - span.start, dtype=torch.bool), own_past], dim=1)


def dense_logits(policy, packed):
    """(N, V) logits of the packed row through transformers' own attention, with a dense (S, S) mask."""
    size = len(packed.ids_S)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for span in packed.spans:
        prompt = slice(span.start, span.prompt_end)
        mask[prompt, prompt] = torch.ones(span.prompt_end - span.start, span.prompt_end - span.start).tril().bool()
        mask[span.prompt_end : span.end, span.start : span.end] = tree_mask(span)
    hidden = policy.model.model.language_model(
        inputs_embeds=policy.embed(packed.ids_S[None], policy.embed_videos(packed.prompts)),
        position_ids=packed.positions_3S[:, None],
        attention_mask=mask[None, None],
        use_cache=False,
    ).last_hidden_state
    return policy.model.lm_head(hidden[0, packed.predictor_N])


def dense_logps(policy, packed):
    logps = policy.log_softmax(dense_logits(policy, packed))
    return logps.gather(1, packed.targets_N[:, None]).squeeze(1)


def gradients(policy, logps, weights):
    policy.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, relative=1e-4):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().clamp_min(1e-6)
        assert (ours[name] - theirs[name]).abs().max() <= relative * scale, name


@pytest.mark.parametrize("case", MROPE, ids=lambda case: f"{case['family']}-{len(case['segments'])}")
def test_rope_positions_are_those_of_the_released_models(case):
    """That code rounds the time step down to whole seconds (`video.time_step=whole_seconds`)."""
    segments = []
    for segment in case["segments"]:
        step = seen_step(segment.get("second_per_grid_ts", 1.0), "whole_seconds")
        segments.append(segment["text"] if "text" in segment else (*segment["video"], step))
    positions, after = rope_positions(segments, case["spatial_merge_size"], case["tokens_per_second"])
    assert positions.tolist() == case["position_ids"]
    assert after == case["next_position"]


def test_the_exact_time_step_keeps_fractions_of_a_second():
    """Half a second a step at 2 positions a second: 0, 1, 2, 3; 1.3 s: floor of 0, 2.6, 5.2, 7.8."""
    assert seen_step(0.5, "exact") == 0.5
    assert rope_positions([(4, 2, 2, 0.5)], 2, 2)[0][0].tolist() == [0, 1, 2, 3]
    assert rope_positions([(4, 2, 2, 1.3)], 2, 2)[0][0].tolist() == [0, 2, 5, 7]
    assert rope_positions([(4, 2, 2, 1.3)], 2, None)[0][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_packed_equals_dense_mask_equals_repeated_prompt(world, family, freeze_vision):
    policy = make_policy(world, family, freeze_vision=freeze_vision)
    prompts = make_prompts(world, policy)
    assert len({len(prompt.ids) for prompt in prompts}) == len(prompts)
    completions = completions_for(prompts)
    packed = pack(prompts, completions, policy.model.config, "cpu")
    logps = {
        "packed": policy(packed)[0],
        "dense": dense_logps(policy, packed),
        "repeated": repeated_logps(policy, prompts, completions),
    }
    weights = torch.randn(len(packed.targets_N), generator=torch.Generator().manual_seed(1))
    grads = {name: gradients(policy, value, weights) for name, value in logps.items()}
    assert any("visual" in name for name in grads["packed"]) == (not freeze_vision)
    for other in ("dense", "repeated"):
        torch.testing.assert_close(logps["packed"], logps[other], atol=1e-5, rtol=0)
        assert_same_gradients(grads["packed"], grads[other])


def test_one_video_alone_scores_as_in_a_batch(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    completions = completions_for(prompts)
    together = policy(pack(prompts, completions, policy.model.config, "cpu"))[0]
    alone = [policy(pack([p], [c], policy.model.config, "cpu"))[0] for p, c in zip(prompts, completions)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_embeddings_given_or_computed_are_the_same(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    packed = pack(prompts, completions_for(prompts), policy.model.config, "cpu")
    given = policy(packed, torch.cat(policy.embed_each(prompts)))[0]
    torch.testing.assert_close(policy(packed)[0], given, atol=1e-6, rtol=0)


@pytest.mark.parametrize("most_tokens", [0, 500])
def test_gradient_checkpointing_and_head_chunks_change_nothing(world, monkeypatch, most_tokens):
    """Nor do empty chunks: another process may have more tokens."""
    plain, checkpointed = make_policy(world), make_policy(world, gradient_checkpointing=True).train()
    prompts = make_prompts(world, plain)
    packed = pack(prompts, completions_for(prompts), plain.model.config, "cpu")
    weights = torch.ones(len(packed.targets_N))
    logps = plain(packed)[0]
    expected = gradients(plain, logps, weights)
    monkeypatch.setattr("policy.HEAD_CHUNK", 5)
    packed = pack(prompts, completions_for(prompts), plain.model.config, "cpu", most_tokens)
    assert packed.num_chunks == 100 if most_tokens else 1 < packed.num_chunks < len(packed.targets_N)
    again = checkpointed(packed)[0]
    torch.testing.assert_close(again, logps, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(checkpointed, again, weights), expected)


def test_a_step_sends_frames_to_the_device_once_and_as_bytes(world, tmp_path, monkeypatch):
    """Patches, four times as large, were made on the host and sent three times: to sample, to score and to train."""
    made = []
    monkeypatch.setattr(frames, "patchify", lambda x, geometry: made.append(x.device) or patchify(x, geometry))
    cfg = make_cfg(world, tmp_path, "model.freeze_vision=false")
    model, tokenizer = (kind.from_pretrained(world / "model") for kind in (AutoConfig, AutoTokenizer))
    policy, reference = (meta_policy(cfg.model, model, tokenizer) for _ in range(2))
    reader = make_reader(cfg, tokenizer, META)
    decoded = [(sample, reader.workers.function(sample)) for sample in read_samples(cfg.data.train)[:3]]
    with Copies() as copies, DryRun(Device(1e12, 1e12, 1e-5)) as run:
        prompts = [reader.prompt(*pair) for pair in decoded]
        policy.embed_each(prompts)
        score(run, reference, Call(prompts, (), 2, 3, 1))
        update(run, policy, Call(prompts, (), 2, 3, 1), entropy_grad=False, keep_gradients=False)
    assert made == [META] * 3
    size = sum(frames.frames.nbytes for _, frames in decoded)
    assert copies.num_bytes[torch.uint8] == size
    assert copies.num_bytes[torch.float32] < size / 20  # positions in a frame; once would be 4 * size, of patches


def test_the_frozen_tower_gets_no_backward_under_gradient_checkpointing(world, family):
    """transformers makes embeddings require gradients for reentrant checkpoints, the patches' too."""
    policy = make_policy(world, family, gradient_checkpointing=True).train()
    assert not policy.embed_videos(make_prompts(world, policy, num=1)).requires_grad


@pytest.mark.parametrize("chunk", [512, 5])
def test_entropy_and_its_gradient_equal_a_softmax_without_banned_ids(world, family, chunk, monkeypatch):
    """Expected: autograd through a plain softmax over the allowed ids only, where no -inf occurs."""
    monkeypatch.setattr("policy.HEAD_CHUNK", chunk)
    policy = make_policy(world, family, gradient_checkpointing=True, freeze_vision=False).train()
    policy.temperature = 0.7
    prompts = make_prompts(world, policy)
    packed = pack(prompts, completions_for(prompts), policy.model.config, "cpu")
    weights = torch.randn(len(packed.targets_N), generator=torch.Generator().manual_seed(1))
    allowed = sorted(set(range(policy.model.config.text_config.vocab_size)) - set(policy.banned.tolist()))
    p_NA = (dense_logits(policy, packed)[:, allowed] / policy.temperature).softmax(-1)
    expected = -(p_NA * p_NA.log()).sum(-1)
    logps, entropy = policy(packed, entropy_grad=True)
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=0)
    ours = gradients(policy, entropy, weights)
    assert all(torch.isfinite(grad).all() for grad in ours.values())
    assert_same_gradients(ours, gradients(policy, expected, weights))

    plain_logps, plain_entropy = policy(packed)
    assert torch.equal(plain_logps, logps) and torch.equal(plain_entropy, entropy) and not plain_entropy.requires_grad
    padded_BT = packed_logps(policy, packed, None, 7, entropy_grad=True)[1]
    assert_same_gradients(gradients(policy, padded_BT[padded_BT != 0], weights), ours)


def test_window_attention_equals_transformers_own(world, family):
    """Frames of 72 x 104 pixels would be cut into windows of several sizes; here 8 x 10 patches are."""
    policy = make_policy(world, family)
    tower = policy.model.model.visual
    grids = torch.tensor([[3, 8, 10], [2, 4, 4]])
    patches = torch.randn(int(grids.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    ours = tower(patches, grids).pooler_output
    policy.model.set_attn_implementation({"vision_config": "sdpa"})
    torch.testing.assert_close(ours, tower(patches, grids).pooler_output, atol=1e-5, rtol=1e-5)


def test_shuffled_completions_and_other_groups_change_nothing(world):
    """A completion sees neither its siblings nor other videos: swapping them leaves its log-probs alone."""
    policy = make_policy(world)
    prompts = make_prompts(world, policy, num=2)
    (a, b, c), other = completions_for(prompts)
    first = policy(pack(prompts, [[a, b, c], other], policy.model.config, "cpu"))[0][: len(a)]
    last = policy(pack(prompts, [[c, b, a], other[::-1]], policy.model.config, "cpu"))[0]
    torch.testing.assert_close(first, last[len(c) + len(b) :][: len(a)], atol=1e-5, rtol=0)


def test_the_video_and_its_time_step_matter(world):
    policy = make_policy(world)
    prompt = make_prompts(world, policy, num=1)[0]
    completions = [[[10, 11, 12]]]
    blank = torch.zeros_like(torch.cat(policy.embed_each([prompt])))
    packed = pack([prompt], completions, policy.model.config, "cpu")
    assert (policy(packed)[0] - policy(packed, blank)[0]).abs().max() > 1e-3
    slower = type(prompt.video)(**{**vars(prompt.video), "second_per_grid": 2 * prompt.video.second_per_grid})
    moved = pack(
        [type(prompt)(prompt.sample, prompt.ids, prompt.video_start, slower)],
        completions,
        policy.model.config,
        "cpu",
    )
    assert (policy(packed)[0] - policy(moved)[0]).abs().max() > 1e-4


def test_eos_is_scored_with_gradient_and_banned_ids_have_no_probability(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy, num=1)
    eos, pad = policy.eos_ids[0], policy.model.config.image_token_id
    logps, entropy = packed_logps(policy, pack(prompts, [[[5, eos], [pad]]], policy.model.config, "cpu"), None, 2)
    assert logps[1, 0] == -torch.inf and torch.isfinite(entropy).all() and logps[1, 1] == 0
    policy.zero_grad()
    logps[0, 1].backward()
    assert policy.model.lm_head.weight.grad[eos].abs().max() > 0
    banned = set(policy.banned.tolist())
    assert {pad, policy.model.config.video_token_id} <= banned
    assert set(range(len(policy.tokenizer), policy.model.config.text_config.vocab_size)) <= banned
    assert not banned & set(policy.eos_ids)


def test_forward_mutates_no_input(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    packed = pack(prompts, completions_for(prompts), policy.model.config, "cpu")
    embeds = torch.cat(policy.embed_each(prompts))
    tensors = [
        packed.ids_S,
        packed.positions_3S,
        packed.predictor_N,
        embeds,
        *(p.video.patches for p in prompts),
    ]
    copies = [tensor.clone() for tensor in tensors]
    policy(packed, embeds)[0].sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies))


def test_saved_folder_loads_and_carries_every_file(world, tmp_path):
    policy = make_policy(world)
    save_model(policy.model, policy.adapter, tmp_path / "final", str(world / "model"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    expected = policy.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    for file in (world / "model").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "final" / file.name).read_bytes() == file.read_bytes(), file.name


def test_loading_names_what_is_wrong(world, tmp_path):
    with pytest.raises(ValueError, match=r"model.path .*nowhere: no such folder; give one that has a config.json"):
        load_policy(config.ModelConfig(path=str(tmp_path / "nowhere")))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty"):
        load_policy(config.ModelConfig(path=str(empty)))
    (empty / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="family bert"):
        load_policy(config.ModelConfig(path=str(empty)))
