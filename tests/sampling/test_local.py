"""Sampling from a local model: one seed gives one text; padding and the model's generation config change nothing."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from notebooks.tiny import byte_tokenizer
from tests.helpers.models import tiny_model
from var.data.chat import Chat
from var.models.attention import use_attention
from var.models.packing import pack
from var.models.policy import Policy
from var.sampling.base import Sampling
from var.sampling.local import choose_tokens, sample
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
    assert len({text for responses in texts for text, _ in responses}) == 10


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
    assert len({responses[0][0] for responses in together}) == 5  # the prompts differ, so do the texts


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
    (((text, finished),),) = sample(model, chat, [PROMPTS[1]], GREEDY)
    assert (text, finished) == (chat.tokenizer.decode(expected, skip_special_tokens=True), False)


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
    seen = torch.tensor([sum(text == chr(c) for text, _ in texts) for c in letters])
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


def test_response_stops_at_the_end_token(model: Any, chat: Chat):
    """The third greedy token is made the end token: the response has two tokens and is finished.

    The model is called three times and not eight, which the text alone would not show.
    """
    ids = greedy_tokens(model, chat.prompt(PROMPTS[1]), 3)
    assert ids[-1] not in ids[:-1]
    chat.__dict__["end_token"] = ids[-1]
    calls: list[int] = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    (((text, finished),),) = sample(model, chat, [PROMPTS[1]], GREEDY)
    hook.remove()
    assert (text, finished) == (chat.tokenizer.decode(ids[-3:-1], skip_special_tokens=True), True)
    assert len(calls) == 3
    (((cut, finished),),) = sample(model, chat, [PROMPTS[1]], replace(GREEDY, max_new_tokens=2))
    assert (cut, finished) == (text, False)
    (((same, finished),),) = sample(model, chat, [PROMPTS[1]], replace(GREEDY, max_new_tokens=3))
    assert (same, finished) == (text, True)


def test_padding_with_the_end_token_does_not_finish_responses(model: Any, chat: Chat):
    """Finished responses leave a batch that is padded with the end token; the others continue."""
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    chat.__dict__["end_token"] = 257
    texts = sample(model, chat, PROMPTS, replace(SAMPLING, responses=6, max_new_tokens=40))
    ended = [finished for responses in texts for _, finished in responses]
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
