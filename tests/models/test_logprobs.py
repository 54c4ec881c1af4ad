"""Packed log-probabilities compared with the plain computation: padding, full logits, transformers' own attention.

In float64 the two agree to 1e-14, because transformers rounds norms and rotations to float32 in both. The tolerance
is 1e-12 for values and gradients of order 10.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import tiny_config, tiny_model
from var.models import logprobs
from var.models.attention import Layout, check_lengths, packed_attention, use_attention
from var.models.cross_scoring import cross_logps, pack_crossed
from var.models.logprobs import HEAD_CHUNK, choose_head_dtype, compute_hidden_states, compute_token_logps
from var.models.packing import Segment, pack, pack_tree
from var.models.policy import Policy
from var.utils.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8},
    "granite": {"attention_multiplier": 0.1},
}
draw = random.Random(0)
IDS = [[draw.randrange(256) for _ in range(n)] for n in (12, 5, 9, 2, 7)]
STARTS = [4, 4, 1, 1, 3]


def family(kind: str, **more: Any) -> Any:
    """Return a tiny random float64 model with packed attention; its biases are random too."""
    sizes = dict(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**sizes, **more})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed").double()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            parameter.data.normal_(std=0.2)
    return model.eval()


def padded_logps(model: Any, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
    """Return [N] nats by right padding, a mask, sdpa and all logits."""
    width = max(map(len, ids))
    with use_attention(model, "sdpa"):
        logits = model(
            input_ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in ids]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        ).logits
    logps = logits.log_softmax(-1)
    spans = [
        logps[i, range(start - 1, len(row) - 1), row[start:]]
        for i, (row, start) in enumerate(zip(ids, starts, strict=True))
    ]
    return torch.cat(spans)


def gradients(model: Any, values: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a sum with fixed random weights, so that every token has its own weight."""
    model.zero_grad()
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (values * weights.to(values.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(dtype=torch.float64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_values_and_gradients_equal_the_padded_computation(kind: str):
    model = family(kind, **FAMILIES[kind])
    ours, theirs = Policy(model)(pack(IDS, STARTS)), padded_logps(model, IDS, STARTS)
    assert_close(ours, theirs, **EXACT)
    assert ours.min() < -5  # a uniform model would hide mistakes
    mine, plain = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == plain.keys()
    for name, gradient in mine.items():
        assert_close(gradient, plain[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        assert gradient.abs().max() > 1e-3 or "bias" in name  # a key's bias adds the same to all attention scores


def test_packed_sequences_equal_each_sequence_alone(model: Any):
    """Packed sequences attended to each other in huggingface/trl #805 and #1230."""
    policy = Policy(model)
    with torch.no_grad():
        alone = torch.cat([policy(pack([row], [start])) for row, start in zip(IDS, STARTS, strict=True)])
        assert_close(policy(pack(IDS, STARTS)), alone, **EXACT)
        order = [3, 0, 4, 2, 1]
        mixed = policy(pack([IDS[i] for i in order], [STARTS[i] for i in order]))
    pieces = dict(zip(order, mixed.split([len(IDS[i]) - STARTS[i] for i in order]), strict=True))
    assert_close(torch.cat([pieces[i] for i in range(5)]), alone, **EXACT)


def test_changing_a_sequence_does_not_change_the_others(model: Any):
    """Packed sequences attended to each other in LlamaFactory PR #4224. Equal to the last bit, in float32 as well."""
    for policy in (Policy(model), Policy(tiny_model())):
        with torch.no_grad():
            before = policy(pack(IDS, STARTS))
            for changed in range(5):
                ids = [row if i != changed else [(t + 7) % 256 for t in row] for i, row in enumerate(IDS)]
                batch = pack(ids, STARTS)
                same = policy(batch) == before
                assert same[batch.sequence != changed].all()
                assert not same[batch.sequence == changed].any()


def test_native_packing_is_wrong_with_a_mask_or_a_cache(model: Any):
    """transformers separates sequences by their positions only without a mask and without a cache, with no warning.

    Packed sequences attended to each other in huggingface/trl #3910. If the two cases below agree one day, the checks
    of the next test are no longer needed.
    """
    batch = pack(IDS, STARTS)
    tokens = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
    expected = padded_logps(model, IDS, STARTS)

    def native(**more: Any) -> Tensor:
        with torch.no_grad(), use_attention(model, "sdpa"):
            logits = model(**tokens, **more).logits[0]
        return logits.log_softmax(-1)[batch.predictor, batch.target]

    assert_close(native(use_cache=False), expected, **EXACT)
    for options in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(tokens["input_ids"])}):
        assert (native(**options) - expected).abs().max() > 0.1


def test_packed_attention_needs_segments_and_no_mask(model: Any):
    tokens, unmarked = torch.tensor([[1, 2, 3]]), "does not pass the boundaries of packed sequences to its attention"
    with pytest.raises(UserError, match=f"LlamaAttention {unmarked}. Models of this family cannot be packed"):
        model(input_ids=tokens)
    q = k = v = torch.randn(1, 2, 3, 4)
    with pytest.raises(UserError, match=r"builds its own attention mask\. Models of this family cannot be"):
        packed_attention(model, q, k, v, torch.ones(3, 3), layout=Layout((Segment(0, 3),)))
    with pytest.raises(UserError, match=unmarked):
        model.generate(tokens, max_new_tokens=1)
    with pytest.raises(UserError, match=f"StableLmAttention {unmarked}"):
        Policy(family("stablelm").float())(pack(IDS, STARTS))
    assert packed_attention(model, q, k, v, None, layout=Layout((Segment(0, 3),)))[0].shape == (1, 3, 2, 4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_tree_equals_each_pair_alone(kind: str):
    """Branches attend to their prompt and to themselves, but not to each other; also a branch of one token.

    Gradients agree to 2e-6 of 10: a norm rounds them to float32, here as the sum over a prompt's branches.
    """
    model = family(kind, **FAMILIES[kind])
    policy = Policy(model)
    prompts, responses = [[5, 6, 7], [8]], [[[1, 2, 3, 4], [9], [2, 2]], [[4, 4, 4]]]
    tree = policy(pack_tree(prompts, responses))
    flat = [p + r for p, branches in zip(prompts, responses, strict=True) for r in branches]
    starts = [3, 3, 3, 1]
    alone = torch.cat([policy(pack([row], [start])) for row, start in zip(flat, starts, strict=True)])
    assert_close(tree, alone, **EXACT)
    mine, plain = gradients(model, tree), gradients(model, padded_logps(model, flat, starts))
    for name, gradient in mine.items():
        assert_close(gradient, plain[name], rtol=0, atol=2e-6)


def test_cross_logps_score_each_response_under_each_prompt(model: Any):
    """[B, B]: row i is the prompt, column j the response, summed over tokens; the diagonal is the batch's own."""
    policy, batch = Policy(model), pack(IDS, STARTS)
    with torch.no_grad():
        table = cross_logps(policy, pack_crossed(IDS, STARTS))
        pairs = [(p[:s] + r[t:], s) for p, s in zip(IDS, STARTS, strict=True) for r, t in zip(IDS, STARTS, strict=True)]
        expected = torch.stack([policy(pack([row], [start])).sum() for row, start in pairs])
        assert_close(table.flatten(), expected, **EXACT)
        assert_close(table.diagonal(), batch.sum_by_sequence(policy(batch)), **EXACT)


def test_cross_logps_encode_each_prompt_once(model: Any):
    """Σ prompts + B · Σ (responses − 1) tokens in one call; scoring by pairs would encode B · Σ prompts."""
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    try:
        with torch.no_grad():
            cross_logps(Policy(model), pack_crossed(IDS, STARTS))
    finally:
        hook.remove()
    prompts, responses = sum(STARTS), sum(len(row) - s for row, s in zip(IDS, STARTS, strict=True))
    assert seen == [prompts + 5 * (responses - 5)]


def largest_allocation(work: Any) -> int:
    """Return the bytes of the largest tensor that `work` allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("train", [False, True])
def test_logits_of_all_response_tokens_never_exist_at_once(train: bool, monkeypatch: pytest.MonkeyPatch):
    """[tokens, vocabulary] in float32 exhausts memory in huggingface/trl #3168. At most one chunk of it exists.

    With 224 response tokens and V = 2048, a chunk of 40 has 327,680 bytes and the head's gradient [V, 32] has 262,144.
    All logits would have 1.8 MB.
    """
    assert HEAD_CHUNK == 256
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", 40)
    batch = pack([[draw.randrange(256) for _ in range(60)] for _ in range(4)], [4] * 4)
    assert len(batch.target) == 224
    policy = Policy(tiny_model(vocab_size=2048))

    def ours() -> None:
        with torch.set_grad_enabled(train):
            logps = policy(batch)
            if train:
                logps.sum().backward()

    assert largest_allocation(ours) == 40 * 2048 * 4
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", 224)
    assert largest_allocation(ours) == 224 * 2048 * 4  # the measurement detects it


@pytest.mark.parametrize("tokens", [1, HEAD_CHUNK - 1, HEAD_CHUNK, HEAD_CHUNK + 1])
def test_chunked_head_equals_log_softmax(tokens: int):
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=make, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, generator=make, dtype=torch.float64, requires_grad=True)
    target = torch.randint(50, (tokens,), generator=make)
    weights = torch.randn(tokens, generator=make, dtype=torch.float64)
    ours = compute_token_logps(hidden, head, target)
    plain = (hidden @ head.T).log_softmax(-1)[torch.arange(tokens), target]
    assert_close(ours, plain, **EXACT)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), (hidden, head)),
        torch.autograd.grad((plain * weights).sum(), (hidden, head)),
        strict=True,
    ):
        assert_close(mine, other, **EXACT)


def test_chunked_head_passes_gradcheck(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", 3)
    hidden, head = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    target = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    assert torch.autograd.gradcheck(lambda h, w: compute_token_logps(h, w, target), (hidden, head))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen_head_or_hidden_states_need_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch):
    """The other gradient is the same, and one product of the backward pass is left out."""
    products = Counter[str]()
    for name in ("multiply", "add_product"):
        real = getattr(logprobs, name)
        monkeypatch.setattr(
            logprobs, name, lambda *a, name=name, real=real, **k: (products.update([name]), real(*a, **k))[1]
        )
    values = {"hidden": torch.randn(6, 4), "head": torch.randn(9, 4)}

    def gradient_of(*trained: str) -> dict[str, Tensor | None]:
        products.clear()
        leaves = {name: value.clone().requires_grad_(name in trained) for name, value in values.items()}
        compute_token_logps(**leaves, target=torch.arange(6)).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    both = gradient_of("hidden", "head")
    assert products == {"multiply": 3, "add_product": 1}  # logits twice and one product for each gradient
    trained = "head" if frozen == "hidden" else "hidden"
    alone = gradient_of(trained)
    assert alone[frozen] is None
    assert_close(alone[trained], both[trained], rtol=0, atol=0)
    assert products == ({"multiply": 2, "add_product": 1} if frozen == "hidden" else {"multiply": 3})


def test_head_in_bf16_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch):
    """As on CUDA: values and gradients are those of factors rounded to bf16, with nothing else in bf16.

    The gradient of the logits, of order 1, is rounded to bf16 too, by at most 1/512 of itself.
    """
    monkeypatch.setattr(logprobs, "choose_head_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(logprobs, "PART", 16)
    hidden, head = (torch.randn(n, 8, requires_grad=True) for n in (300, 50))
    target = torch.randint(50, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute_token_logps(hidden, head, target)
        mine = torch.autograd.grad(ours.sum(), (hidden, head))
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (hidden, head)]
    plain = (rounded[0] @ rounded[1].T).log_softmax(-1)[torch.arange(300), target]
    assert ours.dtype == torch.float32
    assert_close(ours.double(), plain, rtol=0, atol=1e-5)
    for own, other in zip(mine, torch.autograd.grad(plain.sum(), rounded), strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() < 0.004 * other.norm()


def test_head_is_bf16_only_on_cuda_and_if_the_model_is(monkeypatch: pytest.MonkeyPatch):
    cuda, cpu, half = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    assert choose_head_dtype(cuda, half) == half
    assert choose_head_dtype(cuda, torch.float32) == torch.float32
    assert choose_head_dtype(cpu, torch.float64) == torch.float64
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)  # autocast for CUDA needs a device
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: half)
    assert choose_head_dtype(cuda, torch.float32) == half
    assert choose_head_dtype(cpu, half) == torch.float32


def test_large_logits_stay_finite():
    """z_t − logsumexp(z) of logits ±2000 is 0 and −4000; exp alone would overflow."""
    hidden, head = torch.tensor([[1.0], [1.0]]), torch.tensor([[2000.0], [-2000.0]])
    assert compute_token_logps(hidden, head, torch.tensor([0, 1])).tolist() == [0.0, -4000.0]


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    plain, checkpointed = tiny_model(dtype=torch.float64).train(), tiny_model(dtype=torch.float64).train()
    checkpointed.gradient_checkpointing_enable()
    calls = Counter[str]()
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        layer = model.model.layers[0].self_attn
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    batch = pack(IDS, STARTS)
    values, again = Policy(plain)(batch), Policy(checkpointed)(batch)
    assert_close(values, again, rtol=0, atol=0)
    one, other = gradients(plain, values), gradients(checkpointed, again)
    for name, gradient in one.items():
        assert_close(gradient, other[name], rtol=0, atol=0)
    assert calls == {"plain": 1, "checkpointed": 2}


def test_bfloat16_returns_float32_close_to_the_exact():
    model = tiny_model()
    exact = Policy(model)(pack(IDS, STARTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Policy(model)(pack(IDS, STARTS))
    assert mixed.dtype == torch.float32
    assert_close(mixed, exact, rtol=0, atol=0.2)
    assert 0 < (mixed - exact).abs().mean() < 0.05
    mixed.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert Policy(tiny_model(dtype=torch.bfloat16))(pack(IDS, STARTS)).dtype == torch.float32


def test_prompt_features_are_last_and_mean_hidden_state(model: Any):
    batch = pack([[1, 2, 3, 4], [5, 6, 7]], [3, 2])  # the prompts 1 2 3 and 5 6
    features = Policy(model).prompt_features(batch)
    with torch.no_grad(), use_attention(model, "sdpa"):
        for got, prompt in zip(features, ([1, 2, 3], [5, 6]), strict=True):
            hidden = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
            assert_close(got, torch.cat([hidden[-1], hidden.mean(0)]), **EXACT)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_sequences_longer_than_the_sliding_window_are_exact(kind: str, more: dict[str, Any]):
    """Alone, and as branches of a tree, whose window reaches into the prompt; so is the gradient."""
    policy = Policy(family(kind, head_dim=8, **more))
    full = Policy(family(kind, head_dim=8, **{**more, "sliding_window": 64}))
    exact = padded_logps(policy.model, IDS, STARTS)
    assert_close(policy(pack(IDS, STARTS)), exact, **EXACT)
    assert not torch.allclose(full(pack(IDS, STARTS)), exact)  # the window matters
    branches = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [16]]
    ids, starts = [[1, 2, 3, 4, 5, *branch] for branch in branches], [5, 5, 5]
    tree = pack_tree([[1, 2, 3, 4, 5]], [branches])
    assert_close(policy(tree), padded_logps(policy.model, ids, starts), **EXACT)
    gradients = []
    for loss in (policy(tree).sum(), padded_logps(policy.model, ids, starts).sum()):
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
    for ours, other in zip(*gradients, strict=True):
        assert_close(ours, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "more", "most", "words"),
    [
        ("mistral", {"sliding_window": 8}, None, ""),
        ("gpt2", {"n_positions": 16}, 16, "gpt2 has 16 positions, but the longest answer has 17 tokens. Lower data"),
        ("llama", {"max_position_embeddings": 16}, None, ""),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                   "max_position_embeddings": 16}, 16, "if its longest sequence exceeds 16"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                  "long_factor": [2.0] * 4}, "original_max_position_embeddings": 8}, 8, "exceeds 8 "),
    ],
)  # fmt: skip
def test_lengths_that_a_model_gets_wrong_raise(kind: str, more: dict[str, Any], most: int | None, words: str):
    config = AutoConfig.for_model(kind, **{"hidden_size": 32, "num_attention_heads": 4, **more})
    check_lengths(config, most or 10_000, "answer")
    if most is not None:
        with pytest.raises(UserError, match=words):
            check_lengths(config, most + 1, "answer")


def test_model_that_changes_its_logits_after_the_head_is_rejected():
    with pytest.raises(UserError, match=r"cohere sets logit_scale=0\.0625, which .* does not apply"):
        Policy(family("cohere"))
    with pytest.raises(UserError, match=r"gemma2 sets final_logit_softcapping=30\.0"):
        Policy(family("gemma2", head_dim=8))
    with pytest.raises(UserError, match="phi has a bias in its head"):
        Policy(family("phi"))
    config = tiny_config(attn_implementation="packed")
    config.logits_scaling = 1.0
    Policy(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("kind", "more", "what"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 has layers of type conv"),
        ("mamba", {"state_size": 8}, "mamba has layers of type (mamba|linear_attention)"),
        ("bloom", {"n_head": 4}, "bloom has its own positions"),
        ("bart", {"d_model": 32, "decoder_attention_heads": 4}, "bart has its own positions"),
    ],
)
def test_model_that_mixes_packed_sequences_is_rejected(kind: str, more: dict[str, Any], what: str):
    """Convolutions and states cross the boundary of two sequences, without an error of transformers."""
    with pytest.raises(UserError, match=f"{what}. Only models with plain attention can be packed"):
        Policy(family(kind, **more))


def test_attention_with_sinks_or_a_soft_cap_is_rejected():
    model = family("gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=1).float()
    with pytest.raises(UserError, match="uses a soft cap or sinks"):
        Policy(model)(pack(IDS, STARTS))
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(UserError, match="uses a soft cap or sinks"):
        packed_attention(model, q, q, q, None, softcap=50.0, layout=Layout((Segment(0, 3),)))


def test_use_attention_restores_the_attention_after_an_error(model: Any):
    with use_attention(model, "sdpa"):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "packed"
    with pytest.raises(IndexError), use_attention(model, "sdpa"):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.config._attn_implementation == "packed"


@pytest.mark.parametrize("kind", ["flash_attention_2", "varlen"])
def test_gpu_kernels_get_boundaries_and_a_prompt_per_branch(kind: str):
    """Checks the arguments of the model's call; the kernels themselves need a GPU."""

    class Backbone(torch.nn.Module):
        config = type("Config", (), {"_attn_implementation": kind})

        def forward(self, **options: Any) -> Any:
            self.options = options
            return type("Out", (), {"last_hidden_state": options["input_ids"][..., None].float()})

    backbone = Backbone()
    compute_hidden_states(backbone, pack([[1, 2, 3, 4], [5, 6, 7]], [2, 1]))
    assert backbone.options["cu_seq_lens_q"].tolist() == backbone.options["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert backbone.options["cu_seq_lens_q"].dtype == torch.int32
    assert (backbone.options["max_length_q"], backbone.options["max_length_k"]) == (3, 3)
    assert backbone.options["use_cache"] is False
    tree = pack_tree([[1, 2], [6]], [[[3, 4], [5, 7]], [[8, 9]]])
    assert compute_hidden_states(backbone, tree)[:, 0].tolist() == tree.input_ids.tolist() == [1, 2, 3, 5, 6, 8]
    assert backbone.options["input_ids"][0].tolist() == [1, 2, 1, 2, 3, 1, 2, 5, 6, 8]
    assert backbone.options["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1]
    assert backbone.options["cu_seq_lens_q"].tolist() == [0, 2, 5, 8, 10]
    assert backbone.options["max_length_q"] == 3


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
def test_values_and_gradients_equal_torchs_fused_loss_to_the_last_bit():
    """Compute on a CPU, in a complete and a short chunk."""
    torch.manual_seed(0)
    values = torch.randn(HEAD_CHUNK + 44, 16), torch.randn(999, 16)
    target = torch.randint(999, (HEAD_CHUNK + 44,))
    upstream = torch.randn(HEAD_CHUNK + 44)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=HEAD_CHUNK, chunking_method=None, acc_policy="compact"
    )
    results = []
    for compute in (
        lambda h, w: -torch.nn.functional.linear_cross_entropy(h, w, target, reduction="none", options=options),
        lambda h, w: compute_token_logps(h, w, target),
    ):
        leaves = [value.clone().requires_grad_() for value in values]
        logps = compute(*leaves)
        logps.backward(upstream)
        results.append([logps.detach(), *(leaf.grad for leaf in leaves)])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
