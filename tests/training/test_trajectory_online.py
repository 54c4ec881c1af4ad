"""Ways of running that must give one curve, for what samples while it trains and what pairs or groups its rows; last
for every objective, on one process, in twice as many micro-batches, and on two ranks under each strategy."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.runs import Killed, column, curve, fit, launch, same_folders
from tests.helpers.runs import run_folder as only
from var.config.check import FOLDER
from var.models.packing import Packed
from var.training.module import AlignmentModule
from var.training.rollout import RolloutLoader

pytestmark = pytest.mark.trajectory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 prompts with two to four weighted answers of different lengths."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(13):
            texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(2, 14))) + "z" for _ in range(2 + i % 3)]
            responses = [{"text": text, "weight": draw.uniform(0.5, 1.5)} for text in texts]
            file.write(json.dumps({"id": f"r{i}", "prompt": f"question {i}?", "responses": responses}) + "\n")
    return path


@pytest.fixture
def options(rows: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Each prompt draws its answers alone, so that they do not depend on what else is sampled with it."""
    return [
        "data=files", f"data.path={rows}", f"model.path={tiny_folder}", "reward=exact_number",
        "reward._target_=tests.helpers.rewards.Distinct",
        f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.validation_prompts=0", "trainer.precision=64-true", "model.dtype=float64",
        "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "optim.optimizer.lr=3e-3",
        "data.last_micro_batch=keep", "generate.responses=3", "generate.batch=3", "generate.max_new_tokens=5",
    ]  # fmt: skip


def same(a: Any, b: Any, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    """Two runs' curves and weights."""
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        assert_close(column(a[2], name), column(b[2], name), rtol=rtol, atol=atol)
    assert_close(a[1], b[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "loss", [("grpo",), ("grpo", "loss.normalize=token"), ("var_online",), ("ppo",), ("ppo", "loss.rollout.steps=2")],
    ids=" ".join,
)  # fmt: skip
def test_accumulation_gives_one_curve(loss: tuple[str, ...], options: list[str], tmp_path: Path) -> None:
    """1×8 against 4×2 prompts, in the short last step too: 13 prompts are a step of 8 and one of 5; two epochs."""
    more = (f"loss={loss[0]}", *loss[1:], "data.global_batch=8")
    whole = fit(options, tmp_path / "whole", *more, "data.micro_batch=8")
    split = fit(options, tmp_path / "split", *more, "data.micro_batch=2")
    assert len(column(whole[2], "train/loss")) == 4
    assert min(column(whole[2], "train/grad_norm")) > 1e-3
    same(split, whole)
    for name in ("rollout/reward", "rollout/length", "rollout/cut", "nll", "reward/mean"):
        assert_close(column(split[2], f"train/{name}"), column(whole[2], f"train/{name}"))
    ratios = column(whole[2], "train/ratio/mean")  # to the policy that sampled: the same one, or one of a step before
    if ratios:
        assert (max(abs(ratio - 1) for ratio in ratios) > 1e-6) == ("loss.rollout.steps=2" in loss)


def test_groups_of_unequal_size_accumulate(options: list[str], tmp_path: Path) -> None:
    """InfoNCA: 1×4, 2×2 and 4×1 groups of two to four responses, four groups a step and one in the last."""
    results = {}
    for b in (4, 2, 1):
        results[b] = fit(options, tmp_path / str(b), "loss=infonca", "data.global_batch=4", f"data.micro_batch={b}")
    assert max(results[4][0].data.plan.sequences) > min(results[4][0].data.plan.sequences[:-1])
    same(results[2], results[4])
    same(results[1], results[4])


def test_kto_with_a_stored_and_a_live_reference_is_one_curve(options: list[str], tmp_path: Path) -> None:
    """Its own pairs and the mismatched ones; 26 responses in micro-batches of 4 end in a short one of 2."""
    more = ("loss=kto", "data.micro_batch=4", "data.global_batch=8", "trainer.epochs=3")
    stored = fit(options, tmp_path / "stored", *more)
    live = fit(options, tmp_path / "live", *more, "reference=live")
    assert max(column(stored[2], "train/kl")) > 1e-3  # the reference point is at work
    for name in ("train/loss", "train/kl", "train/grad_norm"):
        assert_close(column(live[2], name), column(stored[2], name), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rollout_trains_the_policy_that_sampled_it(
    accumulate: int, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch is sampled ahead of the step before it: where old_logps are absent the ratio is 1 because it is."""
    sampled: list[torch.Tensor] = []
    answered, step = RolloutLoader.answered, AlignmentModule.training_step

    def weight(module: Any) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()])

    def noted(self: RolloutLoader, *arguments: Any) -> Any:
        sampled.append(weight(self.data.trainer.lightning_module))  # type: ignore[union-attr]
        return answered(self, *arguments)

    def checked(self: AlignmentModule, batch: Packed, index: int) -> Any:
        assert torch.equal(sampled[-1], weight(self))
        return step(self, batch, index)

    monkeypatch.setattr(RolloutLoader, "answered", noted)
    monkeypatch.setattr(AlignmentModule, "training_step", checked)
    fit(options, tmp_path / "run", "loss=grpo", "data.global_batch=4", f"data.micro_batch={4 // accumulate}")
    assert len(sampled) == 8
    assert not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_resumed_is_straight(loss: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second epoch, two steps after a checkpoint: the same answers, the weights to the last bit."""
    more = (
        f"loss={loss}", "data.global_batch=4", "data.micro_batch=2", "trainer.checkpoint_every_n_steps=3",
        "trainer.precision=32-true", "model.dtype=float32",
    )  # fmt: skip
    seen: list[list[tuple[tuple[str, ...], list[int]]]] = []
    real = RolloutLoader.answered
    kill_at = -1

    def watched(self: RolloutLoader, *arguments: Any) -> Any:
        if len(seen) == kill_at:
            raise Killed
        batches = real(self, *arguments)
        seen.append([(batch.ids, batch.target.tolist()) for batch in batches])
        return batches

    monkeypatch.setattr(RolloutLoader, "answered", watched)
    straight = fit(options, tmp_path / "straight", *more)
    order = list(seen)
    assert len(order) == 8
    seen.clear()
    kill_at = 5
    with pytest.raises(Killed):
        fit(options, tmp_path / "killed", *more)
    kill_at, before, seen[:] = -1, list(seen), []
    resumed = fit(options, tmp_path / "killed", *more)
    assert before[:3] + seen == order
    assert all(torch.equal(straight[1][name], resumed[1][name]) for name in straight[1])
    assert column(resumed[2], "train/loss") == column(straight[2], "train/loss")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_give_one_curve(strategy: str, options: list[str], tmp_path: Path) -> None:
    """GRPO by two processes over gloo, whose answers differ in length, with a filler in the short last step."""
    common = [
        *options, "loss=grpo", "data.micro_batch=2", "data.global_batch=4", "trainer.precision=32-true",
        "model.dtype=float32", "data.limit=6", "trainer.epochs=1",
    ]  # fmt: skip
    launch(1, *common, f"runs={tmp_path}/one")
    launch(2, *common, f"runs={tmp_path}/two", f"strategy={strategy}", "trainer.devices=2")
    same_folders(
        only(tmp_path / "one"), only(tmp_path / "two"),
        "train/loss", "train/nll", "train/grad_norm", "train/rollout/reward", "train/rollout/length",
    )  # fmt: skip


# --- every objective


LOSSES = sorted(path.stem for path in Path(FOLDER, "loss").glob("[!_]*.yaml") if path.stem != "custom")
# Z, or KTO's pairs, are taken within a micro-batch: another B is another objective, as the paper says
OF_MICRO_BATCHES = ("var", "var_own", "var_sum", "kto")
# what a loss needs beside its own file on so little data
HEAD = ["loss.value.development_prompts=2", "loss.value.epochs=2", "loss.value.largest=20"]
OWN = {"var_sampled": ["loss.estimator.candidates=3"], **{loss: HEAD for loss in LOSSES if loss.startswith("alol")}}


@pytest.mark.long
def test_every_objective_is_one_curve_on_any_number_of_processes(options: list[str], tmp_path: Path) -> None:
    """In float64. 13 prompts leave a short last step, in which a rank has less to do than the other or nothing."""
    common = [*options, "data.global_batch=4", "trainer.epochs=1"]
    ways = {
        "one": (1, ["data.micro_batch=2"]),
        "accumulated": (1, ["data.micro_batch=1"]),
        "ddp": (2, ["data.micro_batch=2", "strategy=ddp", "trainer.devices=2"]),
        "fsdp": (2, ["data.micro_batch=2", "strategy=fsdp", "trainer.devices=2"]),
    }
    jobs = [(way, loss) for way in ways for loss in LOSSES if not (way == "accumulated" and loss in OF_MICRO_BATCHES)]
    for processes in (1, 2):
        told = [
            (str(tmp_path / way / loss), [*common, f"loss={loss}", *OWN.get(loss, []), *ways[way][1]])
            for way, loss in jobs if ways[way][0] == processes
        ]  # fmt: skip
        (tmp_path / "jobs.json").write_text(json.dumps(told))
        launch(processes, str(tmp_path / "jobs.json"), script="tests/ranks.py", timeout=None)
    apart = []
    for way, loss in jobs:
        expected, found = curve(tmp_path / "one" / loss), curve(tmp_path / way / loss)
        straight, weights = (torch.load(tmp_path / w / loss / "weights.pt") for w in ("one", way))
        assert max(column(expected, "train/grad_norm")) > 0, loss
        try:
            same((None, weights, found), (None, straight, expected), rtol=1e-6, atol=1e-7)
        except AssertionError as error:
            apart.append(f"{way} {loss}: {str(error)[:300]}")
    assert not apart, "\n".join(apart)
