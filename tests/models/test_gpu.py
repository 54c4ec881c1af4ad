"""Tests that need a CUDA device: `pytest -m gpu`. Not tested on a GPU."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from notebooks.tiny import byte_tokenizer
from tests.helpers.cli import run
from tests.helpers.models import tiny_model
from var.data.chat import Chat
from var.models.logprobs import compute_token_logps
from var.models.packing import Packed, pack, pack_tree
from var.models.policy import Policy
from var.sampling.base import Sampling
from var.sampling.local import sample_tokens
from var.training.optim import MasterAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DRAW = torch.Generator().manual_seed(0)
IDS = [torch.randint(0, 256, (n,), generator=DRAW).tolist() for n in (40, 7, 90, 23)]
STARTS = [12, 3, 60, 22]


def batches() -> list[Packed]:
    prompts, responses = [IDS[0], IDS[1]], [[IDS[2], IDS[3]], [IDS[3]]]
    return [pack(IDS, STARTS), pack_tree(prompts, responses)]


def outcome(model: Any, batch: Packed, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities, and the gradient of their sum as one vector."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logps = Policy(model)(batch.to(model.device))
    logps.sum().backward()
    return logps.detach().cpu(), torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()


@pytest.mark.parametrize("which", [0, 1])
def test_float32_equals_the_cpu(which: int):
    expected = outcome(tiny_model(), batches()[which])
    found = outcome(tiny_model().cuda(), batches()[which])
    assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert (found[1] - expected[1]).norm() < 1e-3 * expected[1].norm()


@pytest.mark.parametrize("kind", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("which", [0, 1])
def test_gpu_kernels_equal_packed_attention(kind: str, which: int):
    """In bf16, with heads of 64, which the kernels need. Each branch of the tree repeats its prompt."""
    if kind == "flash_attention_2":
        pytest.importorskip("flash_attn")
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    packed = outcome(tiny_model(**sizes).cuda(), batches()[which], autocast=True)
    model = tiny_model(**sizes).cuda()
    model.set_attn_implementation(kind)
    found = outcome(model, batches()[which], autocast=True)
    spread = float(packed[0].std())
    assert (found[0] - packed[0]).abs().mean() < 0.02 * spread
    assert (found[1] - packed[1]).norm() < 0.05 * packed[1].norm()


def test_head_is_exact_to_a_hundredth_of_a_nat():
    """Under bf16 autocast, on logits as spread as a trained model's, compared with float64 on the same inputs."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 256, generator=draw).bfloat16().cuda()
    head = (torch.randn(32_000, 256, generator=draw) * 0.25).cuda()
    target = torch.randint(0, 32_000, (512,), generator=draw).cuda()
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        found = compute_token_logps(hidden, head, target)
    exact = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    error = found.double() - exact
    assert found.dtype == torch.float32
    assert error.abs().mean() < 0.01
    assert error.mean().abs() < 0.003


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    """Yield a list of the places at which the host waited for the device; it is filled at the end."""
    places: list[str] = []
    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(False)
    places += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


def test_sampling_synchronizes_once_per_16_tokens():
    chat, model = Chat(byte_tokenizer()), tiny_model().cuda()
    sampling = Sampling(responses=2, temperature=1.0, top_p=1.0, max_new_tokens=64, batch=8, batch_tokens=4096, seed=0)
    sample_tokens(model, chat, IDS, sampling)
    with synchronizations() as places:
        sample_tokens(model, chat, IDS, sampling)
    assert len(places) <= 64 / 16 + 4, Counter(places)  # and a few to start and to end a batch


def test_policys_step_never_synchronizes():
    model, batch = tiny_model().cuda(), pack(IDS, STARTS).to("cuda")
    policy = Policy(model)
    policy(batch).sum().backward()
    with synchronizations() as places:
        policy(batch).sum().backward()
    assert not places, Counter(places)


def test_logits_of_a_large_vocabulary_never_exist_at_once():
    """For 4 answers of 1,000 tokens at V = 151,936 all logits are 2.4 GB in float32, and a chunk of 256 is 156 MB."""
    model = tiny_model(vocab_size=151_936, hidden_size=64, max_position_embeddings=2048).cuda()
    batch = pack([[1] * 16 + [2] * 1000] * 4, [16] * 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome(model, batch, autocast=True)
    assert torch.cuda.max_memory_allocated() - before < 1.2e9


def test_sampling_on_the_device_is_reproducible():
    chat = Chat(byte_tokenizer())
    sampling = Sampling(responses=3, temperature=1.0, top_p=0.9, max_new_tokens=12, batch=6, batch_tokens=4096, seed=0)
    model = tiny_model().cuda()
    once = sample_tokens(model, chat, IDS, sampling)
    assert sample_tokens(model, chat, IDS, sampling) == once
    assert [len(responses) for responses in once] == [3] * 4


MASTERS = ["optim=adamw_masters", "optim.optimizer.device=cpu", "model.dtype=bfloat16"]


@pytest.mark.parametrize(
    "options",
    [[], ["model.attention=varlen"], ["model.gradient_checkpointing=true"], ["model.compile=true"], MASTERS],
)
def test_train_command_runs_in_bf16(tiny_folder: Path, tmp_path: Path, options: list[str]):
    done = run(
        "train.py", f"model.path={tiny_folder}", f"annotation_cache={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.source.problems=30", "data.validation_prompts=4", "reward=near_number",
        "loss=dpo", "trainer.max_steps=3", "generate.max_new_tokens=40", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["precision"], summary["steps"]) == ("bf16-mixed", 3)


def test_master_weights_on_the_cpu_equal_those_on_the_device():
    """Also after a state is loaded, whose moments Lightning moves to the device."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(5, 3, device="cuda").bfloat16())] for _ in range(2))
    offloaded, on_device = MasterAdamW(ours, lr=1e-3, device="cpu"), MasterAdamW(theirs, lr=1e-3)
    for step in range(6):
        for p in (*ours, *theirs):
            p.grad = torch.full_like(p, step - 2.5)
        offloaded.step()
        on_device.step()
        if step == 3:
            state = {k: v.cuda() for k, v in offloaded.state[offloaded.masters[0]].items()}
            offloaded.state[offloaded.masters[0]].update(state)
    assert {master.device.type for master in offloaded.masters} == {"cpu"}
    assert_close(offloaded.masters[0], on_device.masters[0].cpu(), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[0].cpu(), offloaded.masters[0].bfloat16())
