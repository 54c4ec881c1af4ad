"""The pretend device itself: it rejects CPU tensors, records synchronizations, and computes as the CPU does."""

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from tests.helpers.models import tiny_model
from tests.helpers.pretend import DEVICE, DeviceTensor, Pretend, syncs, to_host
from var.models.packing import pack
from var.models.policy import Policy


def test_cpu_tensor_that_meets_a_device_tensor_is_an_error():
    with Pretend():
        x = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"aten::mul: a CPU tensor \(3,\) torch.float32 meets one on pretend:0"):
            x * torch.ones(3)
        with pytest.raises(RuntimeError, match="a CPU generator for a tensor on pretend:0"):
            torch.randn(3, device=DEVICE, generator=torch.Generator())
        assert to_host(x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # CUDA takes a CPU scalar as an argument


def test_synchronizations_are_recorded_with_their_line():
    with Pretend():
        x = torch.ones(3).to(DEVICE, non_blocking=True)
        torch.full((), 1.0, device=DEVICE), x[:2], x.split([1, 2]), torch.where(x > 0, x, 0.0)
        x.repeat_interleave(2), x.masked_fill(x > 0, 1.0)
        assert not syncs
        reads = [
            lambda: float(x[0]), lambda: x.tolist(), lambda: x.cpu(), lambda: bool((x > 0).any()), lambda: x[x > 0],
            lambda: x.long().bincount(), lambda: x[[0, 1]], lambda: torch.tensor([1.0], device=DEVICE),
            lambda: torch.ones(3).to(DEVICE), lambda: torch.as_tensor(1.0).to(x), lambda: x.unique(),
            lambda: torch.where(x > 0, x, torch.tensor(0.0)), lambda: x.repeat_interleave(x.long()),
            lambda: x.nonzero(),
        ]  # fmt: skip
        for read in reads:
            syncs.clear()
            read()
            assert len(syncs) == 1, syncs
            line = read.__code__.co_firstlineno
            assert f" at tests/pretend/test_device.py:{line}" in syncs[0]


@pytest.mark.parametrize("attention", ["packed", "varlen"])
def test_log_probabilities_and_gradients_equal_those_of_the_cpu(attention):
    """Sequences that share a prompt are branches of it with `packed`, and repeat it with `varlen`."""
    batch = pack([[1, 2, 3, 4], [1, 2, 5, 6, 7], [9, 3, 4]], [2, 2, 1], share=True)
    host, model = Policy(tiny_model()), tiny_model(attention=attention)
    expected = host(batch)
    expected.sum().backward()
    with Pretend():
        policy = Policy(model).to(DEVICE)
        assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
        found = policy(batch.to(DEVICE))
        found.sum().backward()
    assert_close(to_host(found.detach()), expected.detach(), rtol=0, atol=2e-6)
    for one, other in zip(policy.parameters(), host.parameters(), strict=True):
        assert isinstance(one, DeviceTensor)
        assert one.grad is not None
        assert_close(to_host(one.grad), other.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [-1, 1])
def test_emulated_varlen_attention_equals_sdpa(window):
    """Grouped heads, sequences of 5 and 2 tokens, with and without a sliding window."""
    torch.manual_seed(0)
    values = [torch.randn(7, heads, 8) for heads in (4, 2, 2)]
    host = [t.clone().requires_grad_() for t in values]
    parts = []
    for q, k, v in zip(*(t.split([5, 2]) for t in host), strict=True):
        at = torch.arange(len(q))
        mask = (at[:, None] >= at) & ((at[:, None] - at <= window) | (window < 0))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    expected, upstream = torch.cat(parts), torch.randn(7, 4, 8)
    expected.backward(upstream)
    with Pretend():
        device = [DeviceTensor(t.clone()).requires_grad_() for t in values]
        ends = torch.tensor([0, 5, 7], dtype=torch.int32, device=DEVICE)
        out = varlen_attn(*device, ends, ends, 5, 5, window_size=(window, 0), enable_gqa=True)
        out.backward(DeviceTensor(upstream))
        with pytest.raises(RuntimeError, match="must have one dtype"):
            varlen_attn(device[0].bfloat16(), *device[1:], ends, ends, 5, 5, window_size=(-1, 0), enable_gqa=True)
    assert_close(to_host(out.detach()), expected.detach())
    for one, other in zip(device, host, strict=True):
        assert_close(to_host(one.grad), other.grad)
