"""Packing: positions, segments, predictors and targets, by hand."""

from dataclasses import replace

import pytest
import torch

from var.models.cross_scoring import unpack_sequences
from var.models.packing import Packed, Segment, pack, pack_tree


def test_a_packed_batch_by_hand():
    """[1 2 | 3 4] and [5 | 6]: 3 + 1 tokens, since a last token predicts nothing; 2 and 1 of response.

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


def test_names_and_groups_are_numbers_where_none_are_given():
    batch = pack([[1, 2], [3, 4]], [1, 1])
    assert (batch.ids, batch.group.tolist()) == (("0", "1"), [0, 1])


def test_a_tree_by_hand():
    """Prompt [1 2] with branches [3 4 5] and [6], prompt [7] with [8 9], its only one, in a segment with it.

    Tokens: 1 2, then 3 4 of the first branch (the 5 predicts nothing), nothing of the second, then 7, then 8.
    Branches go on at the prompt's length and see prompt and themselves; their first token is predicted by its last.
    """
    tree = pack_tree([[1, 2], [7]], [[[3, 4, 5], [6]], [[8, 9]]])
    assert tree.input_ids.tolist() == [1, 2, 3, 4, 7, 8]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert tree.segments == (Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 6))
    assert tree.predictor.tolist() == [1, 2, 3, 1, 4, 5]
    assert tree.target.tolist() == [3, 4, 5, 6, 8, 9]
    assert tree.sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert (tree.length.tolist(), tree.group.tolist(), tree.ids) == ([3, 1, 2], [0, 0, 1], ("0", "1", "2"))


def test_neighbours_share_their_prompt():
    """[1 2] has two answers in a row, then another one after [1 3]'s; without share=True each has its own."""
    ids, starts = [[1, 2, 3, 4, 5], [1, 2, 6], [1, 3, 7], [1, 2, 8]], [2, 2, 2, 2]
    batch = pack(ids, starts, group=[0, 0, 1, 0], share=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 1, 3, 1, 2]
    assert batch.segments == (Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 6), Segment(6, 8))
    assert (batch.group.tolist(), batch.ids, batch.tokens) == ([0, 0, 1, 0], ("0", "1", "2", "3"), 14)
    apart = pack(ids, starts)
    assert apart.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 1, 3, 1, 2]
    assert apart.tokens == 14
    for same in ("target", "sequence", "length"):
        assert getattr(apart, same).tolist() == getattr(batch, same).tolist()
    assert unpack_sequences(batch) == unpack_sequences(apart) == (ids, starts)


def test_sums_are_by_sequence():
    batch = pack([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [2, 1, 1])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = batch.sum_by_sequence(values)
    assert sums.tolist() == [3.0, 4.0, 24.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 10.0, 100.0, 100.0]


def test_to_moves_every_tensor_and_nothing_else():
    batch = pack([[1, 2, 3]], [1], weights=torch.ones(1), cross_rewards=torch.ones(1, 1))
    moved = batch.to("meta")
    tensors = [n for n in Packed.__dataclass_fields__ if isinstance(getattr(batch, n), torch.Tensor)]
    assert len(tensors) == 9
    assert all(getattr(moved, n).device.type == "meta" for n in tensors)
    assert (moved.segments, moved.ids, moved.reference_logps) == (batch.segments, batch.ids, None)
    assert batch.input_ids.device.type == "cpu"


def test_a_packed_batch_unpacks_to_its_sequences():
    ids, starts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]], [2, 1, 1]
    assert unpack_sequences(pack(ids, starts)) == (ids, starts)


def test_a_batch_is_frozen():
    batch = pack([[1, 2]], [1])
    with pytest.raises(AttributeError):
        batch.weights = torch.ones(1)  # type: ignore[misc]
    assert replace(batch, weights=torch.ones(1)).weights is not None


@pytest.mark.parametrize(("ids", "start"), [([1, 2], 0), ([1, 2], 2), ([1, 2], 3), ([1], 1)])
def test_a_sequence_without_prompt_or_response_is_an_error(ids: list[int], start: int):
    with pytest.raises(ValueError, match=f"needs a prompt and a response: {len(ids)} tokens, response from {start}"):
        pack([[1, 2, 3], ids], [1, start])


def test_a_tree_without_prompt_or_response_is_an_error():
    for prompts, responses in (([[]], [[[1]]]), ([[1]], [[[2], []]])):
        with pytest.raises(ValueError, match="need at least one token each"):
            pack_tree(prompts, responses)


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        pack([[1, 2], [3, 4]], [1])
    with pytest.raises(ValueError, match="zip"):
        pack_tree([[1], [2]], [[[3]]])
