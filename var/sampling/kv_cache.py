"""The keys and values of earlier tokens while a model samples, and how many rows of them a device's memory holds."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

MARGIN = 0.9  # fraction of the free memory to use; activations need the rest
LOGIT_BYTES = 48  # per row and token of the vocabulary: logits in float32; probabilities, sorted, and sums in float64


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in tensors of the final length, so that a new token does not copy earlier ones.

    `keys` and `values` are views of the part that is filled. Before `reserve`, the layer grows as transformers' does.
    """

    _full: tuple[Tensor, Tensor] | None = None

    def reserve(self, copies: int, new: int) -> None:
        """Repeat each row `copies` times, and make room for `new` more tokens."""
        assert self.keys is not None
        assert self.values is not None
        rows, heads, length, _ = self.keys.shape

        def extend(part: Tensor) -> Tensor:
            full = part.new_empty(rows * copies, heads, length + new, part.shape[-1])
            full.unflatten(0, (rows, copies))[..., :length, :] = part[:, None]
            return full

        self._set((extend(self.keys), extend(self.values)), length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and return all."""
        if self._full is None:
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.get_seq_length()
        stop = length + key_states.shape[-2]
        for full, new in zip(self._full, (key_states, value_states), strict=True):
            full[:, :, length:stop] = new
        return self._set(self._full, stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`."""
        assert self._full is not None
        keys, values = (full.index_select(0, indices) for full in self._full)
        self._set((keys, values), self.get_seq_length())

    def _set(self, full: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
        keys, values = full
        self._full, self.keys, self.values = full, keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values


def make_cache() -> Cache:
    """Return an empty cache whose layers can reserve their memory."""
    return Cache(layer_class_to_replicate=ReservedLayer)


def reserve(cache: Cache, copies: int, new: int) -> None:
    """Repeat each row of the cache `copies` times, and make room for `new` more tokens."""
    for layer in cache.layers:
        assert isinstance(layer, ReservedLayer)
        layer.reserve(copies, new)


def count_rows(config: Any, item: int, length: int, memory: float) -> int:
    """Return how many rows of `length` tokens can be sampled together in `memory` bytes.

    A row needs a key and a value per layer, of `item` bytes per number, and its logits.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    numbers = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    return int(memory * MARGIN / (numbers * item * length + LOGIT_BYTES * config.vocab_size))


def free_memory(device: torch.device) -> float:
    """Return the bytes of a CUDA device that torch can still allocate; infinity for other devices."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)
