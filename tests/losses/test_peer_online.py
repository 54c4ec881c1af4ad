"""Losses on sampled responses compared with TRL's trainers on given rewards and log-probabilities.

Only sampling, scoring and the models are replaced, by numbers in float64. Advantages and losses are TRL's own code.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from tests.helpers.losses import compute_means, make_batch, value_and_gradient
from var.losses.grpo import GRPO
from var.losses.ppo import PPO, gae
from var.losses.rloo import RLOO
from var.models.packing import Packed

pytestmark = pytest.mark.peer

LENGTHS = [4, 2, 1, 5, 3, 3, 6, 2, 1]  # three groups of three
GROUP = [0, 0, 0, 1, 1, 1, 2, 2, 2]
ENTROPY = torch.zeros(len(LENGTHS), max(LENGTHS))


class Numbers(torch.nn.Module):
    """A model that consists of its log-probabilities, [N] of LENGTHS."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        self.logps = logps

    def pad(self) -> Tensor:
        """Return the log-probabilities as [B, longest]."""
        return pad_sequence(self.logps.split(LENGTHS), batch_first=True)


def make_trainer(old: Tensor, reference: Tensor, rewards: Tensor, **options: Any) -> Any:
    """Return the attributes that methods of GRPOTrainer and RLOOTrainer read. The options are theirs."""
    common = {
        "model": Numbers(old).train(), "ref_model": Numbers(reference), "prompts": [[0]] * len(LENGTHS),
        "_get_per_token_logps_and_entropies": lambda model, *_, **__: (model.pad(), ENTROPY, None),
        "completions": [[1] * length for length in LENGTHS],
        "_calculate_rewards": lambda *_: rewards[:, None], "reward_weights": torch.ones(1), "reward_func_names": ["r"],
        "args": SimpleNamespace(
            report_to=[], per_device_train_batch_size=len(LENGTHS), gradient_checkpointing_kwargs=None,
            steps_per_generation=1, gradient_accumulation_steps=1, delta=None,
            use_bias_correction_kl=options.pop("use_bias_correction_kl", False),
        ),
        "accelerator": SimpleNamespace(
            device="cpu", gather=lambda x: x, reduce=lambda x, **_: x, process_index=0, num_processes=1,
        ),
        "_tokenizer": SimpleNamespace(pad_token_id=0), "pad_to_multiple_of": None, "mask_truncated_completions": False,
        "num_generations": 3, "_metrics": {"train": defaultdict(list)}, "_logs": defaultdict(list),
        "_pending_extra_logs": {}, "_pending_metrics": {}, "log_multimodal": False, "aux_loss_enabled": False,
        "state": SimpleNamespace(global_step=0), "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    common["_logs"]["rewards"] = defaultdict(list)  # type: ignore[index]
    common["_logs"]["extra"] = defaultdict(list)  # type: ignore[index]
    return SimpleNamespace(**common, **options)


def make_grpo_trainer(
    *numbers: Tensor, kind: str, beta: float, low: float, high: float, scale: str, **options: Any
) -> Any:
    """Return a stand-in for GRPOTrainer."""
    trainer = make_trainer(
        *numbers, loss_type=kind, beta=beta, epsilon_low=low, epsilon_high=high, scale_rewards=scale,
        environment_factories=None, environments=None, tools=None, num_iterations=2, use_vllm=False,
        multi_objective_aggregation="sum_then_normalize", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", max_completion_length=9, _entropy_bonus_enabled=False,
        vllm_importance_sampling_correction=False, **options,
    )  # fmt: skip
    generated = (trainer.prompts, trainer.completions, None, [""] * len(LENGTHS), None, {}, None, None)
    trainer._generate = lambda _: generated
    return trainer


def make_rloo_trainer(*numbers: Tensor, beta: float, clip: float) -> Any:
    """Return a stand-in for RLOOTrainer."""
    trainer = make_trainer(
        *numbers, beta=beta, epsilon_low=clip, epsilon_high=clip, reward_clip_range=None, normalize_advantages=False
    )
    trainer._generate = lambda _: (trainer.prompts, trainer.completions, [""] * len(LENGTHS))
    return trainer


def trl_loss(cls: Any, trainer: Any, logps: Tensor, advantages: Tensor | None = None) -> Tensor:
    """Return TRL's loss, computed from the rewards, or from `advantages` [N] in their place."""
    inputs = cls._generate_and_score_completions(trainer, [{"prompt": ""}] * len(LENGTHS))
    if advantages is not None:
        inputs["advantages"] = Numbers(advantages).pad()
    return cls._compute_loss(trainer, Numbers(logps), inputs)


def draw_batch(seed: int, **fields: Any) -> tuple[Tensor, Packed]:
    """Return the policy's log-probabilities and a batch. Ratios lie on both sides of the clip. One group has rewards 0
    and 1."""
    torch.manual_seed(seed)
    old, reference = -4 * torch.rand(2, sum(LENGTHS), dtype=torch.float64) ** 2
    rewards = torch.cat([torch.randn(6, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)])
    logps = old + 0.3 * torch.randn(sum(LENGTHS), dtype=torch.float64)
    batch = make_batch(LENGTHS, GROUP, rewards=rewards, old_logps=old, reference_logps=reference, **fields)
    return logps, batch


KINDS = {
    "grpo": {"normalize": "sequence"},
    "dapo": {"normalize": "token"},
    "dr_grpo": {"normalize": "constant", "length": 9},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_grpo_equals_trl(kind, scale, beta, seed):
    """From rewards to the loss, with policies that differ. By default TRL multiplies its KL term by the ratio
    (use_bias_correction_kl), which is switched off here."""
    from trl import GRPOTrainer

    logps, batch = draw_batch(seed)
    ours = GRPO(beta=beta, clip_low=0.2, clip_high=0.28, scale=scale, **KINDS[kind])
    trainer = make_grpo_trainer(
        batch.old_logps, batch.reference_logps, batch.rewards,
        kind=kind, beta=beta, low=0.2, high=0.28, scale={"std": "group", "none": "none"}[scale],
    )  # fmt: skip
    mine = value_and_gradient(lambda x: ours(x, batch)[0], logps)
    theirs = value_and_gradient(lambda x: trl_loss(GRPOTrainer, trainer, x), logps)
    assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    metrics, trl_metrics = compute_means(ours(logps, batch)[1]), trainer._metrics["train"]
    assert 0.1 < metrics["ratio/clipped"] < 0.9
    # TRL logs in the mask's dtype, float32.
    assert metrics["ratio/clipped"] == pytest.approx(trl_metrics["clip_ratio/region_mean"][0], rel=1e-6)
    if beta:
        assert metrics["kl"] == pytest.approx(trl_metrics["kl"][0], rel=1e-6)


def test_trl_default_kl_term_has_another_gradient():
    """It is multiplied by the ratio. On own samples, ρ = 1, the loss is the same and the gradient is not."""
    from trl import GRPOTrainer

    logps, batch = draw_batch(0)
    numbers = (logps, batch.reference_logps, batch.rewards)
    options = {"kind": "grpo", "beta": 0.3, "low": 0.2, "high": 0.2, "scale": "group"}
    trainers = [make_grpo_trainer(*numbers, **options, use_bias_correction_kl=on) for on in (False, True)]
    plain, corrected = (value_and_gradient(lambda x, s=s: trl_loss(GRPOTrainer, s, x), logps) for s in trainers)
    assert_close(plain[0], corrected[0], rtol=1e-12, atol=1e-14)
    assert (plain[1] - corrected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.7])
def test_rloo_equals_trl(beta, seed):
    from trl import RLOOTrainer

    logps, batch = draw_batch(seed)
    trainer = make_rloo_trainer(batch.old_logps, batch.reference_logps, batch.rewards, beta=beta, clip=0.2)
    mine = value_and_gradient(lambda x: RLOO(beta=beta, clip=0.2)(x, batch)[0], logps)
    theirs = value_and_gradient(lambda x: trl_loss(RLOOTrainer, trainer, x), logps)
    assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    clipped = compute_means(RLOO(beta=beta, clip=0.2)(logps, batch)[1])["ratio/clipped"]
    assert 0 < clipped < 1
    assert clipped == pytest.approx(trainer._metrics["train"]["clip_ratio/region_mean"][0], rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_policy_loss_equals_trl_dapo_on_given_advantages(seed):
    """TRL 1.16 has no PPO, but its `dapo` with one advantage per token is the policy's part. The value head's loss adds
    a constant to the loss and nothing to the gradient in log-probabilities."""
    from trl import GRPOTrainer

    old_values = torch.sin(torch.arange(sum(LENGTHS), dtype=torch.float64))
    logps, batch = draw_batch(seed, old_values=old_values, values=old_values)
    rewards = torch.zeros_like(logps)
    rewards[torch.tensor(LENGTHS).cumsum(0) - 1] = batch.rewards
    advantages = gae(rewards - 0.05 * (batch.old_logps - batch.reference_logps), old_values, batch.sequence, 0.99, 0.9)
    trainer = make_grpo_trainer(
        batch.old_logps, batch.reference_logps, batch.rewards, kind="dapo", beta=0.0, low=0.2, high=0.2, scale="none"
    )
    ours = PPO(beta=0.05, gamma=0.99, lam=0.9)
    mine = value_and_gradient(lambda x: ours(x, batch)[0], logps)
    theirs = value_and_gradient(lambda x: trl_loss(GRPOTrainer, trainer, x, advantages), logps)
    assert_close(mine[1], theirs[1], rtol=1e-12, atol=1e-14)
    # Values have not moved, so the error is −advantage.
    value_loss = 0.1 * advantages.square().sum() / 2 / sum(LENGTHS)
    assert_close(mine[0] - value_loss, theirs[0], rtol=1e-12, atol=1e-14)
