"""Sampling from a local model: one seed gives one text; padding and the model's generation config change nothing."""

import hashlib
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import Parameter, Signature, signature
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from notebooks.tiny import SIZES, byte_tokenizer
from tests.helpers.models import spread, tiny_config, tiny_model
from var.data.chat import Chat
from var.models.attention import use_attention
from var.models.packing import pack
from var.models.policy import Policy
from var.sampling import local
from var.sampling.base import Sample, Sampling
from var.sampling.kv_cache import ReservedLayer, count_rows, free_memory
from var.sampling.local import choose_tokens, sample, sample_tokens
from var.utils.errors import UserError

SAMPLING = Sampling(responses=2, temperature=1.0, top_p=1.0, max_new_tokens=8, batch=6, batch_tokens=4096, seed=0)
GREEDY = replace(SAMPLING, temperature=0.0, responses=1)


def ask(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = ask("ab", "a longer one", "c", "ab", "the longest of all of them", "de")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def chat() -> Chat:
    return Chat(byte_tokenizer())


def test_text_depends_on_the_seed(model: Any, chat: Chat):
    first = sample(model, chat, PROMPTS, SAMPLING)
    torch.manual_seed(77)  # the global random state does not matter
    assert sample(model, chat, PROMPTS, SAMPLING) == first
    assert sample(model, chat, PROMPTS, replace(SAMPLING, seed=1)) != first
    assert [len(responses) for responses in first] == [2] * 6
    assert first[0][0] != first[0][1]


@pytest.mark.parametrize("batch", [2, 4, 64])
def test_text_does_not_depend_on_the_batch(model: Any, chat: Chat, batch: int):
    """Other batch sizes, reverse order, one prompt alone, more responses per prompt, and equal prompts."""
    texts = sample(model, chat, PROMPTS, SAMPLING)
    more = replace(SAMPLING, batch=batch)
    assert sample(model, chat, PROMPTS[::-1], more) == texts[::-1]
    assert [sample(model, chat, [prompt], more)[0] for prompt in PROMPTS] == texts
    assert sample(model, chat, PROMPTS, replace(more, batch_tokens=70)) == texts
    three = sample(model, chat, PROMPTS, replace(SAMPLING, responses=3, batch=9))
    assert [responses[:2] for responses in three] == texts
    assert texts[0] == texts[3]
    assert len({sample.text for responses in texts for sample in responses}) == 10


# By version 0.1.0, with transformers' DynamicCache and a check after each token.
RECORDED = {"plain": "b7b9e958be47", "top_p": "76612145b6fa", "cold": "bff5e318415d", "greedy": "275d3cd7a02f"}
LONG = replace(SAMPLING, responses=3, max_new_tokens=24, batch=9, seed=5)
VARIANTS = {
    "plain": LONG, "top_p": replace(LONG, top_p=0.8), "cold": replace(LONG, temperature=0.7),
    "greedy": replace(LONG, temperature=0.0, responses=1),
}  # fmt: skip
WORDS = ask("ab", "a longer one", "c", "the longest of all of them by far", "de")


@pytest.mark.parametrize("variant", RECORDED)
@pytest.mark.parametrize("every", [1, 5, 16])
def test_tokens_equal_the_recorded_ones(
    model: Any, chat: Chat, variant: str, every: int, monkeypatch: pytest.MonkeyPatch
):
    """Also if finished responses leave the batch later than at once, as on a GPU."""
    monkeypatch.setitem(local.CHECK_EVERY, "cpu", every)
    tokens = sample_tokens(model, chat, [chat.prompt(prompt) for prompt in WORDS], VARIANTS[variant])
    recorded = [[(ids[:-1], True) if ids[-1] == 257 else (ids, False) for ids in several] for several in tokens]
    assert hashlib.sha256(json.dumps(recorded).encode()).hexdigest()[:12] == RECORDED[variant]


@pytest.mark.parametrize("variant", ["plain", "top_p"])
def test_tokens_in_bfloat16_do_not_depend_on_the_checks(
    model: Any, chat: Chat, variant: str, monkeypatch: pytest.MonkeyPatch
):
    """Processors differ in how they round bfloat16, so no tokens are recorded."""
    found = []
    for every in (1, 5, 16):
        monkeypatch.setitem(local.CHECK_EVERY, "cpu", every)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(sample_tokens(model, chat, [chat.prompt(prompt) for prompt in WORDS], VARIANTS[variant]))
    assert found[0] == found[1] == found[2]


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}


class Waits(TorchDispatchMode):
    """Counts the operations at which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.removeprefix("aten::") in WAITING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def test_host_waits_once_per_16_tokens(model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    """Two checks and the final reading of 40 tokens, with padded prompts and responses that end early."""
    monkeypatch.setitem(local.CHECK_EVERY, "cpu", local.CHECK_EVERY["default"])
    read = torch.Tensor.tolist
    with Waits() as waits:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (waits.names.update(["tolist"]), read(tensor))[1])
        sample(model, chat, WORDS[:3], replace(LONG, max_new_tokens=40))
    assert waits.names == {"tolist": 3}


@pytest.mark.parametrize("every", [1, 4])
def test_finished_responses_leave_the_batch_at_a_check(
    model: Any, chat: Chat, every: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(local.CHECK_EVERY, "cpu", every)
    rows: list[int] = []
    forward = local.compute_last_hidden_states
    monkeypatch.setattr(
        local,
        "compute_last_hidden_states",
        lambda model, ids, *rest: (rows.append(len(ids)), forward(model, ids, *rest))[1],
    )
    ids = [chat.prompt(prompt) for prompt in WORDS]
    sampled = [r for own in sample_tokens(model, chat, ids, replace(LONG, responses=12, batch=64)) for r in own]
    ends = [len(ids) if ids[-1] == 257 else 99 for ids in sampled]
    assert rows == [5, *(sum(end > step // every * every for end in ends) for step in range(1, 24))]
    assert len(set(rows)) > 4


def test_new_token_does_not_copy_the_cache(model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    places: set[int] = set()
    update = ReservedLayer.update

    def record(layer: ReservedLayer, *args: Any, **options: Any) -> Any:
        keys, values = update(layer, *args, **options)
        places.update([keys.data_ptr()] * (keys.shape[2] > len(ids)))
        return keys, values

    monkeypatch.setattr(ReservedLayer, "update", record)
    ids = chat.prompt(PROMPTS[1])
    ((tokens,),) = sample_tokens(model, chat, [ids], GREEDY)
    assert len(tokens) == 8
    assert len(places) == 2  # one for each layer


def test_reserved_layer_equals_transformers_own():
    """Also after rows leave in the middle."""
    ours, theirs = ReservedLayer(), DynamicLayer()
    first = torch.randn(2, 2, 3, 4)
    for layer in (ours, theirs):
        layer.update(first, first + 1)
    ours.reserve(copies=3, new=2)
    theirs.batch_repeat_interleave(3)
    for rows in ([0, 1, 2, 3, 4, 5], [1, 4]):
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor(rows))
        new = torch.randn(len(rows), 2, 1, 4)
        for one, other in zip(ours.update(new, new + 1), theirs.update(new, new + 1), strict=True):
            assert torch.equal(one, other)
    assert ours.get_seq_length() == theirs.get_seq_length() == 5


def test_rows_are_limited_by_the_memory_of_keys_values_and_logits():
    """Qwen2.5-7B: 28 layers · 4 heads · 128 · 2 numbers of 2 bytes are 56 KiB per token."""
    config = AutoConfig.for_model(
        "qwen2", num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, hidden_size=3584,
        vocab_size=152064,
    )  # fmt: skip
    row = 1000 * 56 * 1024 + 48 * 152064
    assert count_rows(config, 2, 1000, 100 * row / 0.9 + 1) == 100
    assert count_rows(config, 2, 1000, 100 * row / 0.9 - row / 2) == 99
    assert count_rows(tiny_config(), 4, 10, 1.0) == 0
    assert free_memory(torch.device("cpu")) == float("inf")


def test_batches_fit_into_the_free_memory(model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    """Memory for four rows is two prompts with two responses. A single prompt is tried in any case."""
    expected = sample(model, chat, PROMPTS, SAMPLING)
    longest = max(len(chat.prompt(prompt)) for prompt in PROMPTS) + 8
    for rows, done in ((4, [2, 2, 2]), (0.5, [1] * 6)):
        memory = rows * (longest * 2 * 2 * 2 * 8 * 4 + 48 * 264) / 0.9 + 1
        monkeypatch.setattr(local, "free_memory", lambda device, memory=memory: memory)
        counts: list[int] = []
        assert sample(model, chat, PROMPTS, SAMPLING, counts.append) == expected
        assert counts == done


def test_batch_is_halved_when_memory_runs_out(model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    expected = sample(model, chat, PROMPTS, SAMPLING)
    real, warnings = local._generate, list[str]()

    def limited(model: Any, prompts: list[list[int]], *args: Any, most: int) -> Any:
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, *args)

    monkeypatch.setattr(local, "warn", warnings.append)
    monkeypatch.setattr(local, "_generate", partial(limited, most=1))
    assert sample(model, chat, PROMPTS, replace(SAMPLING, batch=8)) == expected
    assert warnings == [
        f"sampling: {rows} sequences do not fit into the memory of cpu; trying {half}"
        for rows, half in ((8, 4), (4, 2))
    ]
    monkeypatch.setattr(local, "_generate", partial(limited, most=0))
    with pytest.raises(
        UserError, match=r"sampling: responses=2 of \d+ tokens do not fit .* Lower responses or max_new"
    ):
        sample(model, chat, PROMPTS, SAMPLING)
    assert model.config._attn_implementation == "packed"


@pytest.mark.parametrize("name", ["cache", "past_key_values", "past"])
def test_cache_reaches_the_model_under_the_name_it_has(name: str, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    """transformers renamed the argument in 5.24. A model takes any other name, ignores it, and samples nonsense."""
    expected = sample(tiny_model(), chat, PROMPTS[:2], SAMPLING)
    model = tiny_model()
    real = model.base_model.forward
    own = next(name for name in local.CACHE_NAMES if name in signature(real).parameters)

    def renamed(input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: bool, **options: Any) -> Any:
        options = {own: options[name]} if name in options else {}
        return real(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **options,
        )

    parameters = [Parameter(name, Parameter.KEYWORD_ONLY), Parameter("rest", Parameter.VAR_KEYWORD)]
    renamed.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    monkeypatch.setattr(model.base_model, "forward", renamed)
    if name != "past":
        assert sample(model, chat, PROMPTS[:2], SAMPLING) == expected
    else:
        with pytest.raises(UserError, match=r"llama: the model added 0 of .* tokens to the cache"):
            sample(model, chat, PROMPTS[:2], SAMPLING)


def test_sliding_window_shorter_than_the_text_applies(chat: Chat):
    """The prompts have 20 tokens or more, and each token sees 8."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", **{**SIZES, "head_dim": 8, "sliding_window": 8})
    model = spread(AutoModelForCausalLM.from_config(config, attn_implementation="packed"))
    ids = [chat.prompt(prompt) for prompt in WORDS[:2]]
    assert len(ids[0]) != len(ids[1])
    expected = [greedy_tokens(model, own, 8) for own in ids]
    assert [tokens for (tokens,) in sample_tokens(model, chat, ids, GREEDY)] == expected
    config.sliding_window = None
    assert expected != [greedy_tokens(model, own, 8) for own in ids]


def test_batches_are_limited_by_sequences_and_padded_tokens():
    """K = 2 and 8 new tokens: a prompt of 10 counts 36 tokens, and 52 if it is padded to a prompt of 18."""
    lengths = [10, 10, 10, 18, 18, 500, 500]

    def sizes(**limits: int) -> list[int]:
        batches = list(replace(SAMPLING, **limits).batches(lengths))
        assert [i for members in batches for i in range(7)[members]] == list(range(7))
        return [members.stop - members.start for members in batches]

    assert sizes() == [3, 3, 1]
    assert sizes(batch=64, batch_tokens=14 * 508) == [7]
    assert sizes(batch=64, batch_tokens=14 * 508 - 1) == [6, 1]
    assert sizes(batch=64, batch_tokens=4 * 52) == [4, 1, 1, 1]
    assert sizes(batch=64, batch_tokens=4 * 52 - 1) == [3, 2, 1, 1]
    assert sizes(batch=64, batch_tokens=1) == [1] * 7  # the responses of a prompt stay together
    assert list(SAMPLING.batches([])) == []


def test_padding_does_not_change_greedy_text(model: Any, chat: Chat):
    together = sample(model, chat, PROMPTS, GREEDY)
    assert together == [sample(model, chat, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len({responses[0].ids for responses in together}) == 5  # of five distinct prompts


def test_token_is_where_cumulative_probability_exceeds_the_draw():
    """Probabilities 1/8, 1/2, 3/8; at temperature 1/2 their squares; top_p 0.4 keeps the 2nd, 0.8 the 2nd and 3rd."""
    logits = torch.tensor([1.0, 4.0, 3.0]).log().expand(6, 3)
    draws = torch.tensor([0.0, 0.124, 0.126, 0.624, 0.626, 0.999999], dtype=torch.float64)
    assert choose_tokens(logits, draws, SAMPLING).tolist() == [0, 0, 1, 1, 2, 2]
    sharper = replace(SAMPLING, temperature=0.5)  # 1/26, 16/26, 9/26
    assert choose_tokens(logits, draws, sharper).tolist() == [0, 1, 1, 1, 1, 2]
    assert choose_tokens(logits, draws, replace(SAMPLING, top_p=0.4)).tolist() == [1] * 6
    assert choose_tokens(logits, draws, replace(SAMPLING, top_p=0.8)).tolist() == [1, 1, 1, 2, 2, 2]  # 4/7, 3/7
    assert choose_tokens(logits, draws, GREEDY).tolist() == [1] * 6


@torch.no_grad()
def greedy_tokens(model: Any, ids: list[int], count: int) -> list[int]:
    """Return greedy tokens after `ids` by transformers' full forward at each step."""
    tokens = list[int]()
    with use_attention(model, "sdpa"):
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    return tokens


def test_greedy_takes_the_most_likely_token(model: Any, chat: Chat):
    expected = greedy_tokens(model, chat.prompt(PROMPTS[1]), 8)
    assert sample(model, chat, [PROMPTS[1]], GREEDY) == [[Sample.of(chat, expected)]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_policys_distribution(model: Any, chat: Chat, temperature: float):
    """In 4,000 first tokens the frequency of each letter is π^(1/T) within four standard deviations."""
    count, prompt = 4000, PROMPTS[0]
    draws = replace(SAMPLING, responses=count, batch=count, max_new_tokens=1, temperature=temperature)
    (texts,) = sample(model, chat, [prompt], draws)
    letters = list(range(97, 123))  # a token's number differs from its byte
    tokens = [chat.tokenizer.convert_tokens_to_ids(chr(c)) for c in letters]
    ids, every = chat.prompt(prompt), torch.arange(264)
    with torch.no_grad():
        logps = Policy(model)(pack([[*ids, int(t)] for t in every], [len(ids)] * 264))
    odds = (logps.double() / temperature).softmax(0)[tokens]
    seen = torch.tensor([sum(sample.text == chr(c) for sample in texts) for c in letters])
    assert ((seen / count - odds).abs() < 4 * (odds * (1 - odds) / count).sqrt() + 1e-3).all()
    assert seen.sum() > 50


def test_generation_config_does_not_change_the_distribution(model: Any, chat: Chat):
    """A repetition penalty or min_p of generation_config.json, as in Qwen's models, would sample another policy."""
    plain = sample(model, chat, PROMPTS, SAMPLING)
    before = model.generation_config
    model.generation_config = type(before)(
        repetition_penalty=5.0, min_p=0.5, top_k=1, no_repeat_ngram_size=1, eos_token_id=list(range(100))
    )
    try:
        assert sample(model, chat, PROMPTS, SAMPLING) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = before


def test_response_stops_at_any_end_token(model: Any, chat: Chat):
    """The third greedy token is made an end token, next to the template's: the response is the tokens up to it.

    The model is called three times and not eight, which the tokens alone would not show.
    """
    ids = greedy_tokens(model, chat.prompt(PROMPTS[1]), 3)
    assert not chat.end_tokens & set(ids)
    chat.__dict__["end_tokens"] = frozenset({chat.end_token, ids[-1]})
    calls: list[int] = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    text = chat.template.decode(ids[:-1])
    assert sample(model, chat, [PROMPTS[1]], GREEDY) == [[(text, True, tuple(ids))]]
    hook.remove()
    assert len(calls) == 3
    for limit, finished in ((2, False), (3, True)):
        ((found,),) = sample(model, chat, [PROMPTS[1]], replace(GREEDY, max_new_tokens=limit))
        assert found[1:] == (finished, tuple(ids[:limit]))


def test_padding_with_the_end_token_does_not_finish_responses(model: Any, chat: Chat):
    """Finished responses leave a batch that is padded with the end token; the others continue."""
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    texts = sample(model, chat, PROMPTS, replace(SAMPLING, responses=6, max_new_tokens=40))
    ended = [sample.finished for responses in texts for sample in responses]
    assert 0 < sum(ended) < len(ended)


def test_sampling_restores_random_state_and_model(model: Any, chat: Chat):
    """Random state and attention also after an error."""

    def fail(done: int) -> None:
        raise KeyboardInterrupt

    state = torch.random.get_rng_state()
    for training in (True, False):
        sample(model.train(training), chat, PROMPTS[:2], SAMPLING)
        assert model.training is training
    for more in ((), (fail,)):
        with pytest.raises(KeyboardInterrupt) if more else nullcontext():
            sample(model, chat, PROMPTS[:1], SAMPLING, *more)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.config._attn_implementation == "packed"


def test_progress_counts_prompts(model: Any, chat: Chat):
    done: list[int] = []
    sample(model, chat, PROMPTS[:5], replace(SAMPLING, max_new_tokens=1), done.append)
    assert done == [3, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"responses": 0}, "at least 1"), ({"max_new_tokens": 0}, "at least 1"), ({"batch": 1}, "batch at least"),
        ({"temperature": -1.0}, "temperature must be at least 0"), ({"top_p": 0.0}, "top_p in"),
        ({"top_p": 1.1}, "top_p in"), ({"temperature": 0.0}, "at temperature=0 all responses of a prompt are equal"),
    ],
)  # fmt: skip
def test_invalid_settings_raise(more: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(SAMPLING, **more)
