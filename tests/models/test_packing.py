"""Packing: positions, segments, predictors and targets, by hand."""

import sys
from dataclasses import replace
from subprocess import run

import pytest
import torch

from tests.helpers.packing import unpack_sequences
from var.models.packing import Packed, Segment, pack, pack_tree, whole


def test_pack_by_hand():
    """[1 2 | 3 4] and [5 | 6] are 3 + 1 tokens, because a last token predicts nothing, with 2 and 1 response tokens.

    The response token 3 is predicted at token 1 (the prompt's last), 4 at token 2, and 6 at token 3.
    """
    batch = pack([[1, 2, 3, 4], [5, 6]], [2, 1], names=["a", "b"], group=[1, 0], global_tokens=9.0)
    assert batch.input_ids.tolist() == [1, 2, 3, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.segments == (Segment(0, 3), Segment(3, 4))
    assert batch.predictor.tolist() == [1, 2, 3]
    assert batch.target.tolist() == [3, 4, 6]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert (batch.length.tolist(), batch.group.tolist(), batch.ids) == ([2, 1], [1, 0], ("a", "b"))
    assert (len(batch), batch.global_tokens, batch.global_sequences, batch.weights) == (2, 9.0, 1.0, None)
    plain = pack([[1, 2], [3, 4]], [1, 1])
    assert (plain.ids, plain.group.tolist()) == (("0", "1"), [0, 1])


def test_pack_tree_by_hand():
    """Prompt [1 2] has branches [3 4 5] and [6]; prompt [7] has only [8 9], which is in one segment with it.

    The tokens are 1 2, then 3 4 of the first branch (5 predicts nothing), nothing of the second, then 7, then 8. The
    first token of a branch is predicted by the last of its prompt.
    """
    tree = pack_tree([[1, 2], [7]], [[[3, 4, 5], [6]], [[8, 9]]])
    assert tree.input_ids.tolist() == [1, 2, 3, 4, 7, 8]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert tree.segments == (Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 6))
    assert tree.predictor.tolist() == [1, 2, 3, 1, 4, 5]
    assert tree.target.tolist() == [3, 4, 5, 6, 8, 9]
    assert tree.sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert (tree.length.tolist(), tree.group.tolist(), tree.ids) == ([3, 1, 2], [0, 0, 1], ("0", "1", "2"))


def test_consecutive_sequences_share_their_prompt():
    """[1 2] has two answers in a row, and another one after the answer to [1 3]."""
    ids, starts = [[1, 2, 3, 4, 5], [1, 2, 6], [1, 3, 7], [1, 2, 8]], [2, 2, 2, 2]
    shared = pack(ids, starts, group=[0, 0, 1, 0], share=True)
    assert shared.input_ids.tolist() == [1, 2, 3, 4, 1, 3, 1, 2]
    assert shared.segments == (Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 6), Segment(6, 8))
    assert (shared.group.tolist(), shared.ids) == ([0, 0, 1, 0], ("0", "1", "2", "3"))
    plain = pack(ids, starts)
    assert plain.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 1, 3, 1, 2]
    assert plain.tokens == shared.tokens == 14
    for name in ("target", "sequence", "length"):
        assert getattr(plain, name).tolist() == getattr(shared, name).tolist()
    assert unpack_sequences(shared) == unpack_sequences(plain) == (ids, starts)


def test_complete_sequences_by_hand():
    batch = whole([[5, 6], [7]])
    assert (batch.input_ids.tolist(), batch.position_ids.tolist()) == ([5, 6, 7], [0, 1, 0])
    assert [tuple(s)[:2] for s in batch.segments] == [(0, 2), (2, 3)]
    assert (len(batch), len(batch.target)) == (2, 0)


def test_sum_by_sequence_and_its_gradient():
    batch = pack([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [2, 1, 1])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = batch.sum_by_sequence(values)
    assert sums.tolist() == [3.0, 4.0, 24.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 10.0, 100.0, 100.0]


def test_to_moves_all_tensors_and_nothing_else():
    batch = pack([[1, 2, 3]], [1], weights=torch.ones(1), cross_rewards=torch.ones(1, 1))
    moved = batch.to("meta")
    tensors = [n for n in Packed.__dataclass_fields__ if isinstance(getattr(batch, n), torch.Tensor)]
    assert len(tensors) == 9
    assert all(getattr(moved, n).device.type == "meta" for n in tensors)
    assert (moved.segments, moved.ids, moved.reference_logps) == (batch.segments, batch.ids, None)
    assert batch.input_ids.device.type == "cpu"


def test_unpacking_returns_the_packed_sequences():
    ids, starts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]], [2, 1, 1]
    assert unpack_sequences(pack(ids, starts)) == (ids, starts)


def test_packed_is_frozen():
    batch = pack([[1, 2]], [1])
    with pytest.raises(AttributeError):
        batch.weights = torch.ones(1)  # type: ignore[misc]
    assert replace(batch, weights=torch.ones(1)).weights is not None


@pytest.mark.parametrize(("ids", "start"), [([1, 2], 0), ([1, 2], 2), ([1, 2], 3), ([1], 1)])
def test_sequence_needs_prompt_and_response(ids: list[int], start: int):
    with pytest.raises(ValueError, match=f"needs a prompt and a response: {len(ids)} tokens, response from {start}"):
        pack([[1, 2, 3], ids], [1, start])


def test_tree_needs_prompts_and_responses():
    for prompts, responses in (([[]], [[[1]]]), ([[1]], [[[2], []]])):
        with pytest.raises(ValueError, match="need at least one token each"):
            pack_tree(prompts, responses)


def test_lists_of_different_lengths_raise():
    with pytest.raises(ValueError, match="zip"):
        pack([[1, 2], [3, 4]], [1])
    with pytest.raises(ValueError, match="zip"):
        pack_tree([[1], [2]], [[[3]]])


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("var.models.packing", ["transformers", "lightning"]), ("var.models.lora", ["torch", "transformers"]),
        ("var.sampling.base", ["torch", "transformers"]),
    ],
)  # fmt: skip
def test_light_modules_do_not_import_heavy_libraries(module: str, heavy: list[str]):
    code = f"import sys, {module}; sys.exit(str([name for name in {heavy} if name in sys.modules] or ''))"
    assert run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_sums_over_many_tokens_are_accurate_in_float32():
    """4,000 tokens of −1.1 nats. Added up one by one in float32, the sum would be off by hundredths of a nat."""
    batch = pack([[0, *[1] * 4000]], [1])
    values = torch.full((4000,), -1.1)
    assert batch.sum_by_sequence(values).tolist() == [pytest.approx(float(values[0]) * 4000, rel=6e-8)]
    assert batch.sum_by_sequence(values).dtype == torch.float32
