"""Requirements: one that a user defines outside the package works, and nothing else is read off a loss."""

import ast
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers.runs import ROOT, column, fit
from var.annotate.base import Provider, TrainingSet, make_providers
from var.losses.base import Mean, Metrics
from var.losses.sft import SFT
from var.models.packing import Packed
from var.requirements import Groups, Pairs, Requirement, Rewards, Weights
from var.utils.errors import UserError
from var.weights.estimators import Grouped


@dataclass(frozen=True, kw_only=True)
class ResponseRank(Requirement):
    """decay ** (number of shorter responses to the same prompt)."""

    decay: float

    provider = f"{__name__}.ProvideResponseRank"
    shape = "[B]"
    text = "a weight that decays with the rank of the response's length within its prompt"


class ProvideResponseRank(Provider[ResponseRank]):
    """Computes the weights before the plan, from the tokens of all responses."""

    def select(self, data: TrainingSet) -> None:
        length, group = data.sequences.length, data.sequences.group
        shorter = (group[:, None] == group) & (length < length[:, None])
        self.weights = torch.from_numpy(self.requirement.decay ** shorter.sum(1))

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        return {"weights": self.weights[members]}


@dataclass(frozen=True, kw_only=True)
class RankWeighted:
    """SFT in which longer responses to a prompt count less."""

    decay: float

    @property
    def requires(self) -> tuple[Requirement, ...]:
        return (ResponseRank(decay=self.decay),)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        assert batch.weights is not None
        loss = -(batch.weights[batch.sequence] * logps).sum() / batch.global_tokens
        return loss, {"weight": Mean(batch.weights.sum(), float(len(batch)))}


def test_user_defined_requirement_trains(options, rows, tmp_path):
    """Two steps equal AdamW by hand on the loss by hand. A response of n characters has n + 1 tokens."""
    more = (
        "loss=custom", f"loss._target_={__name__}.RankWeighted", "+loss.decay=0.25", "trainer.max_steps=2",
        "data.micro_batch=2", "data.global_batch=4", "trainer.gradient_clip=0", "optim.schedule.kind=constant",
        "optim.schedule.warmup=0",
    )  # fmt: skip
    run, weights, curve = fit(options, tmp_path / "run", *more)

    expected: dict[str, float] = {}
    for record in map(json.loads, rows.read_text().splitlines()):
        lengths = [len(response["text"]) for response in record["responses"]]
        for k, length in enumerate(lengths):
            expected[f"{record['id']}#{k}"] = 0.25 ** sum(other < length for other in lengths)
    assert set(expected.values()) == {1, 0.25, 0.0625}

    module = run.module()
    optimizer = module.optimizer(module.policy.parameters())
    micro_batches = list(run.data.training_set.plan.batches(0, 0, 1))
    for step in range(2):
        batches = [run.data.batch(micro_batch) for micro_batch in micro_batches[2 * step : 2 * step + 2]]
        assert [len(batch) for batch in batches] == [2, 2]
        loss, total = torch.zeros((), dtype=torch.float64), 0.0
        for batch in batches:
            logps = module.policy(batch).split(batch.length.tolist())
            for name, part in zip(batch.ids, logps, strict=True):
                loss = loss - expected[name] * part.sum()
                total += expected[name]
        loss = loss / sum(len(batch.target) for batch in batches)
        assert column(curve, "train/loss")[step] == pytest.approx(loss.item(), rel=1e-9)
        assert column(curve, "train/weight")[step] == pytest.approx(total / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(weights, module.policy.state_dict(), rtol=1e-9, atol=1e-10)


def test_provider_must_have_a_dotted_name():
    @dataclass(frozen=True, kw_only=True)
    class Nameless(Requirement):
        provider = "ProvideNothing"

    with pytest.raises(UserError, match=r"^Nameless\.provider='ProvideNothing' cannot be imported"):
        make_providers((Nameless(),))


@dataclass(frozen=True, kw_only=True)
class WeightsFirst(SFT):
    """Lists Weights before the Rewards that they are computed from."""

    requires: ClassVar[tuple[Requirement, ...]] = (
        Weights(
            estimator=Grouped(drop_zero_variance=False), temperature=1.0, temperature_unit="reward", min_weight=0.0
        ),
        Rewards(),
    )


def test_weights_before_rewards_are_an_error(options, tmp_path):
    with pytest.raises(UserError, match=r"^Weights is computed from rewards: list Rewards\(\) before Weights\(\)"):
        fit(options, tmp_path / "run", f"loss._target_={__name__}.WeightsFirst")


@dataclass(frozen=True, kw_only=True)
class PairsAndGroups(SFT):
    """Asks for two units."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), Groups())


def test_units_that_exclude_each_other_are_an_error(options, tmp_path):
    with pytest.raises(UserError, match=r"^this loss asks for units that exclude each other: group, pair$"):
        fit(options, tmp_path / "run", f"loss._target_={__name__}.PairsAndGroups")


def find_reads(source: str) -> set[str]:
    """Return what code reads off a loss: attributes of `x.loss`, and of arguments of type Loss.

    getattr, hasattr and isinstance of a loss are returned by their own names.
    """
    reads: set[str] = set()
    tree = ast.parse(source)
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda | ast.Module)):
        arguments = [] if isinstance(scope, ast.Module) else [*scope.args.args, *scope.args.kwonlyargs]
        losses = {a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation) == "Loss"}

        def is_loss(node: ast.AST, losses: set[str] = losses) -> bool:
            return (isinstance(node, ast.Attribute) and node.attr == "loss") or (
                isinstance(node, ast.Name) and node.id in losses
            )

        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and is_loss(node.value):
                reads.add(node.attr)
            if isinstance(node, ast.Call) and node.args and is_loss(node.args[0]):
                reads |= {ast.unparse(node.func)} & {"getattr", "hasattr", "isinstance"}
    return reads


def test_training_and_evaluation_read_only_the_requirements_of_a_loss():
    code = "def f(self, loss: Loss):\n  self.loss(1), loss.a, self.run.loss.b, hasattr(self.loss, 'c'), loss.requires"
    assert find_reads(code) == {"a", "b", "hasattr", "requires"}
    reads: dict[str, set[str]] = {}
    for folder in ("training", "evaluate"):
        for path in (ROOT / "var" / folder).rglob("*.py"):
            reads[path.name] = find_reads(path.read_text())
    assert {name: found for name, found in reads.items() if found} == {"datamodule.py": {"requires"}}
