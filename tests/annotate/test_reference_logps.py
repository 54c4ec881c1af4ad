"""Log-probabilities of the reference: each equals the model's own, and cached ones equal those of a training step."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tests.helpers.annotators import ROWS, make_micro, make_sequences, policy_is_loaded, split_tokens
from var.annotate import annotator as annotator_module
from var.annotate import rewards as rewards_module
from var.annotate.annotator import MissingAnnotations
from var.annotate.reference_logps import (
    ProvideMismatchedLogps,
    cached_cross_logps,
    cached_mismatched_logps,
    reference_logps,
)
from var.annotate.rewards import cross_rewards
from var.models.cross_scoring import cross_logps, mismatched_logps, pack_crossed, pack_mismatched
from var.models.packing import Packed, pack
from var.models.policy import Policy
from var.requirements import MismatchedLogps
from var.utils.distributed import Ranks


def test_reference_logps_equal_those_of_each_sequence_alone(make, alone):
    """They also equal the policy's own forward to the last bits: DPO's first step depends on it."""
    annotator = make()
    _, sequences = make_sequences(annotator)
    assert len(sequences) == 8
    found = reference_logps(annotator, sequences).to_pylist()
    policy = Policy(annotator.reference.pretrained.load())
    for i in range(8):
        prompt, response = split_tokens(sequences, i)
        assert len(found[i]) == len(response) == sequences.length[i]
        assert_allclose(found[i], alone.logps(prompt, response), atol=2e-5)
        with torch.no_grad():
            assert_allclose(found[i], policy(pack([prompt + response], [len(prompt)])), atol=2e-6)


def test_cross_logps_equal_those_of_every_pair_alone(make, alone):
    """[m, i, j] is log π_ref(y_j|x_i), summed. The diagonal has the own pairs. A short micro-batch is filled with 0."""
    annotator = make()
    _, sequences = make_sequences(annotator)
    for size in (8, 3):
        micro = make_micro(sequences, size)
        found = cached_cross_logps(annotator, sequences, micro)
        assert found.shape == (len(micro), size, size)
        for m, i, j in np.ndindex(found.shape):
            row, column = int(micro[m, i]), int(micro[m, j])
            if row < 0 or column < 0:
                assert found[m, i, j] == 0
                continue
            expected = alone.logps(split_tokens(sequences, row)[0], split_tokens(sequences, column)[1]).double().sum()
            assert_allclose(found[m, i, j], expected, atol=1e-4)
    assert (micro < 0).sum() == 1
    own = np.array([sum(logps) for logps in reference_logps(annotator, sequences).to_pylist()])
    micro = make_micro(sequences, 4)
    diagonal = cached_cross_logps(annotator, sequences, micro).diagonal(axis1=1, axis2=2)
    assert_allclose(diagonal, own[micro], atol=1e-4)


def test_parts_of_any_size_give_the_same_numbers(make, monkeypatch):
    """With millions of pairs, a part of them is in memory at once. Counts are of all of them."""
    whole = make()
    rows, sequences = make_sequences(whole)
    micro = make_micro(sequences, 3)
    expected = cached_cross_logps(whole, sequences, micro), cross_rewards(whole, rows, sequences, micro)
    read, written = make(), make(root=whole.cache.parent / "new")
    monkeypatch.setattr(rewards_module, "BLOCK", 20)
    monkeypatch.setattr(annotator_module, "BLOCK", 7)
    for annotator in (read, written):
        found = cached_cross_logps(annotator, sequences, micro), cross_rewards(annotator, rows, sequences, micro)
        assert_allclose(found[0], expected[0], atol=0 if annotator is read else 1e-5)  # other batches round otherwise
        assert np.array_equal(found[1], expected[1])
        counts = {title: total for title, (_, total) in annotator.missing.items()}
        assert counts == {title: total for title, (_, total) in whole.missing.items()}
    assert read.computed == {}
    assert written.computed == whole.computed
    total = whole.missing["Cross log-probabilities"][1]
    for settings, message in (
        ({"dry": True}, f"{total} of {total} pairs"),
        ({"annotate": "error"}, f"{total} of {total}"),
    ):
        empty = replace(make(root=whole.cache.parent / "empty"), **settings)
        with pytest.raises(MissingAnnotations, match=message):  # of all parts
            cached_cross_logps(empty, sequences, micro)


def test_large_matrices_are_mapped_at_the_next_start(make, monkeypatch):
    """Without looking pairs up. All ranks do so, or none: they wait for each other when they look pairs up."""
    monkeypatch.setattr(rewards_module, "KEPT", 1)
    one = make()
    rows, sequences = make_sequences(one)
    micro = make_micro(sequences, 3)
    expected = cached_cross_logps(one, sequences, micro), cross_rewards(one, rows, sequences, micro)
    two, looked = make(), list[str]()
    real = annotator_module.Annotator.fill
    monkeypatch.setattr(
        annotator_module.Annotator,
        "fill",
        lambda self, table, title, *r, **o: looked.append(title) or real(self, table, title, *r, **o),
    )
    found = cached_cross_logps(two, sequences, micro), cross_rewards(two, rows, sequences, micro)
    assert looked == []
    assert two.missing == {title: (0, count) for title, (_, count) in one.missing.items()}
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.from_numpy(found[0]).add_(1)
    assert np.array_equal(cached_cross_logps(make(), sequences, micro), expected[0])  # the file is unchanged
    three = replace(make(), ranks=Ranks(any=lambda value: True))  # another rank has no file
    assert np.array_equal(cached_cross_logps(three, sequences, micro), expected[0])
    assert looked == ["Cross log-probabilities"]
    other = make_micro(sequences, 4)  # another plan
    assert cached_cross_logps(make(), sequences, other).shape == (len(other), 4, 4)
    assert len(looked) == 2


def test_large_micro_batches_serve_smaller_ones_of_the_same_plan(make):
    """From 8×8 numbers, 4×4 and 2×2 ones are read as the blocks on the diagonal. The model is not even loaded."""
    one = make()
    rows, sequences = make_sequences(one)
    micro = make_micro(sequences, 8)
    logps, rewards = cached_cross_logps(one, sequences, micro)[0], cross_rewards(one, rows, sequences, micro)[0]
    for size in (4, 2):
        two, micro = make(), make_micro(sequences, size)
        for m in range(8 // size):
            block = slice(m * size, (m + 1) * size)
            assert np.array_equal(cached_cross_logps(two, sequences, micro)[m], logps[block, block])
            assert np.array_equal(cross_rewards(two, rows, sequences, micro)[m], rewards[block, block])
        assert two.computed == {}
        assert not policy_is_loaded(two)


def test_mismatched_logps_are_those_of_the_next_response(make, alone):
    """[m, b] is log π_ref(y_{b+1}|x_b), and the last prompt takes the first response.

    A short micro-batch does so among its sequences and is filled with 0. Pairs that cross_logps cached are read.
    """
    annotator = make()
    _, sequences = make_sequences(annotator)
    micro = make_micro(sequences, 3)
    found = cached_mismatched_logps(annotator, sequences, micro)
    assert (found.shape, found.dtype) == ((3, 3), torch.float64)
    assert (micro[:2] >= 0).all()
    assert micro[2, 2] == -1
    for members, row in zip(micro, found, strict=True):
        members = members[members >= 0]
        for b, member in enumerate(members):
            following = members[(b + 1) % len(members)]
            expected = alone.logps(split_tokens(sequences, member)[0], split_tokens(sequences, following)[1]).sum()
            assert_allclose(row[b], expected, atol=1e-4)
    assert found[2, 2] == 0
    assert annotator.computed == {"Cross log-probabilities": 8}
    cached_cross_logps(annotator, sequences, micro)
    assert torch.equal(cached_mismatched_logps(make(annotate="error"), sequences, micro), found)


def test_training_step_sums_long_responses_as_precisely_as_the_cache(make):
    """Responses of 900 tokens have about −6,000 nats, which a sum in float32 misses by some thousandths."""
    annotator = make()
    rows = [replace(row, responses=(replace(row.responses[0], text="abcdefghi" * 100),)) for row in ROWS[:3]]
    _, sequences = make_sequences(annotator, tuple(rows), max_length=1024)
    micro = np.array([[0, 1, 2]])
    ids, starts, _ = zip(*map(sequences.tokens, range(3)), strict=True)
    policy, data = annotator.reference.policy, SimpleNamespace(sequences=sequences)
    provider = ProvideMismatchedLogps(MismatchedLogps())
    provider.logps = cached_mismatched_logps(annotator, sequences, micro)
    fields = provider.batch_fields(data, 0, np.arange(3))  # type: ignore[arg-type]
    crossed, cached = pack_crossed(ids, starts), fields["mismatched_reference_logps"]
    with torch.no_grad():
        cross, mismatched = cross_logps(policy, crossed), mismatched_logps(policy, fields["mismatched"])
    assert_allclose(cross, cached_cross_logps(annotator, sequences, micro)[0], rtol=0, atol=2e-4)
    assert_allclose(mismatched, cached, rtol=0, atol=2e-4)
    assert mismatched.dtype == cached.dtype == torch.float64

    def constant(packed: Packed) -> torch.Tensor:
        return torch.full(packed.target.shape, -2.1, dtype=torch.float32)

    expected = pack(ids, starts).length * torch.tensor(-2.1, dtype=torch.float32).double()
    assert_allclose(cross_logps(constant, crossed), expected.expand(3, 3), rtol=1e-12)
    assert_allclose(mismatched_logps(constant, pack_mismatched(ids, starts)), expected.roll(-1), rtol=1e-12)


def test_prompts_count_towards_the_tokens_of_a_pass(make, tmp_path, monkeypatch):
    """Eight prompts of 20 tokens are not packed together because their responses are short."""
    annotator = make()
    _, sequences = make_sequences(annotator)
    micro = make_micro(sequences, 4)
    monkeypatch.setattr(annotator_module, "TOKENS", 80)
    widths: list[int] = []
    forward = Policy.forward

    def record_width(self: Policy, batch: Packed) -> torch.Tensor:
        widths.append(len(batch.input_ids))
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", record_width)
    found = cached_cross_logps(annotator, sequences, micro)
    assert max(widths) <= 80 + max(sequences.start)  # a prompt that continues from the last pass is packed again
    monkeypatch.undo()
    assert_allclose(found, cached_cross_logps(make(root=tmp_path / "other"), sequences, micro), atol=1e-4)
