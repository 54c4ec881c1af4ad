"""The dtypes that attention and the head see under autocast, on the CPU: the pretend device does not perform it."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AttentionInterface

from tests.helpers.models import tiny_model
from var.models import attention
from var.models.packing import pack
from var.models.policy import Policy
from var.models.value_head import ActorCritic

BATCH = pack([[1, 2, 3, 4], [1, 2, 5, 6, 7], [9, 3, 4]], [2, 2, 1])
BF16 = torch.bfloat16


def autocast() -> Any:
    """Return the context of a training step with bf16-mixed."""
    return torch.autocast("cpu", dtype=BF16)


@pytest.fixture
def varlen_dtypes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[torch.dtype, ...]]:
    """Replace the kernel of varlen attention, which a CPU does not have; return the dtypes of its q, k and v."""
    seen: set[tuple[torch.dtype, ...]] = set()

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.add((q.dtype, k.dtype, v.dtype))
        return torch.zeros_like(q)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    return seen


def test_varlen_attention_gets_one_dtype_under_autocast(varlen_dtypes):
    """The kernel takes no other. The rotary embedding returns q and k in float32, and v's projection is bf16."""
    with autocast():
        Policy(tiny_model(attention="varlen"))(BATCH)
    assert varlen_dtypes == {(BF16, BF16, BF16)}


def test_packed_attention_multiplies_in_bf16_under_autocast(monkeypatch):
    """Autocast casts the arguments of sdpa itself. Without it they stay in float32."""
    seen: set[tuple[torch.dtype, ...]] = set()

    def packed(module: Any, *tensors: Any, **options: Any) -> Any:
        out = attention.packed_attention(module, *tensors, **options)
        seen.add((tensors[2].dtype, out[0].dtype))
        return out

    policy = Policy(tiny_model())
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", packed)
    policy(BATCH)
    assert seen == {(torch.float32, torch.float32)}
    seen.clear()
    with autocast():
        policy(BATCH)
    assert seen == {(BF16, BF16)}


def test_head_and_value_head_compute_in_float32_under_autocast():
    """Log-probabilities equal those of a head in float64 on the same hidden states; a head in bf16 is off by 0.01."""
    model = tiny_model()
    policy, states = ActorCritic(Policy(model)), []
    torch.nn.init.normal_(policy.head.weight)
    model.base_model.register_forward_hook(lambda *arguments: states.append(arguments[-1].last_hidden_state))
    with autocast():
        logps, values = policy(BATCH)
    hidden = states[0][0, BATCH.predictor].double()
    table = (hidden @ model.lm_head.weight.double().T).log_softmax(-1)
    assert logps.dtype == values.dtype == torch.float32
    assert_close(logps.double(), table.gather(1, BATCH.target[:, None])[:, 0], rtol=0, atol=1e-5)
    assert_close(values.double(), (hidden @ policy.head.weight.double().T)[:, 0], rtol=0, atol=1e-5)
