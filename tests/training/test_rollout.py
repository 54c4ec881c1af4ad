"""Rollouts: what was sampled is what trains, with the divisors, log-probabilities and draws of its own step."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.runs import composed
from var.models.cross_scoring import unpack_sequences
from var.models.packing import Packed
from var.training import rollout
from var.training.datamodule import AlignmentData
from var.training.module import AlignmentModule
from var.training.rollout import Rollout, RolloutLoader
from var.training.run import Run
from var.utils.distributed import Ranks
from var.utils.errors import UserError

END = 257
BYTE = 187  # 0xff
PROMPTS = 7


class Told:
    """A reward that tells prompt, response and answer apart, and notes what it is asked."""

    scores_text = True
    identity = {"program": "told"}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None]] = []

    def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
        asked = [(p[-1]["content"], r, a) for p, r, a in zip(prompts, responses, answers, strict=True)]
        self.asked += asked
        return [self.of(*one) for one in asked]

    @staticmethod
    def of(prompt: str, response: str, answer: str | None) -> float:
        return 100.0 * len(prompt) + len(set(response)) + float(answer or 0) / 16


Made = tuple[AlignmentData, AlignmentModule]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Made]:
    """An online run's data and module over seven prompts of different lengths; two answers each."""
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"r{i}", "prompt": "?" * (i + 1), "answer": str(i)} for i in range(PROMPTS)]
    path.write_text("\n".join(map(json.dumps, rows)))

    def made(*overrides: str) -> Made:
        options = [
            "data=files", f"data.path={path}", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store",
            f"cache={tmp_path}/cache", "data.validation_prompts=0", "data.last_micro_batch=keep",
            "data.micro_batch=2", "data.global_batch=4", "trainer.accelerator=cpu", "generate.responses=2",
            "generate.max_new_tokens=5", "loss=grpo", *overrides,
        ]  # fmt: skip
        run = Run.compose(composed(*options), tmp_path)
        run.annotator.reward = Told()
        run.data.prepare()
        module = run.module()
        run.data.trainer = SimpleNamespace(lightning_module=module, current_epoch=0, world_size=1)  # type: ignore[assignment]
        return run.data, module

    return made


class Sampler:
    """Stands before sample_tokens; notes each call's seed and prompts, and what came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, given: list[tuple[list[int], bool]] | None = None) -> None:
        self.seeds: list[int] = []
        self.prompts: list[list[list[int]]] = []
        self.out: list[list[tuple[list[int], bool]]] = []
        real = rollout.sample_tokens

        def sample_tokens(model: Any, chat: Any, encoded: Any, sampling: Any) -> Any:
            self.seeds.append(sampling.seed)
            self.prompts.append(encoded)
            out = real(model, chat, encoded, sampling) if given is None else [given] * len(encoded)
            self.out += out
            return out

        monkeypatch.setattr(rollout, "sample_tokens", sample_tokens)

    @property
    def calls(self) -> int:
        return len(self.seeds)


def responses(batch: Packed) -> list[list[int]]:
    ids, starts = unpack_sequences(batch)
    return [row[start:] for row, start in zip(ids, starts, strict=True)]


def epoch(data: AlignmentData, number: int = 0, ranks: Ranks | None = None) -> list[Packed]:
    data.trainer.current_epoch = number  # type: ignore[union-attr]
    return list(RolloutLoader(data, ranks or Ranks()))


def steps(batches: list[Packed], per_step: int = 2) -> Iterator[list[Packed]]:
    for at in range(0, len(batches), per_step):
        yield batches[at : at + per_step]


# --- what trains


def test_the_tokens_are_those_sampled(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that is no text and a special token do not survive a decoding and an encoding. The end token comes where
    the answer is finished; an empty answer is the end token alone."""
    given = [([BYTE, 258, 65], True), ([], True), ([65, 66, 67, 68, 69], False)]
    data, _ = make("generate.responses=3")
    tokenizer = data.annotator.chat.tokenizer
    assert tokenizer(tokenizer.decode([BYTE]), add_special_tokens=False)["input_ids"] != [BYTE]
    Sampler(monkeypatch, given)
    batches = epoch(data)
    for batch in batches:
        expected = [[BYTE, 258, 65, END], [END], [65, 66, 67, 68, 69]]
        assert responses(batch) == expected * (len(batch) // 3)
        assert batch.length.tolist() == [4, 1, 5] * (len(batch) // 3)
    assert sum(len(batch) for batch in batches) == 3 * PROMPTS


def test_real_draws_go_through_as_they_are(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = make()
    sampler = Sampler(monkeypatch)
    trained = [one for batch in epoch(data) for one in responses(batch)]
    assert trained == [tokens + [END] * finished for several in sampler.out for tokens, finished in several]
    assert len(trained) == 2 * PROMPTS


def test_names_groups_and_rewards_line_up_with_their_prompts(make: Callable[..., Made]) -> None:
    """A reward of prompt, text and answer; read off each packed sequence again."""
    data, _ = make()
    seen: list[str] = []
    chat = data.annotator.chat
    for batch in epoch(data):
        ids, starts = unpack_sequences(batch)
        assert batch.group.tolist() == [0, 0, 1, 1][: len(batch)]
        assert batch.rewards is not None
        for row, start, name, reward in zip(ids, starts, batch.ids, batch.rewards.tolist(), strict=True):
            i = int(name[1:])
            prompt = "?" * (i + 1)
            assert row[:start] == chat.prompt([{"role": "user", "content": prompt}])
            text = chat.tokenizer.decode(row[start:], skip_special_tokens=True)
            assert reward == Told.of(prompt, text, str(i))
            seen.append(name)
    assert sorted(seen) == sorted(f"r{i}" for i in range(PROMPTS) for _ in range(2))


def test_rewards_stand_on_the_runs_scale(make: Callable[..., Made]) -> None:
    data, _ = make("reward_scale=sigmoid")
    (batch, *_) = epoch(data)
    assert batch.rewards is not None
    assert batch.rewards.tolist() == [1.0] * 4  # σ of a hundred and more


def test_a_reward_that_is_not_finite_is_named(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = make()
    a, b = data.annotator.chat.tokenizer("AB", add_special_tokens=False)["input_ids"]
    Sampler(monkeypatch, [([a], True), ([b], True)])
    monkeypatch.setattr(Told, "of", staticmethod(lambda p, r, a: math.nan if r == "B" else 0.0))
    with pytest.raises(UserError, match=r"^the reward of a sampled response is nan: 'B'$"):
        epoch(data)


def test_a_reward_that_returns_too_few_numbers_is_told(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make()
    monkeypatch.setattr(Told, "__call__", lambda self, prompts, responses, answers: [1.0])
    with pytest.raises(UserError, match=r"^the reward \(Told\) returned 1 numbers for 8 responses"):
        epoch(data)


# --- divisors


def test_divisors_are_the_whole_steps(make: Callable[..., Made]) -> None:
    """Seven prompts, two a micro-batch, four a step: the second step has three prompts, six sequences."""
    data, _ = make()
    batches = epoch(data)
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    for step, prompts in zip(steps(batches), (4.0, 3.0), strict=True):
        tokens = float(sum(len(batch.target) for batch in step))
        assert [batch.global_tokens for batch in step] == [tokens] * 2
        assert [batch.global_sequences for batch in step] == [2 * prompts] * 2
        assert [batch.global_groups for batch in step] == [prompts] * 2


def test_a_rollout_of_several_steps_has_each_steps_divisors(make: Callable[..., Made]) -> None:
    data, _ = make("data.global_batch=2", "data.micro_batch=1", "loss.rollout.steps=3")
    for step in steps(epoch(data)):
        tokens = float(sum(len(batch.target) for batch in step))
        assert [batch.global_tokens for batch in step] == [tokens] * len(step)


def test_fillers_count_for_nothing_on_two_ranks(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven prompts, one a micro-batch, two ranks: in the last step the second rank repeats the first one's."""
    data, module = make("data.micro_batch=1", "data.global_batch=2")
    counted: list[float] = []  # each rank's own, step by step
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counted.extend(counts.tolist()))
    one = epoch(data, ranks=Ranks(0, 2))
    recorded = dict(module._sums)
    module._sums.clear()
    two = epoch(data, ranks=Ranks(1, 2))
    assert len(one) == len(two) == 4
    assert one[3].ids == two[3].ids
    for batch in (*one, *two[:3]):
        assert batch.global_tokens == len(batch.target)
        assert (batch.global_sequences, batch.global_groups) in ((4.0, 2.0), (2.0, 1.0))
    filler = two[3]
    assert counted == [float(len(batch.target)) for batch in (*one, *two[:3])] + [0.0]
    assert filler.global_tokens == filler.global_sequences == filler.global_groups == math.inf
    assert recorded["rollout/reward"][1] == 8
    for name in ("rollout/reward", "rollout/length", "rollout/cut"):
        assert module._sums[name][1] == 6, name


def test_the_tokens_of_a_step_are_summed_over_ranks(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other rank had 1000 tokens in each step."""
    data, _ = make("data.micro_batch=1", "data.global_batch=2")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(1000))
    for batch in epoch(data, ranks=Ranks(0, 2)):
        assert batch.global_tokens == len(batch.target) + 1000


# --- what the loss needs


@pytest.mark.parametrize(("more", "given"), [([], False), (["loss.rollout.steps=2"], True),
                                             (["loss.rollout.passes=2", "data.last_step=drop"], True)])  # fmt: skip
def test_old_logps_are_the_sampling_policys(make: Callable[..., Made], more: list[str], given: bool) -> None:
    """Where a rollout trains more than one step; else they are the policy's own, and absent. The policy moves on
    after the first micro-batch has been handed out."""
    data, module = make(*more)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.1)  # no longer the reference
    sampling = {name: value.clone() for name, value in module.policy.state_dict().items()}
    batches = []
    for batch in RolloutLoader(data, Ranks()):
        with torch.no_grad():
            for parameter in module.policy.parameters():
                parameter.mul_(1.1)
        batches.append(batch)
        if len(batches) == 4:
            break
    assert all((batch.old_logps is not None) == given for batch in batches)
    if given:
        module.policy.load_state_dict(sampling)
        for batch in batches:
            with torch.no_grad():
                assert_close(batch.old_logps, module.policy(batch))


def test_old_values_come_with_them(make: Callable[..., Made]) -> None:
    data, module = make("loss=ppo", "loss.rollout.steps=2")
    torch.nn.init.normal_(module.policy.head.weight)  # type: ignore[union-attr, arg-type]
    (batch, *_) = epoch(data)
    with torch.no_grad():
        logps, values = module.policy(batch)
    assert_close((batch.old_logps, batch.old_values), (logps, values))
    assert values.std() > 0


def test_the_references_logps_are_its_own(make: Callable[..., Made]) -> None:
    """Not the policy's, which has moved; absent where β is 0."""
    data, module = make()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.1)
    (batch, *_) = epoch(data)
    with torch.no_grad():
        assert_close(batch.reference_logps, data.annotator.reference.policy(batch))
    data, _ = make("loss.beta=0")
    assert epoch(data)[0].reference_logps is None


# --- when it is sampled


def test_passes_repeat_the_same_batches(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight micro-batches of one prompt less the short step's: three steps of two, each twice."""
    data, _ = make("loss.rollout.passes=2", "data.micro_batch=1", "data.global_batch=2", "data.last_step=drop")
    sampler = Sampler(monkeypatch)
    batches = epoch(data)
    assert len(batches) == len(RolloutLoader(data, Ranks())) == 12
    assert sampler.calls == 3
    for at in range(0, 12, 4):
        a, b, c, d = batches[at : at + 4]
        assert a is c
        assert b is d
        assert a is not b


def test_several_steps_are_sampled_at_once(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps, three of them in the first rollout."""
    data, _ = make("loss.rollout.steps=3", "data.micro_batch=1", "data.global_batch=2")
    sampler = Sampler(monkeypatch)
    assert len(epoch(data)) == 7
    assert [len(prompts) for prompts in sampler.prompts] == [6, 1]


def test_nothing_is_sampled_before_it_is_needed(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of the next step is another one."""
    data, _ = make()
    sampler = Sampler(monkeypatch)
    loader = iter(RolloutLoader(data, Ranks()))
    next(loader), next(loader)
    assert sampler.calls == 1
    next(loader)
    assert sampler.calls == 2


def test_each_step_and_epoch_draws_anew_and_a_run_the_same(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(monkeypatch)
    data, _ = make("data.global_batch=2")
    first, second = epoch(data), epoch(data, 1)
    assert len(set(sampler.seeds)) == len(sampler.seeds) == 8
    by_name = [{b.ids[0]: responses(b) for b in batches} for batches in (first, second)]
    assert any(by_name[0][name] != by_name[1][name] for name in by_name[0].keys() & by_name[1].keys())
    again, _ = make("data.global_batch=2")
    assert [responses(b) for b in epoch(again)] == [responses(b) for b in first]
    other, _ = make("data.global_batch=2", "generate.seed=1", "data.seed=0")
    assert [responses(b) for b in epoch(other)] != [responses(b) for b in first]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_draws_do_not_depend_on_micro_batches_or_ranks(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """A step's seed is its number in the run."""
    sampler = Sampler(monkeypatch)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts)
    data, _ = make(f"data.micro_batch={micro}")
    epoch(data), epoch(data, 1)
    assert sampler.seeds == [0, 1, 2, 3]
    if micro < 4:
        epoch(data, 1, Ranks(1, 2))
        assert sampler.seeds == [0, 1, 2, 3, 2, 3]


def stopped(data: Any, position: int) -> dict[str, Any]:
    """The state of a run of one process after so many micro-batches of the first epoch."""
    weights = data.annotator.reference.pretrained.weights
    return {"plan": data.plan.hash, "weights": weights, "epoch": 0, "position": position, "ranks": 1}


def test_resumed_within_an_epoch_what_was_done_is_not_sampled(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the third of four rollouts of two micro-batches; that one is answered again, whole."""
    options = ("data.micro_batch=1", "data.global_batch=2")
    straight, _ = make(*options)
    expected = [responses(batch) for batch in epoch(straight)]
    data, _ = make(*options)
    sampler = Sampler(monkeypatch)
    data.load_state_dict(stopped(straight, 5))
    assert [responses(batch) for batch in epoch(data)] == expected[5:]
    assert [len(prompts) for prompts in sampler.prompts] == [2, 1]
    assert [responses(batch) for batch in epoch(data, 0)] == expected  # once resumed, that is over


def test_resumed_between_passes(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 5 of 12 is the second micro-batch of the second rollout's first pass."""
    options = ("data.micro_batch=1", "data.global_batch=2", "loss.rollout.passes=2", "data.last_step=drop")
    data, _ = make(*options)
    expected = [batch.ids for batch in epoch(data)]
    data.load_state_dict(stopped(data, 5))
    sampler = Sampler(monkeypatch)
    assert [batch.ids for batch in epoch(data)] == expected[5:]
    assert sampler.calls == 2


def test_steps_and_passes_are_at_least_one() -> None:
    for bad in ({"steps": 0}, {"passes": 0}):
        with pytest.raises(UserError, match=r"^loss\.rollout: steps and passes are at least 1$"):
            Rollout(**bad)
