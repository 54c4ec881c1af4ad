"""Attention kernels: `varlen` on an emulated kernel, and which kernel each call of packed attention can reach."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from tests.helpers.models import decoder, pretrained, tiny_model
from var.models import attention
from var.models.frozen import FrozenModel
from var.models.packing import Packed, pack, pack_tree, whole
from var.models.policy import Policy
from var.models.reward_model import RewardModel

IDS, STARTS = [[5, 6, 7, 1, 2, 3, 4], [8, 9, 10], [11, 12, 2, 2, 30]], [3, 1, 2]
BATCHES = [pack(IDS, STARTS), pack_tree([[5, 6, 7], [8]], [[[1, 2, 3, 4], [9], [2, 2]], [[4, 4, 4]]])]
dtypes: list[torch.dtype] = []


def varlen_of_torch_2_11(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, q_max: int, k_max: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Emulate torch's kernel: sequence by sequence, causal, in float32, and with an error for mixed dtypes."""
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert window_size == (-1, 0)
    assert max(q_bounds.diff()) == q_max == k_max
    dtypes.append(q.dtype)
    parts = zip(*(t.transpose(0, 1).float().split(q_bounds.diff().tolist(), 1) for t in (q, k, v)), strict=True)
    out = [scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in parts]
    return torch.cat(out, 1).transpose(0, 1).to(q.dtype)


def varlen_of_torch_2_12(
    q: Tensor, k: Tensor, v: Tensor, *bounds: Any, enable_gqa: bool = False, **options: Any
) -> Any:
    """Emulate the kernel that repeats keys and values itself."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    return varlen_of_torch_2_11(q, k, v, *bounds, **options)


@pytest.fixture(params=[varlen_of_torch_2_11, varlen_of_torch_2_12])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)
    dtypes.clear()


def outcome(name: str, batch: Packed, autocast: bool) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities, and the gradient of their sum as one vector."""
    model = tiny_model(attention=name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = Policy(model)(batch)
    logps.sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("batch", BATCHES)
def test_varlen_equals_packed(batch: Packed):
    packed, varlen = (outcome(name, batch, autocast=False) for name in ("packed", "varlen"))
    assert_close(varlen[0], packed[0], rtol=0, atol=1e-5)
    assert (varlen[1] - packed[1]).norm() < 1e-5 * packed[1].norm()
    assert dtypes == [torch.float32] * 2  # one call per layer for all sequences


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("batch", BATCHES)
def test_varlen_gets_one_dtype_under_autocast(batch: Packed):
    """The rotation of positions gives queries and keys in float32, and the projection gives values in bf16."""
    packed, varlen = (outcome(name, batch, autocast=True) for name in ("packed", "varlen"))
    assert dtypes == [torch.bfloat16] * 2
    assert (varlen[0] - packed[0]).abs().mean() < 0.05  # the error of bf16 itself, see test_logprobs
    assert (varlen[1] - packed[1]).norm() < 0.05 * packed[1].norm()


@pytest.mark.usefixtures("kernel")
def test_reward_model_scores_the_same_with_varlen():
    scorer = RewardModel(decoder().requires_grad_(False))
    scorer.model.set_attn_implementation("packed")
    packed = RewardModel(scorer.model)(whole(IDS))
    scorer.model.set_attn_implementation("varlen")
    assert_close(RewardModel(scorer.model)(whole(IDS)), packed, rtol=0, atol=1e-5)


def test_packed_attention_reaches_fast_kernels(monkeypatch: pytest.MonkeyPatch):
    """On CUDA, a mask together with enable_gqa is computed by the slow kernel, and cuDNN plans for each length."""
    calls: list[tuple[bool, bool]] = []

    def record(*args: Tensor, attn_mask: Tensor | None, enable_gqa: bool, **options: Any) -> Tensor:
        calls.append((attn_mask is not None, enable_gqa))
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    Policy(tiny_model())(BATCHES[1])
    assert set(calls) == {(True, False), (False, True)}
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_auto_attention_is_varlen_only_on_a_gpu_in_bf16(tiny_folder: Path, tmp_path: Path):
    auto = pretrained(tiny_folder, tmp_path, attention="auto")
    half = replace(auto, dtype="bfloat16")
    found = [model.with_attention_for(gpu, autocast).attention
             for model in (auto, half) for gpu in (True, False) for autocast in (True, False)]  # fmt: skip
    assert found == ["varlen", "packed", "packed", "packed", "varlen", "varlen", "packed", "packed"]
    packed = replace(auto, attention="packed")
    assert packed.with_attention_for(gpu=True, half=True) is packed


def test_fingerprint_has_the_kernel_that_auto_stands_for(tiny_folder: Path, tmp_path: Path):
    """Annotations that were computed with attention=packed stay valid."""
    auto = pretrained(tiny_folder, tmp_path, attention="auto")
    for autocast in (None, torch.bfloat16):
        frozen = FrozenModel(auto, "cpu", autocast)
        assert frozen.fingerprint == FrozenModel(replace(auto, attention="packed"), "cpu", autocast).fingerprint
    assert frozen.fingerprint["attention"] == "packed"
    assert frozen.policy.model.config._attn_implementation == "packed"
