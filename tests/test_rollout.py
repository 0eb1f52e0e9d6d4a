"""Sampling over one prefill: the same distribution, tokens and log-probs as the plain way."""

import pytest
import torch
from conftest import make_policy, make_prompts
from test_policy import repeated_logps

from config import RolloutConfig
from model.attention import GroupLayer
from policy import pack, packed_logps, prompt_positions
from rollout import generate, row_seed


def sample(policy, prompts, group_size=3, max_new_tokens=6, micro_batch_size=8, seed=0, step=0):
    sizes = RolloutConfig(group_size, 1.0, max_new_tokens, micro_batch_size)
    return generate(policy, prompts, policy.embed_each(prompts), sizes, seed, step)


def scored(policy, rollout):
    packed = pack(rollout.prompts, rollout.completions, policy.model.config, policy.device)
    return packed_logps(policy, packed, None, rollout.mask_BT.shape[1])[0]


@torch.no_grad()
def test_sampled_equals_scored(world, family):
    """The checkpoint's generation_config asks for a repetition penalty and a near-zero temperature: no effect."""
    policy = make_policy(world, family)
    policy.temperature = 0.7
    rollout = sample(policy, make_prompts(world, policy))
    assert len(set(map(tuple, rollout.tokens_BT.tolist()))) > 3
    torch.testing.assert_close(scored(policy, rollout), rollout.logps_BT, atol=1e-5, rtol=0)
    ours = torch.cat([row[mask] for row, mask in zip(rollout.logps_BT, rollout.mask_BT)])
    torch.testing.assert_close(repeated_logps(policy, rollout.prompts, rollout.completions), ours, atol=1e-5, rtol=0)


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_repeated_prompt(world, family):
    policy = make_policy(world, family)
    prompts = make_prompts(world, policy)
    rollout = sample(policy, prompts, group_size=2, seed=None)
    for prompt, group in zip(prompts, rollout.completions):
        tokens = []
        while len(tokens) < 6 and not set(tokens) & set(policy.eos_ids):
            positions, after = prompt_positions(prompt, policy.model.config)
            positions = torch.cat([positions, (after + torch.arange(len(tokens))).expand(3, -1)], 1)
            embeds = policy.embed(torch.tensor([prompt.ids + tokens]), policy.embed_videos([prompt]))
            hidden = policy.model.model.language_model(inputs_embeds=embeds, position_ids=positions[:, None])
            tokens.append(int(policy.log_softmax(policy.model.lm_head(hidden.last_hidden_state[0, -1])).argmax()))
        assert group == [tokens, tokens]


def test_a_sample_depends_on_seed_step_id_and_g_alone(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    rows = sample(policy, prompts).completions
    assert sample(policy, prompts, micro_batch_size=1).completions == rows
    assert sample(policy, prompts, micro_batch_size=2).completions == rows
    assert sample(policy, prompts[::-1]).completions == rows[::-1]
    assert [group[:2] for group in rows] == sample(policy, prompts, group_size=2).completions
    assert sample(policy, prompts, step=1).completions != rows
    assert sample(policy, prompts, seed=1).completions != rows
    assert len({row_seed(s, t, i, g) for s in range(3) for t in range(3) for i in "ab" for g in range(3)}) == 54


@torch.no_grad()
def test_sampled_frequencies_match_scored_probabilities(world):
    """4,000 first tokens of one prompt, over a vocabulary of several hundred: chi-square against the scored ones."""
    policy = make_policy(world, sharpen=1.5)
    prompt = make_prompts(world, policy, num=1)[0]
    num, vocab = 4000, policy.model.config.text_config.vocab_size
    tokens = sample(policy, [prompt], group_size=num, max_new_tokens=1).tokens_BT[:, 0]
    counts = torch.bincount(tokens, minlength=vocab).double()
    allowed = torch.tensor([i for i in range(vocab) if i not in set(policy.banned.tolist())])
    every = pack([prompt], [[[int(i)] for i in allowed]], policy.model.config, "cpu")
    expected = policy(every)[0].double().exp() * num
    assert abs(expected.sum() - num) < 1e-2 and counts[policy.banned].sum() == 0
    assert (expected > 5).sum() > 50  # many likely tokens, so a top-k of 50 would show
    common = expected > 5
    observed = torch.cat([counts[allowed][common], counts[allowed][~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_gradient_checkpointing_and_training_mode_change_no_token(world):
    plain = make_policy(world)
    prompts = make_prompts(world, plain)
    checkpointed = make_policy(world, gradient_checkpointing=True).train()
    assert sample(checkpointed, prompts).completions == sample(plain, prompts).completions
    assert checkpointed.training


def test_vision_ids_are_never_sampled_however_likely(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    with torch.no_grad():
        policy.model.lm_head.weight[policy.banned] += policy.model.lm_head.weight.abs().max() * 5
    rollout = sample(policy, prompts, group_size=8)
    assert not set(rollout.tokens_BT.flatten().tolist()) & set(policy.banned.tolist())


def test_mask_ends_with_the_first_eos_and_truncation_is_marked(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    bias = torch.zeros(policy.model.config.text_config.vocab_size)
    bias[policy.eos_ids[1]] = 6.0  # pad, one of the two EOS ids, becomes likely
    policy.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    rollout = sample(policy, prompts, group_size=8)
    eos = policy.tokenizer.convert_ids_to_tokens(policy.eos_ids)
    is_eos = torch.isin(rollout.tokens_BT, torch.tensor(policy.eos_ids))
    assert rollout.truncated_B.any() and not rollout.truncated_B.all()
    for row, mask, truncated, text in zip(is_eos, rollout.mask_BT, rollout.truncated_B, rollout.texts):
        assert truncated == (not row.any())
        assert mask.sum() == (len(row) if truncated else row.int().argmax() + 1)
        assert not any(token in text for token in eos)
    assert any("<|" in text for text in rollout.texts)  # another special token is no secret: it spoils the format
    assert (rollout.logps_BT[~rollout.mask_BT] == 0).all()


def test_sampling_mutates_no_input(world):
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    embeds = policy.embed_each(prompts)
    copies, ids = [tensor.clone() for tensor in embeds], [list(prompt.ids) for prompt in prompts]
    generate(policy, prompts, embeds, RolloutConfig(group_size=2, max_new_tokens=4))
    assert all(torch.equal(a, b) for a, b in zip(embeds, copies)) and ids == [prompt.ids for prompt in prompts]


def test_a_prompt_is_cached_once_for_all_its_completions(world, monkeypatch):
    """And left alone: the layers that decoding grows hold the completions' own keys only."""
    seen, init = [], GroupLayer.__init__

    def noted(layer, *args):
        seen.append(layer)
        init(layer, *args)

    monkeypatch.setattr(GroupLayer, "__init__", noted)
    policy = make_policy(world)
    prompts = make_prompts(world, policy)
    rollout = sample(policy, prompts, group_size=4)
    longest, steps = max(len(prompt.ids) for prompt in prompts), rollout.tokens_BT.shape[1]
    assert len(seen) == policy.model.config.text_config.num_hidden_layers
    for layer in seen:
        assert layer.prompt.keys.shape[0] == len(prompts) and layer.prompt.keys.shape[2] == longest - 1
        assert layer.keys.shape[0] == 4 * len(prompts) and layer.keys.shape[2] == steps
        assert layer.get_seq_length() == longest - 1 + steps


@pytest.mark.parametrize("num", [1, 3])
def test_completions_that_do_not_see_their_prompt_are_an_error(world, monkeypatch, num):
    """The prompt's cache goes along with the keys: copied on the way, a single prompt was left out without a word."""

    def copying(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys.clone(), values

    update = GroupLayer.update
    monkeypatch.setattr(GroupLayer, "update", copying)
    policy = make_policy(world)
    prompts = make_prompts(world, policy, num)[:num]
    with pytest.raises(RuntimeError):
        generate(policy, prompts, policy.embed_each(prompts), RolloutConfig(2, 1.0, 3, num))
