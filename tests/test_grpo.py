"""The loss of GRPO against TRL's own on the same tensors, and what no page can show in a few numbers: any shape, any mask, any missing verdict."""
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arm.core import make_generator
from arm.rl.grpo import GRPOConfig, denominator, group_advantages, grpo_loss

G, B, T, LONGEST = 4, 8, 6, 9
NO_TRL = "TRL is not installed; `make test-peers` installs it, and compares the loss with its GRPOTrainer"


def batch(seed: int) -> dict:
    "Log-probabilities of a policy that has moved, masks of ragged samples, advantages of whole groups."
    g = make_generator(seed, "grpo")
    old = -3 * torch.rand(B, T, generator=g)
    new, ref = (old + .3 * torch.randn(B, T, generator=g) for _ in range(2))
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    return dict(old=old, new=new, ref=ref, mask=mask, rewards=torch.rand(B, generator=g))


def ours(b: dict, cfg: GRPOConfig, advantages: torch.Tensor):
    "Loss, gradient and log of our function."
    new = b["new"].clone().requires_grad_()
    loss, info = grpo_loss(new, b["old"], b["mask"], advantages, cfg, ref_per_token_logps=b["ref"])
    return loss.detach(), torch.autograd.grad(loss, new)[0], info


def theirs(trl, b: dict, cfg: GRPOConfig, advantages: torch.Tensor):
    "The same from `GRPOTrainer._compute_loss`, called on a stand-in that holds the trainer's settings and our log-probabilities."
    new = b["new"].clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros(B, T), None), model=SimpleNamespace(training=False), aux_loss_enabled=False,
        top_entropy_quantile=1., off_policy_mask_threshold=None, importance_sampling_level=cfg.importance_sampling_level, beta=cfg.beta, loss_type=cfg.loss_type,
        epsilon_low=cfg.epsilon, epsilon_high=cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high, max_completion_length=cfg.max_tokens, use_vllm=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1), _metrics=defaultdict(lambda: defaultdict(list)))
    ids, ones = torch.zeros(B, T, dtype=torch.long), torch.ones(B, 1, dtype=torch.long)
    loss = trl.GRPOTrainer._compute_loss(trainer, None, dict(prompt_ids=ones, prompt_mask=ones, completion_ids=ids, completion_mask=b["mask"].long(), advantages=advantages,
        old_per_token_logps=b["old"], ref_per_token_logps=b["ref"], num_items_in_batch=b["mask"].sum()))
    return loss.detach(), torch.autograd.grad(loss, new)[0], {k: v[-1] for k, v in trainer._metrics["eval"].items()}


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason=NO_TRL)
    return pytest.importorskip("trl.trainer.grpo_trainer", reason=NO_TRL)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta, high", [(0., None), (.04, .28)])
def test_loss_gradient_and_log_agree_with_trl(trl, loss_type, level, beta, high):
    cfg = GRPOConfig(num_generations=G, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon=.1, epsilon_high=high, max_tokens=LONGEST)
    b = batch(3)
    advantages = group_advantages(b["rewards"], G)
    (loss, slope, info), (loss_trl, slope_trl, log) = ours(b, cfg, advantages), theirs(trl, b, cfg, advantages)
    torch.testing.assert_close(loss, loss_trl, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(slope, slope_trl, atol=1e-7, rtol=1e-5)
    assert info["clip_fraction"] > 0, "these tensors do not reach the clip"
    if beta: assert info["kl"].item() == pytest.approx(log["kl"], rel=1e-5)
    if level == "token":
        for name, its in (("clip_low", "low_mean"), ("clip_high", "high_mean"), ("clip_fraction", "region_mean")):
            assert info[name].item() == pytest.approx(log[f"clip_ratio/{its}"], abs=1e-6)


def test_advantages_agree_with_trl(trl):
    rewards = torch.tensor([.1, .9, float("nan"), .4, 1., 0., 0., 1.])
    groups = rewards.reshape(-1, G)
    mean, std = groups.nanmean(1, keepdim=True), trl.nanstd(groups, dim=1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, G), ((groups - mean) / (std + 1e-4)).flatten(), equal_nan=True)
    torch.testing.assert_close(group_advantages(rewards, G, scale_rewards=False), (groups - mean).flatten(), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0., .5, 1., float("nan")]), min_size=B, max_size=B), st.sampled_from(["grpo", "dr_grpo", "dapo"]), st.booleans(), st.integers(0, 5))
def test_silent_samples_never_reach_the_loss(rewards, loss_type, scale, seed):
    cfg, b = GRPOConfig(num_generations=G, loss_type=loss_type, scale_rewards=scale, max_tokens=LONGEST), batch(seed)
    advantages = group_advantages(torch.tensor(rewards), G, scale_rewards=scale)
    alive = ~advantages.isnan()
    for group in advantages.reshape(-1, G):
        assert group[~group.isnan()].sum().abs() < 1e-4 and (~group.isnan()).sum() != 1
    loss, slope, info = ours(b, cfg, advantages)
    assert loss.isfinite() and slope.isfinite().all() and (slope[~alive] == 0).all() and (slope[~b["mask"]] == 0).all()
    assert info["live_samples"].item() == pytest.approx(alive.float().mean().item())
    spoilt = {k: torch.where(alive[:, None] & b["mask"], b[k], float("nan")) for k in ("new", "old", "ref")}
    again, slope_again, _ = ours(b | spoilt, cfg, advantages)
    assert torch.equal(loss, again) and torch.equal(slope, slope_again)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_two_processes_with_half_the_samples_each_take_the_step_of_one(loss_type):
    cfg, b = GRPOConfig(num_generations=G, loss_type=loss_type, max_tokens=LONGEST), batch(1)
    advantages = group_advantages(b["rewards"], G)
    advantages[2] = float("nan")
    whole = ours(b, cfg, advantages)[1]
    live = b["mask"] & ~advantages.isnan()[:, None]
    below = sum(denominator(live[part], loss_type, LONGEST) for part in (slice(0, G), slice(G, B))) / 2  # what an all-reduced mean gives
    slopes = []
    for part in (slice(0, G), slice(G, B)):
        new = b["new"][part].clone().requires_grad_()
        loss, _ = grpo_loss(new, b["old"][part], b["mask"][part], advantages[part], cfg, ref_per_token_logps=b["ref"][part], below=below)
        slopes.append(torch.autograd.grad(loss, new)[0] / 2)  # distributed training averages gradients
    torch.testing.assert_close(torch.cat(slopes), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32(dtype):
    cfg, b = replace(GRPOConfig.tiny(), num_generations=G), batch(2)
    advantages = group_advantages(b["rewards"], G)
    low = {k: b[k].to(dtype) for k in ("new", "old", "ref")}
    loss, slope, _ = ours(b | low, cfg, advantages)
    assert loss.dtype == torch.float32 and slope.dtype == dtype
    torch.testing.assert_close(loss, ours(b | {k: v.float() for k, v in low.items()}, cfg, advantages)[0])
