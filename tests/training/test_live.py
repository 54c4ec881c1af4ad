"""A live reference: no pass before training, one model at a time, and the weights that it computes in each step."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.runs import assert_same, column, find_scale, fit
from var.annotate.weights import ProvideWeights
from var.models.cross_scoring import pack_crossed_parts
from var.models.packing import pack
from var.models.policy import Policy
from var.requirements import Weights
from var.training.module import AlignmentModule
from var.utils.errors import UserError
from var.weights.estimators import InBatch

STEPS = ["data.micro_batch=4", "data.global_batch=8", "trainer.epochs=2"]


def count_passes_before_training(options: list[str], folder: Path, *more: str) -> tuple[Any, int]:
    """Train; return the run, and how often a model ran before the first training step."""
    passes, before = list[str](), list[int]()
    forward, training_step = Policy.forward, AlignmentModule.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "forward", lambda self, batch: (passes.append(""), forward(self, batch))[1])
        patch.setattr(
            AlignmentModule, "training_step",
            lambda self, *batch: (before.append(len(passes)), training_step(self, *batch))[1],
        )  # fmt: skip
        run, _, _ = fit(options, folder, *STEPS, *more)
    return run, before[0]


@pytest.mark.parametrize("loss", ["dpo", "kto", "var", "var_own"])
def test_live_reference_makes_no_pass_before_training(loss, options, tmp_path):
    """Nor does it write a table of the annotation cache. A cached reference does both."""
    _, passes = count_passes_before_training(options, tmp_path / "live", f"loss={loss}", "reference=live")
    assert passes == 0
    assert not list((tmp_path / "store").rglob("*logps*"))
    run, passes = count_passes_before_training(options, tmp_path / "cached", f"loss={loss}")
    assert passes > 0
    assert list((tmp_path / "store").rglob("*logps*"))
    assert run.annotator.computed


@pytest.mark.parametrize("loss", ["var", "var_own", "var_sum"])
def test_live_weights_are_the_cached_ones_times_one_constant(loss, options, tmp_path):
    """The mean over the data set is known only after a pass over all of it. AdamW ignores a constant factor.

    26 responses in micro-batches of 4: the last one, of 2, has the same constant.
    """
    more = (f"loss={loss}", "data.last_step=keep", "optim.optimizer.eps=1e-30", "trainer.gradient_clip=0", *STEPS)
    cached = fit(options, tmp_path / "cached", *more)
    live = fit(options, tmp_path / "live", *more, "reference=live")
    assert abs(find_scale(live, cached, "train/loss", "train/weight/mean", "train/grad_norm") - 1) > 0.01
    assert_same(live, cached, "train/weight/ess", rtol=1e-5, atol=1e-5, weights=False)
    for name, weights in cached[1].items():
        assert_close(live[1][name], weights, rtol=1e-5, atol=1e-5)


def test_live_weight_is_one_if_all_pairings_are_equal():
    """1/B of each response, times the B of a complete micro-batch: here of 4, and a last one of 2."""
    estimator = InBatch(reduction="sum", reference="cross")
    provider = ProvideWeights(Weights(estimator=estimator, temperature=1.0, temperature_unit="reward", min_weight=0.0))
    provider.temperature, provider.width = 1.0, 4
    for size in (4, 2):  # of three parts
        ids, starts = [[1, 2, 3]] * size, [2] * size
        batch = pack(
            ids, starts, rewards=torch.full((size,), 3.0), cross_rewards=torch.full((size, size), 3.0),
            crossed=pack_crossed_parts(ids, starts, 3),
        )  # fmt: skip
        weights = provider.at_step(batch, None, lambda crossed: torch.zeros(len(crossed.target))).weights
        assert weights is not None
        assert_close(weights, torch.full((size,), 4 / size))


@pytest.mark.parametrize("tokens", [1, 150])
def test_live_pairings_are_scored_in_passes_of_bounded_size(tokens, options, tmp_path, monkeypatch):
    """Their number is the same for each micro-batch, also for the last one of two sequences, as sharding requires.

    Weights are rounded to float32, so a different last bit before that may change a result by 1e-8.
    """
    sizes, forward = list[int](), Policy.forward

    def watched(self: Policy, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            sizes.append(len(batch.input_ids))
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", watched)
    more = ("loss=var", "reference=live", *STEPS)
    one = fit(options, tmp_path / "one", *more)
    largest, micro_batches = max(sizes), len(sizes)
    sizes.clear()
    monkeypatch.setattr("var.annotate.weights.TOKENS", tokens)
    several = fit(options, tmp_path / "several", *more)
    passes = {1: 4, 150: 2}[tokens]
    assert len(sizes) == passes * micro_batches
    assert max(sizes) < 1.5 * largest / passes
    assert_same(several, one, "train/loss", "train/weight/mean", rtol=1e-6, atol=1e-6)


def test_live_reference_rejects_weights_that_only_their_mean_makes_finite(options, tmp_path):
    """1 / Σ_j π_ref(y_j|x_i) e^{r/λ} of summed log-probabilities is beyond the largest float."""
    with pytest.raises(UserError, match=r"reference=live: .*reduction=sum.*Set reference=cached"):
        fit(options, tmp_path / "run", "loss=var_literal", "reference=live")


@pytest.mark.parametrize("loss", ["dpo", "var"])
def test_live_run_never_holds_two_references(loss, options, tmp_path, monkeypatch):
    """From the start through evaluations to the end, there are the policy and at most one frozen model."""
    made, most, real = list[Any](), [0], Policy.__init__

    def watched(self: Policy, *arguments: Any) -> None:
        real(self, *arguments)
        made.append(weakref.ref(self))
        gc.collect()
        most[0] = max(most[0], sum(policy() is not None for policy in made))

    monkeypatch.setattr(Policy, "__init__", watched)
    more = ("data.validation_prompts=3", "eval.every_n_steps=1", "eval.sampling.max_new_tokens=4")
    run, _, curve = fit(options, tmp_path / "run", *STEPS, f"loss={loss}", "reference=live", *more)
    assert len(column(curve, "validation/kl")) > 2
    assert run.validation.result["kl"]["mean"] >= 0
    assert most[0] == 2
