"""Sampling: the same seed gives the same text, padding and the model's own settings change nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import byte_tokenizer, tiny_model
from var.data.chat import Chat
from var.models.packing import pack
from var.models.policy import Policy
from var.sampling.base import Sampling
from var.sampling.local import choose, sample
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


def test_one_seed_is_one_text_and_another_another(model: Any, chat: Chat):
    first = sample(model, chat, PROMPTS, SAMPLING)
    torch.manual_seed(77)  # what the program drew before does not matter
    assert sample(model, chat, PROMPTS, SAMPLING) == first
    assert sample(model, chat, PROMPTS, replace(SAMPLING, seed=1)) != first
    assert [len(responses) for responses in first] == [2] * 6
    assert first[0][0] != first[0][1]


@pytest.mark.parametrize("batch", [2, 4, 64])
def test_a_prompt_draws_the_same_text_whatever_is_beside_it(model: Any, chat: Chat, batch: int):
    """In batches of another size, backwards, alone; more responses begin with the same ones; equal prompts agree."""
    texts = sample(model, chat, PROMPTS, SAMPLING)
    more = replace(SAMPLING, batch=batch)
    assert sample(model, chat, PROMPTS[::-1], more) == texts[::-1]
    assert [sample(model, chat, [prompt], more)[0] for prompt in PROMPTS] == texts
    assert sample(model, chat, PROMPTS, replace(more, batch_tokens=70)) == texts
    three = sample(model, chat, PROMPTS, replace(SAMPLING, responses=3, batch=9))
    assert [responses[:2] for responses in three] == texts
    assert texts[0] == texts[3]
    assert len({text for responses in texts for text, _ in responses}) == 10


def test_batches_are_bounded_by_sequences_and_by_their_padded_tokens():
    """K = 2, 8 new tokens: prompts of 10 make 36 tokens each, and 52 where one of 18 is beside them."""
    lengths = [10, 10, 10, 18, 18, 500, 500]

    def sizes(**limits: int) -> list[int]:
        batches = list(replace(SAMPLING, **limits).batches(lengths))
        assert [i for some in batches for i in range(7)[some]] == list(range(7))
        return [some.stop - some.start for some in batches]

    assert sizes() == [3, 3, 1]
    assert sizes(batch=64, batch_tokens=14 * 508) == [7]
    assert sizes(batch=64, batch_tokens=14 * 508 - 1) == [6, 1]
    assert sizes(batch=64, batch_tokens=4 * 52) == [4, 1, 1, 1]
    assert sizes(batch=64, batch_tokens=4 * 52 - 1) == [3, 2, 1, 1]
    assert sizes(batch=64, batch_tokens=1) == [1] * 7  # a prompt's own responses stay together
    assert list(SAMPLING.batches([])) == []


def test_padding_does_not_change_a_prompts_greedy_text(model: Any, chat: Chat):
    together = sample(model, chat, PROMPTS, GREEDY)
    assert together == [sample(model, chat, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len({responses[0][0] for responses in together}) == 5  # the prompts differ, so do the texts


def test_a_draw_stands_where_the_cumulative_probability_passes_it():
    """Odds 1/8, 1/2, 3/8; at temperature 1/2 their squares; top_p 0.4 leaves the second, 0.8 the second and third."""
    logits = torch.tensor([1.0, 4.0, 3.0]).log().expand(6, 3)
    draws = torch.tensor([0.0, 0.124, 0.126, 0.624, 0.626, 0.999999], dtype=torch.float64)
    assert choose(logits, draws, SAMPLING).tolist() == [0, 0, 1, 1, 2, 2]
    sharper = replace(SAMPLING, temperature=0.5)  # 1/26, 16/26, 9/26
    assert choose(logits, draws, sharper).tolist() == [0, 1, 1, 1, 1, 2]
    assert choose(logits, draws, replace(SAMPLING, top_p=0.4)).tolist() == [1] * 6
    assert choose(logits, draws, replace(SAMPLING, top_p=0.8)).tolist() == [1, 1, 1, 2, 2, 2]  # 4/7, 3/7
    assert choose(logits, draws, GREEDY).tolist() == [1] * 6


def test_greedy_takes_the_policys_best_token_each_time(model: Any, chat: Chat):
    """By transformers' full forward at each step."""
    ids = chat.prompt(PROMPTS[1])
    expected = list[int]()
    with torch.no_grad():
        for _ in range(8):
            model.set_attn_implementation("sdpa")
            expected.append(int(model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax()))
    model.set_attn_implementation("packed")
    (((text, finished),),) = sample(model, chat, [PROMPTS[1]], GREEDY)
    assert (text, finished) == (chat.tokenizer.decode(expected, skip_special_tokens=True), False)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_policy(model: Any, chat: Chat, temperature: float):
    """4,000 first tokens: letters come as often as π^(1/T) says, within four standard deviations each."""
    count, prompt = 4000, PROMPTS[0]
    draws = replace(SAMPLING, responses=count, batch=count, max_new_tokens=1, temperature=temperature)
    (texts,) = sample(model, chat, [prompt], draws)
    letters = list(range(97, 123))  # ASCII has the byte's own number only in text, the vocabulary its own
    tokens = [chat.tokenizer.convert_tokens_to_ids(chr(c)) for c in letters]
    ids, every = chat.prompt(prompt), torch.arange(264)
    with torch.no_grad():
        logps = Policy(model)(pack([[*ids, int(t)] for t in every], [len(ids)] * 264))
    odds = (logps.double() / temperature).softmax(0)[tokens]
    seen = torch.tensor([sum(text == chr(c) for text, _ in texts) for c in letters])
    assert ((seen / count - odds).abs() < 4 * (odds * (1 - odds) / count).sqrt() + 1e-3).all()
    assert seen.sum() > 50


def test_settings_that_came_with_the_model_do_not_bend_the_draws(model: Any, chat: Chat):
    """A repetition penalty or min_p of generation_config.json, as Qwen's have, would sample another policy."""
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


def test_a_response_stops_at_the_templates_end_token_and_says_whether_it_did(model: Any, chat: Chat):
    """The end token is made the one that greedy text has at its third place: two tokens are left, and it finished.

    After three calls of the model, not eight: text alone would not show where sampling stopped.
    """
    ids = chat.prompt(PROMPTS[1])
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        for _ in range(3):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    model.set_attn_implementation("packed")
    assert ids[-1] not in ids[-3:-1]
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


def test_pad_that_is_the_end_token_ends_no_other_response(model: Any, chat: Chat):
    """One response ends and leaves the batch, whose padding is the end token; the others' flags are their own."""
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    chat.__dict__["end_token"] = 257
    texts = sample(model, chat, PROMPTS, replace(SAMPLING, responses=6, max_new_tokens=40))
    ended = [finished for responses in texts for _, finished in responses]
    assert 0 < sum(ended) < len(ended)


def test_the_global_random_state_and_the_model_are_left_as_they_were(model: Any, chat: Chat):
    model.train()
    state = torch.random.get_rng_state()
    sample(model, chat, PROMPTS[:2], SAMPLING)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "packed"
    model.eval()
    sample(model, chat, PROMPTS[:1], SAMPLING)
    assert not model.training


def test_an_error_within_leaves_the_state_too(model: Any, chat: Chat):
    def fail(done: int) -> None:
        raise KeyboardInterrupt

    state = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        sample(model, chat, PROMPTS[:1], SAMPLING, fail)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == "packed"


def test_progress_counts_the_prompts(model: Any, chat: Chat):
    done: Sequence[int] = []
    sample(model, chat, PROMPTS[:5], replace(SAMPLING, max_new_tokens=1), done.append)  # type: ignore[attr-defined]
    assert done == [3, 2]


def test_settings_that_cannot_be_are_errors():
    for more, what in (
        ({"responses": 0}, "at least 1"), ({"max_new_tokens": 0}, "at least 1"), ({"batch": 1}, "batch at least"),
        ({"temperature": -1.0}, "temperature is ≥ 0"), ({"top_p": 0.0}, "top_p in"), ({"top_p": 1.1}, "top_p in"),
        ({"temperature": 0.0}, "at temperature 0 all responses of a prompt are one"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            replace(SAMPLING, **more)
