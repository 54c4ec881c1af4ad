"""Frozen models under autocast hold their linear weights in the dtype in which they compute."""

from pathlib import Path

import torch

from notebooks.tiny import byte_tokenizer
from tests.helpers.models import pretrained, saved, tiny_model
from var.data.chat import Chat
from var.models.frozen import FrozenModel, cast_linear_weights
from var.models.packing import pack, pack_tree
from var.models.policy import Policy
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens

BATCHES = [pack([[5, 6, 7, 1, 2], [8, 9, 10]], [3, 1]), pack_tree([[5, 6, 7]], [[[1, 2, 3, 4], [9]]])]
SAMPLING = Sampling(responses=3, temperature=1.0, top_p=0.9, max_new_tokens=16, batch=6, batch_tokens=4096, seed=0)


@torch.no_grad()
def test_cast_weights_change_no_bit_under_autocast():
    """Log-probabilities and samples, with biases, and with a head of its own."""
    chat = Chat(byte_tokenizer())
    for options in ({}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}):
        plain, cast = (tiny_model(**options) for _ in range(2))
        cast_linear_weights(cast, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            for batch in BATCHES:
                assert torch.equal(Policy(plain)(batch), Policy(cast)(batch))
            one, other = (sample_tokens(model, chat, [[1, 2, 3], [4, 5]], SAMPLING) for model in (plain, cast))
        assert one == other


def test_only_linear_layers_of_the_base_model_are_cast():
    model = tiny_model(tie_word_embeddings=False, attention_bias=True)
    cast_linear_weights(model, torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    norms = {name for name in kept if "norm" in name}
    assert len(norms) == 5  # two per layer and the last one
    assert kept - norms == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}


def test_frozen_model_is_cast_only_under_autocast(tmp_path: Path):
    files = pretrained(saved(tmp_path / "model"), tmp_path)
    dtypes = [
        FrozenModel(files, "cpu", autocast).policy.model.model.layers[0].mlp.up_proj.weight.dtype
        for autocast in (None, torch.bfloat16)
    ]
    assert dtypes == [torch.float32, torch.bfloat16]
