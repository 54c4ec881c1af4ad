"""Rollouts: sampled responses train unchanged, with the divisors, log-probabilities and seeds of their own step."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.packing import unpack_sequences
from tests.helpers.runs import composed, write_lines
from var.models.packing import Packed
from var.requirements import Rollout
from var.training import module as module_module
from var.training.datamodule import AlignmentData
from var.training.module import AlignmentModule
from var.training.rollout import RolloutLoader
from var.training.run import Run
from var.utils.distributed import Ranks
from var.utils.errors import UserError

END = 257
BYTE = 187  # 0xff
PROMPTS = 7
ONE_PROMPT = ("data.micro_batch=1", "data.global_batch=2")
TWO_PASSES = (*ONE_PROMPT, "loss.rollout.passes=2", "data.last_step=drop")


class Telling:
    """A reward that differs by prompt, response and answer."""

    scores_text = True
    fingerprint = {"program": "telling"}  # noqa: RUF012

    def __call__(self, prompts: Any, responses: Any, answers: Any) -> list[float]:
        return [self.of(p[-1]["content"], r, a) for p, r, a in zip(prompts, responses, answers, strict=True)]

    @staticmethod
    def of(prompt: str, response: str, answer: str | None) -> float:
        return 100.0 * len(prompt) + len(set(response)) + float(answer or 0) / 16


Made = tuple[AlignmentData, AlignmentModule]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Made]:
    """Return a function that makes the data and the module of an online run.

    It has seven prompts of different lengths, with two responses each.
    """
    records = [{"id": f"r{i}", "prompt": "?" * (i + 1), "answer": str(i)} for i in range(PROMPTS)]
    path = write_lines(tmp_path / "rows.jsonl", records)

    def make_run(*overrides: str) -> Made:
        options = [
            "data=files", f"data.path={path}", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store",
            f"cache={tmp_path}/cache", "data.validation_prompts=0", "data.last_micro_batch=keep",
            "data.micro_batch=2", "data.global_batch=4", "trainer.accelerator=cpu", "generate.responses=2",
            "generate.max_new_tokens=5", "loss=grpo", *overrides,
        ]  # fmt: skip
        run = Run.compose(composed(*options), tmp_path)
        run.annotator.reward = Telling()
        run.data.prepare()
        module = run.module()
        run.data.trainer = SimpleNamespace(lightning_module=module, current_epoch=0, world_size=1)  # type: ignore[assignment]
        return run.data, module

    return make_run


class Sampler:
    """Wraps sample_tokens. Records each call's seed and prompts, and the responses; these can also be given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, given: list[list[int]] | None = None) -> None:
        self.seeds: list[int] = []
        self.prompts: list[list[list[int]]] = []
        self.out: list[list[list[int]]] = []
        real = module_module.sample_tokens

        def sample_tokens(model: Any, chat: Any, encoded: Any, sampling: Any, advance: Any) -> Any:
            self.seeds.append(sampling.seed)
            self.prompts.append(encoded)
            out = real(model, chat, encoded, sampling, advance) if given is None else [given] * len(encoded)
            self.out += out
            return out

        monkeypatch.setattr(module_module, "sample_tokens", sample_tokens)


def make_loader(made: Made, ranks: Ranks | None = None) -> RolloutLoader:
    data, module = made
    assert data.rollout is not None
    return RolloutLoader(data.training_set, data.providers, data.rollout, module, data.position, ranks or Ranks())


def epoch(made: Made, number: int = 0, ranks: Ranks | None = None) -> list[Packed]:
    """Return the micro-batches of an epoch."""
    made[0].trainer.current_epoch = number  # type: ignore[union-attr]
    return list(make_loader(made, ranks))


def responses(batch: Packed) -> list[list[int]]:
    ids, starts = unpack_sequences(batch)
    return [row[start:] for row, start in zip(ids, starts, strict=True)]


def steps(batches: list[Packed]) -> Iterator[list[Packed]]:
    """Yield the two micro-batches of each optimizer step."""
    for at in range(0, len(batches), 2):
        yield batches[at : at + 2]


def scale_weights(module: AlignmentModule) -> None:
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.1)


# --- what trains


def test_tokens_are_those_that_were_sampled(make, monkeypatch):
    """A byte that is not text and a special token would not survive decoding and encoding.

    A finished response has the end token; an empty one consists of it.
    """
    made = make("generate.responses=3")
    tokenizer = made[0].annotator.chat.tokenizer
    assert tokenizer(tokenizer.decode([BYTE]), add_special_tokens=False)["input_ids"] != [BYTE]
    expected = [[BYTE, 258, 65, END], [END], [65, 66, 67, 68, 69]]
    Sampler(monkeypatch, expected)
    batches = epoch(made)
    for batch in batches:
        assert responses(batch) == expected * (len(batch) // 3)
        assert batch.length.tolist() == [4, 1, 5] * (len(batch) // 3)
    assert sum(len(batch) for batch in batches) == 3 * PROMPTS


def test_names_groups_rewards_and_tokens_match_their_prompts(make, monkeypatch):
    made, seen = make(), list[str]()
    chat, sampler = made[0].annotator.chat, Sampler(monkeypatch)
    for batch in (batches := epoch(made)):
        ids, starts = unpack_sequences(batch)
        assert batch.group.tolist() == [0, 0, 1, 1][: len(batch)]
        assert batch.rewards is not None
        for row, start, name, reward in zip(ids, starts, batch.ids, batch.rewards.tolist(), strict=True):
            prompt, answer = "?" * (int(name[1:]) + 1), name[1:]
            assert row[:start] == chat.prompt([{"role": "user", "content": prompt}])
            assert reward == Telling.of(prompt, chat.decode(row[start:]), answer)
            seen.append(name)
    assert sorted(seen) == sorted(f"r{i}" for i in range(PROMPTS) for _ in range(2))
    trained = [response for batch in batches for response in responses(batch)]
    assert trained == [tokens for several in sampler.out for tokens in several]


def test_rewards_are_on_the_scale_of_the_run(make):
    batch = epoch(make("reward_scale=sigmoid"))[0]
    assert batch.rewards is not None
    assert batch.rewards.tolist() == [1.0] * 4  # σ of more than a hundred


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.0, math.nan] * 4, r"^the reward of a sampled response is nan, and must be finite: 'B'$"),
        ([1.0], r"^the reward \(Telling\) returned 1 numbers for 8 responses"),
    ],
)
def test_nonfinite_or_missing_reward_is_an_error(make, monkeypatch, returned, message):
    made = make()
    a, b = made[0].annotator.chat.tokenizer("AB", add_special_tokens=False)["input_ids"]
    Sampler(monkeypatch, [[a, END], [b, END]])
    monkeypatch.setattr(Telling, "__call__", lambda *_: returned)
    with pytest.raises(UserError, match=message):
        epoch(made)


# --- divisors


@pytest.mark.parametrize(("options", "prompts"), [([], [4, 3]), ([*ONE_PROMPT, "loss.rollout.steps=3"], [2, 2, 2, 1])])
def test_divisors_count_the_complete_step(make, options, prompts):
    """Of seven prompts, steps of four leave three in the second one. A longer rollout has the divisors of each step."""
    for step, count in zip(steps(epoch(make(*options))), map(float, prompts), strict=True):
        assert sum(len(batch) for batch in step) == 2 * count
        tokens = float(sum(len(batch.target) for batch in step))
        for batch in step:
            assert (batch.global_tokens, batch.global_sequences, batch.global_groups) == (tokens, 2 * count, count)


def test_padding_batch_counts_for_nothing_on_two_ranks(make, monkeypatch):
    """Seven prompts, one per micro-batch. In the last step the second rank repeats the first rank's prompt."""
    made = make(*ONE_PROMPT)
    counted: list[float] = []  # by each rank, step by step
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counted.extend(counts.tolist()))
    one = epoch(made, ranks=Ranks(0, 2))
    recorded, made[1]._sums = made[1]._sums, {}
    two = epoch(made, ranks=Ranks(1, 2))
    assert len(one) == len(two) == 4
    assert one[3].ids == two[3].ids
    for batch in (*one, *two[:3]):
        assert not batch.padding
        assert batch.global_tokens == len(batch.target)
        assert (batch.global_sequences, batch.global_groups) in ((4.0, 2.0), (2.0, 1.0))
    assert two[3].padding
    assert counted == [float(len(batch.target)) for batch in (*one, *two[:3])] + [0.0]
    assert recorded["rollout/reward"][1] == 8
    for name in ("rollout/reward", "rollout/length", "rollout/truncated"):
        assert made[1]._sums[name][1] == 6, name


def test_tokens_of_a_step_are_summed_over_ranks(make, monkeypatch):
    """The other rank has 1000 tokens in each step."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(1000))
    for batch in epoch(make(*ONE_PROMPT), ranks=Ranks(0, 2)):
        assert batch.global_tokens == len(batch.target) + 1000


# --- what the loss requires


@pytest.mark.parametrize(
    ("more", "kept"),
    [([], False), (["loss.rollout.steps=2"], True), (["loss.rollout.passes=2", "data.last_step=drop"], True)],
)
def test_old_logps_are_kept_if_the_policy_moves(make, more, kept):
    """They are the sampling policy's. If each rollout trains once and at once, they are the policy's own and absent.

    Here the policy changes after each micro-batch.
    """
    made = make(*more)
    module = made[1]
    scale_weights(module)  # no longer the reference
    sampling = {name: value.clone() for name, value in module.policy.state_dict().items()}
    batches = []
    for batch in make_loader(made):
        scale_weights(module)
        batches.append(batch)
        if len(batches) == 4:
            break
    assert all((batch.old_logps is not None) == kept for batch in batches)
    if kept:
        module.policy.load_state_dict(sampling)
        for batch in batches:
            with torch.no_grad():
                assert_close(batch.old_logps, module.policy(batch))


def test_old_values_are_kept_with_old_logps(make):
    made = make("loss=ppo", "loss.rollout.steps=2")
    policy: Any = made[1].policy
    torch.nn.init.normal_(policy.head.weight)
    batch = epoch(made)[0]
    with torch.no_grad():
        logps, values = policy(batch)
    assert_close((batch.old_logps, batch.old_values), (logps, values))
    assert values.std() > 0


def test_reference_logps_are_those_of_the_reference(make):
    """They are not those of the policy, which has moved. With β = 0 they are absent."""
    made = make()
    scale_weights(made[1])
    batch = epoch(made)[0]
    with torch.no_grad():
        assert_close(batch.reference_logps, made[0].annotator.reference.policy(batch))
    assert epoch(make("loss.beta=0"))[0].reference_logps is None


# --- when a rollout is sampled


def test_passes_repeat_the_same_batches(make, monkeypatch):
    """Without the short step there are three steps of two micro-batches, each trained on twice."""
    made = make(*TWO_PASSES)
    sampler = Sampler(monkeypatch)
    batches = epoch(made)
    assert len(batches) == len(make_loader(made)) == 12
    assert len(sampler.seeds) == 3
    for at in range(0, 12, 4):
        a, b, c, d = batches[at : at + 4]
        assert a is c
        assert b is d
        assert a is not b


def test_several_steps_are_sampled_at_once(make, monkeypatch):
    """There are four steps, three of them in the first rollout."""
    made = make(*ONE_PROMPT, "loss.rollout.steps=3")
    sampler = Sampler(monkeypatch)
    assert len(epoch(made)) == 7
    assert [len(prompts) for prompts in sampler.prompts] == [6, 1]


def test_nothing_is_sampled_before_it_is_needed(make, monkeypatch):
    """The next step has another policy."""
    sampler = Sampler(monkeypatch)
    loader = iter(make_loader(make()))
    next(loader), next(loader)
    assert len(sampler.seeds) == 1
    next(loader)
    assert len(sampler.seeds) == 2


def test_seeds_differ_by_step_and_epoch_and_repeat_with_the_run(make, monkeypatch):
    sampler = Sampler(monkeypatch)
    made = make("data.global_batch=2")
    first, second = epoch(made), epoch(made, 1)
    assert len(set(sampler.seeds)) == len(sampler.seeds) == 8
    by_name = [{b.ids[0]: responses(b) for b in batches} for batches in (first, second)]
    assert any(by_name[0][name] != by_name[1][name] for name in by_name[0].keys() & by_name[1].keys())
    expected = [responses(b) for b in first]
    assert [responses(b) for b in epoch(make("data.global_batch=2"))] == expected
    assert [responses(b) for b in epoch(make("data.global_batch=2", "generate.seed=1", "data.seed=0"))] != expected


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_seed_of_a_step_does_not_depend_on_micro_batches_or_ranks(make, monkeypatch, micro):
    sampler = Sampler(monkeypatch)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts)
    made = make(f"data.micro_batch={micro}")
    epoch(made), epoch(made, 1)
    assert sampler.seeds == [0, 1, 2, 3]
    if micro < 4:
        epoch(made, 1, Ranks(1, 2))
        assert sampler.seeds == [0, 1, 2, 3, 2, 3]


def resume(made: Made, position: int) -> None:
    """Resume a run of one process after this many micro-batches of the first epoch."""
    data = made[0]
    weights = data.annotator.reference.pretrained.weights
    plan = data.training_set.plan.hash
    data.load_state_dict({"plan": plan, "weights": weights, "epoch": 0, "position": position, "ranks": 1})


@pytest.mark.parametrize(("options", "sampled"), [(ONE_PROMPT, [2, 1]), (TWO_PASSES, [2, 2])])
def test_resumed_epoch_samples_only_unfinished_rollouts(make, monkeypatch, options, sampled):
    """Position 5 is within the third of four rollouts of two micro-batches, which is sampled completely again.

    With two passes it is within the first pass of the second of three rollouts.
    """
    expected = [responses(batch) for batch in epoch(make(*options))]
    made = make(*options)
    sampler = Sampler(monkeypatch)
    resume(made, 5)
    assert [responses(batch) for batch in epoch(made)] == expected[5:]
    assert [len(prompts) for prompts in sampler.prompts] == sampled
    assert [responses(batch) for batch in epoch(made)] == expected  # the next epoch starts at its beginning


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"passes": 0}])
def test_rollout_needs_a_step_and_a_pass(wrong):
    with pytest.raises(UserError, match=r"^loss\.rollout: steps and passes must be at least 1$"):
        Rollout(**wrong)
