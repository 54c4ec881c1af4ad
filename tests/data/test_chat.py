"""Chat: the span of the response, the one BOS, the end token, and the templates that have none of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.runs import ROOT
from var.data.chat import Chat
from var.utils.errors import UserError

BOS, END, USER, ASSISTANT = 256, 257, 258, 259
ASK = [{"role": "user", "content": "ab"}]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def merging(template: str, *merges: str, trim: bool = False) -> Any:
    """The byte tokenizer with some pairs of bytes merged; trim: offsets leave spaces out, as GPT-2's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*alphabet, *merges])}
    inner = Tokenizer(models.BPE(vocab=pieces, merges=[(m[0], m[1]) for m in merges]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if trim:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    special = {"additional_special_tokens": ["<user>", "<assistant>", "<system>"]}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<end>", **special)
    fast.chat_template = template
    return fast


def test_the_span_is_the_response_and_its_end_token(tokenizer: Any):
    """<bos><user>ab<end><assistant>xyz<end>: 6 tokens of prompt, 3 bytes and the end token of response."""
    encoded = Chat(tokenizer).encode(ASK, "xyz")
    assert encoded.start == 6
    assert encoded.ids[:2] == [BOS, USER]
    assert encoded.ids[4:6] == [END, ASSISTANT]
    assert text_of(tokenizer, encoded.ids[6:]) == "xyz<end>"
    assert encoded.ids[-1] == END == Chat(tokenizer).end_token


@pytest.mark.parametrize("response", ["x", " x", "x ", "\n", "é", "日本\n", "e\u0301", "😀", "<user>", "a<end>b"])
def test_the_prompt_is_a_prefix_whatever_the_response(tokenizer: Any, response: str):
    """Where bytes of one character are several tokens too; and text that looks like a mark stays in the response."""
    chat = Chat(tokenizer)
    encoded = chat.encode([{"role": "system", "content": "é "}, *ASK], response)
    assert encoded.ids[: encoded.start] == chat.prompt([{"role": "system", "content": "é "}, *ASK])
    assert text_of(tokenizer, encoded.ids[encoded.start :]) == response + "<end>"


def test_an_unfinished_response_has_no_end_token(tokenizer: Any):
    encoded = Chat(tokenizer).encode(ASK, "xyz", finished=False)
    assert text_of(tokenizer, encoded.ids[encoded.start :]) == "xyz"


def test_several_turns_train_the_last_answer_alone(tokenizer: Any):
    turns = [*ASK, {"role": "assistant", "content": "no"}, {"role": "user", "content": "cd"}]
    encoded = Chat(tokenizer).encode(turns, "xyz")
    assert text_of(tokenizer, encoded.ids[encoded.start :]) == "xyz<end>"
    assert (
        text_of(tokenizer, encoded.ids[: encoded.start])
        == "<bos><user>ab<end><assistant>no<end><user>cd<end><assistant>"
    )


def test_two_bos_are_an_error_where_the_template_writes_two():
    """Two BOS at the start: OpenRLHF #393, huggingface/trl #1073."""
    chat = Chat(byte_tokenizer("{{ bos_token }}" + TEMPLATE))
    for call in (lambda: chat.prompt(ASK), lambda: chat.encode(ASK, "x")):
        with pytest.raises(ValueError, match=r"two BOS tokens \(<bos>\) at the start"):
            call()


def test_two_bos_do_not_come_of_a_tokenizer_that_adds_one():
    """Llama's tokenizers write a BOS of their own, and the template another; here the template's is the only one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )  # fmt: skip
    chat = Chat(tokenizer)
    assert tokenizer(chat.render(ASK))["input_ids"][:2] == [BOS, BOS]  # the trap
    assert chat.prompt(ASK).count(BOS) == chat.encode(ASK, "x").ids.count(BOS) == 1
    assert chat.encode(ASK, "x").start == 6


def test_pad_that_is_eos_masks_no_end_token():
    """EOS masked because pad = eos, so that the model never stops: huggingface/trl #1623."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encoded = Chat(tokenizer).encode(ASK, "xyz")
    assert (encoded.start, encoded.ids[-1]) == (6, END)


def test_what_follows_the_end_token_is_left_away():
    """The newline after <|im_end|>, which sampling never reaches."""
    template = TEMPLATE.replace("'<end>'", "'<end>\n'")
    tokenizer = byte_tokenizer(template)
    chat = Chat(tokenizer)
    assert chat.suffix == "<end>\n"
    encoded = chat.encode(ASK, "xyz")
    assert encoded.ids[-1] == END
    assert text_of(tokenizer, encoded.ids[encoded.start :]) == "xyz<end>"


def test_a_prompt_rendered_otherwise_once_it_is_answered_is_an_error():
    """The prompt's tokens are no prefix of prompt + response, and the mask shifts: huggingface/trl #5213.

    As templates do that leave out of earlier turns what the last one keeps.
    """
    template = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'][:1])")
    chat = Chat(byte_tokenizer(template))
    with pytest.raises(ValueError, match=r"renders the prompt differently once it is answered: '.*<user>ab<end>"):
        Chat.encode(_with_suffix(chat, "<end>"), ASK, "x")


def _with_suffix(chat: Chat, suffix: str) -> Chat:
    chat.__dict__["suffix"] = suffix  # what a template of this kind gives for the probe does not matter here
    return chat


def test_a_generation_prompt_that_no_answer_begins_with_is_an_error():
    template = TEMPLATE.replace("{{ '<assistant>' }}", "{{ '<assistant>think' }}")
    with pytest.raises(UserError, match=r"is no prefix of a rendered answer.*Set model\.chat_template"):
        _ = Chat(byte_tokenizer(template)).suffix


def test_a_template_that_strips_content_trains_what_it_renders():
    tokenizer = byte_tokenizer(TEMPLATE.replace("m['content']", "m['content'] | trim"))
    chat = Chat(tokenizer)
    encoded = chat.encode([{"role": "user", "content": " ab "}], " xyz\n")
    assert text_of(tokenizer, encoded.ids) == "<bos><user>ab<end><assistant>xyz<end>"
    with pytest.raises(ValueError, match="the response is empty once the template has rendered it"):
        chat.encode(ASK, " \n")


def test_llama_2s_template_trains_the_space_before_the_answer():
    """' ' + content + eos: the space belongs to the response, since the generation prompt does not write it."""
    conf = OmegaConf.load(ROOT / "conf" / "model" / "llama2-7b.yaml")
    tokenizer = byte_tokenizer(conf.chat_template)
    chat = Chat(tokenizer)
    turns = [{"role": "system", "content": "be brief"}, *ASK, {"role": "assistant", "content": "no"}, *ASK]
    for prompt in (ASK, turns):
        encoded = chat.encode(prompt, "xyz")
        assert text_of(tokenizer, encoded.ids[encoded.start :]) == " xyz<end>"
        assert encoded.ids[: encoded.start] == chat.prompt(prompt)
        assert encoded.ids.count(BOS) == 1


def test_no_template_is_an_error_that_names_the_setting():
    with pytest.raises(UserError, match=r"has no chat template.*set model\.chat_template"):
        Chat(byte_tokenizer(None))
    assert Chat(byte_tokenizer(None), TEMPLATE).encode(ASK, "x").start == 6


def test_a_template_without_an_end_is_an_error():
    chat = Chat(byte_tokenizer(TEMPLATE.replace(" + '<end>'", "")))
    with pytest.raises(UserError, match=r"never learn to stop; set model\.chat_template"):
        _ = chat.end_token


def test_a_slow_tokenizer_is_an_error():
    class Slow:
        chat_template, is_fast, name_or_path = TEMPLATE, False, "slow"

    with pytest.raises(UserError, match="the tokenizer of slow gives no offsets"):
        Chat(Slow())


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_border_is_taken_apart(trim: bool):
    """'<assistant> ' and 'x' meet in one token ' x': sampling would start from another prompt than was trained.

    With trim the offsets do not show it: the token's begin where its space ends.
    """
    chat = Chat(merging(TEMPLATE.replace("<assistant>", "<assistant> ").replace("'>'", "'> '"), "Ġx", trim=trim))
    assert chat.encode(ASK, "yx").start == 8
    for finished, end in ((True, [chat.end_token]), (False, [])):
        encoded = chat.encode(ASK, "xy", finished)
        assert encoded.ids[: encoded.start] == chat.prompt(ASK)
        assert encoded.ids[encoded.start :] == [*chat.tokenizer.convert_tokens_to_ids(["x", "y"]), *end]


def test_indented_code_keeps_its_indent(smollm2: Path, real_data: Path):
    """ChatML's prompt ends with a newline, one token with the spaces after it: all of HumanEval's solutions."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = Chat(tokenizer)
    with gzip.open(real_data / "humaneval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    for problem in problems:
        prompt = [{"role": "user", "content": problem["prompt"]}]
        encoded = chat.encode(prompt, problem["canonical_solution"])
        assert encoded.ids[: encoded.start] == chat.prompt(prompt)
        assert tokenizer.decode(encoded.ids[encoded.start : -1]) == problem["canonical_solution"]


def test_a_border_that_cannot_be_taken_apart_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """A tokenizer may put a space of its own before a text, as sentencepiece's do."""
    chat = Chat(merging(TEMPLATE.replace("<assistant>", "<assistant> ").replace("'>'", "'> '"), "Ġx"))
    monkeypatch.setattr(chat.tokenizer, "decode", lambda *_, **__: "another text")
    with pytest.raises(ValueError, match=r"one token spans the end of the prompt .* apart they are another text"):
        chat.encode(ASK, "xy")


def test_a_token_across_the_end_is_an_error():
    """The template ends an answer with plain text, '#', and 'x#' is one token: then no end token is found."""
    chat = Chat(merging(TEMPLATE.replace("'<end>'", "'#'"), "x#"))
    assert chat.encode(ASK, "xy").ids[-1] == chat.end_token
    with pytest.raises(ValueError, match="the response's end token cannot be found"):
        chat.encode(ASK, "yx")


@pytest.mark.parametrize("response", ["x  ", "  ", " x", "x \n"])
def test_spaces_of_a_response_are_kept_where_offsets_leave_them_out(response: str):
    """Offsets trimmed as GPT-2's: a token of spaces alone is then empty and stands at the response's end."""
    tokenizer = merging(TEMPLATE, "ĠĠ", "ĠĊ", trim=True)
    encoded = Chat(tokenizer).encode(ASK, response)
    assert text_of(tokenizer, encoded.ids[encoded.start :]) == response + "<end>"


def test_smollm2_trains_the_answer_and_im_end(smollm2: Path):
    """The real template and tokenizer: the system turn it adds, one <|im_start|> a turn, <|im_end|> trained."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = Chat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.end_token) == "<|im_end|>"
    for response in ("Two.", " Two\n\n", "\nzwei é", "x  "):
        encoded = chat.encode([{"role": "user", "content": "1 + 1?\n"}], response)
        assert text_of(tokenizer, encoded.ids[encoded.start :]) == response + "<|im_end|>"
        assert encoded.ids[: encoded.start] == chat.prompt([{"role": "user", "content": "1 + 1?\n"}])
        assert text_of(tokenizer, encoded.ids[: encoded.start]).endswith("<|im_start|>assistant\n")
        assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_a_space_before_the_end_token_is_trained_with_it() -> None:
    """Llama 2's own template writes ` </s>` after an answer; the end token is the special one, not the space."""
    template = TEMPLATE.replace("'<end>'", "' <end>'")
    chat = Chat(byte_tokenizer(template))
    encoded = chat.encode([{"role": "user", "content": "q"}], "yes")
    assert chat.tokenizer.decode(encoded.ids[encoded.start :]) == "yes <end>"
    assert encoded.ids[-1] == chat.end_token == chat.tokenizer.convert_tokens_to_ids("<end>")
