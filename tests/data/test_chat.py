"""Chat templates: the position of the response, BOS and end token, and errors of unusable templates."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.runs import ROOT
from var.data.chat import Chat
from var.data.template_file import read_template
from var.utils.errors import UserError

BOS, END, USER, ASSISTANT = 256, 257, 258, 259
ASK = [{"role": "user", "content": "ab"}]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def merge_bytes(template: str, *merges: str, trim: bool = False) -> Any:
    """Return the byte tokenizer with some pairs of bytes merged. trim: offsets exclude spaces, as those of GPT-2 do."""
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


def test_response_span_includes_the_end_token(tokenizer: Any):
    """<bos><user>ab<end><assistant>xyz<end>: 6 tokens of prompt, 3 bytes and the end token of response."""
    encoded = Chat(tokenizer).encode(ASK, "xyz")
    assert encoded.start == 6
    assert encoded.ids[:2] == [BOS, USER]
    assert encoded.ids[4:6] == [END, ASSISTANT]
    assert decode(tokenizer, encoded.ids[6:]) == "xyz<end>"
    assert encoded.ids[-1] == END == Chat(tokenizer).end_token


@pytest.mark.parametrize("response", ["x", " x", "x ", "\n", "é", "日本\n", "e\u0301", "😀", "<user>", "a<end>b"])
def test_prompt_tokens_are_a_prefix_for_any_response(tokenizer: Any, response: str):
    """Also for characters of several tokens, and for text that looks like a special token."""
    chat = Chat(tokenizer)
    encoded = chat.encode([{"role": "system", "content": "é "}, *ASK], response)
    assert encoded.ids[: encoded.start] == chat.prompt([{"role": "system", "content": "é "}, *ASK])
    assert decode(tokenizer, encoded.ids[encoded.start :]) == response + "<end>"


def test_unfinished_response_has_no_end_token(tokenizer: Any):
    encoded = Chat(tokenizer).encode(ASK, "xyz", finished=False)
    assert decode(tokenizer, encoded.ids[encoded.start :]) == "xyz"


def test_only_the_last_answer_of_several_turns_is_trained(tokenizer: Any):
    turns = [*ASK, {"role": "assistant", "content": "no"}, {"role": "user", "content": "cd"}]
    encoded = Chat(tokenizer).encode(turns, "xyz")
    assert decode(tokenizer, encoded.ids[encoded.start :]) == "xyz<end>"
    assert (
        decode(tokenizer, encoded.ids[: encoded.start])
        == "<bos><user>ab<end><assistant>no<end><user>cd<end><assistant>"
    )


def test_template_with_two_bos_is_an_error():
    """Two BOS at the start: OpenRLHF #393, huggingface/trl #1073."""
    chat = Chat(byte_tokenizer("{{ bos_token }}" + TEMPLATE))
    for call in (lambda: chat.prompt(ASK), lambda: chat.encode(ASK, "x")):
        with pytest.raises(ValueError, match=r"two BOS tokens \(<bos>\) at the start"):
            call()


def test_tokenizer_that_adds_bos_does_not_duplicate_it():
    """Llama's tokenizers add a BOS, and so does the template. Only the template's is used here."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )  # fmt: skip
    chat = Chat(tokenizer)
    assert tokenizer(chat.render(ASK))["input_ids"][:2] == [BOS, BOS]  # the trap
    assert chat.prompt(ASK).count(BOS) == chat.encode(ASK, "x").ids.count(BOS) == 1
    assert chat.encode(ASK, "x").start == 6


def test_end_token_is_kept_if_pad_equals_eos():
    """If EOS is masked because pad = eos, the model never stops: huggingface/trl #1623."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encoded = Chat(tokenizer).encode(ASK, "xyz")
    assert (encoded.start, encoded.ids[-1]) == (6, END)


def test_text_after_the_end_token_is_dropped():
    """Such as the newline after <|im_end|>, which sampling never reaches."""
    template = TEMPLATE.replace("'<end>'", "'<end>\n'")
    tokenizer = byte_tokenizer(template)
    chat = Chat(tokenizer)
    assert chat.suffix == "<end>\n"
    encoded = chat.encode(ASK, "xyz")
    assert encoded.ids[-1] == END
    assert decode(tokenizer, encoded.ids[encoded.start :]) == "xyz<end>"


def test_prompt_that_renders_differently_with_answer_is_an_error():
    """If the prompt is not a prefix of prompt + response, the mask shifts: huggingface/trl #5213.

    Some templates shorten earlier turns.
    """
    template = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'][:1])")
    chat = Chat(byte_tokenizer(template))
    chat.__dict__["suffix"] = "<end>"  # the probe cannot determine it for such a template
    with pytest.raises(ValueError, match=r"renders the prompt differently once it is answered: '.*<user>ab<end>"):
        chat.encode(ASK, "x")


def test_generation_prompt_that_is_not_a_prefix_is_an_error():
    template = TEMPLATE.replace("{{ '<assistant>' }}", "{{ '<assistant>think' }}")
    with pytest.raises(UserError, match=r"is not a prefix of a rendered answer.*Set model\.chat_template"):
        _ = Chat(byte_tokenizer(template)).suffix


def test_template_that_strips_spaces_trains_the_rendered_text():
    tokenizer = byte_tokenizer(TEMPLATE.replace("m['content']", "m['content'] | trim"))
    chat = Chat(tokenizer)
    encoded = chat.encode([{"role": "user", "content": " ab "}], " xyz\n")
    assert decode(tokenizer, encoded.ids) == "<bos><user>ab<end><assistant>xyz<end>"
    with pytest.raises(ValueError, match="the response is empty after rendering by the template"):
        chat.encode(ASK, " \n")


def test_llama2_template_trains_the_space_before_the_answer():
    """It writes ' ' + content + eos, and the generation prompt has no space."""
    conf = OmegaConf.load(ROOT / "conf" / "model" / "_llama2.yaml")
    tokenizer = byte_tokenizer(conf.chat_template)
    chat = Chat(tokenizer)
    turns = [{"role": "system", "content": "be brief"}, *ASK, {"role": "assistant", "content": "no"}, *ASK]
    for prompt in (ASK, turns):
        encoded = chat.encode(prompt, "xyz")
        assert decode(tokenizer, encoded.ids[encoded.start :]) == " xyz<end>"
        assert encoded.ids[: encoded.start] == chat.prompt(prompt)
        assert encoded.ids.count(BOS) == 1


def test_missing_template_is_an_error():
    with pytest.raises(UserError, match=r"has no chat template.*Set model\.chat_template"):
        Chat(byte_tokenizer(None))
    assert Chat(byte_tokenizer(None), TEMPLATE).encode(ASK, "x").start == 6


def test_template_without_end_token_is_an_error():
    chat = Chat(byte_tokenizer(TEMPLATE.replace(" + '<end>'", "")))
    with pytest.raises(UserError, match=r"never learn to stop. Set model\.chat_template"):
        _ = chat.end_token


def test_slow_tokenizer_is_an_error():
    class Slow:
        chat_template, is_fast, name_or_path = TEMPLATE, False, "slow"

    with pytest.raises(UserError, match="the tokenizer of slow gives no offsets"):
        Chat(Slow())


@pytest.mark.parametrize("trim", [False, True])
def test_token_across_prompt_and_response_is_split(trim: bool):
    """'<assistant> ' and 'x' would merge into one token ' x', so that sampling starts from an untrained prompt.

    With trim the offsets do not show it: the token's begin after its space.
    """
    chat = Chat(merge_bytes(TEMPLATE.replace("<assistant>", "<assistant> ").replace("'>'", "'> '"), "Ġx", trim=trim))
    assert chat.encode(ASK, "yx").start == 8
    for finished, end in ((True, [chat.end_token]), (False, [])):
        encoded = chat.encode(ASK, "xy", finished)
        assert encoded.ids[: encoded.start] == chat.prompt(ASK)
        assert encoded.ids[encoded.start :] == [*chat.tokenizer.convert_tokens_to_ids(["x", "y"]), *end]


def test_indented_code_keeps_its_indent(smollm2: Path, real_data: Path):
    """ChatML's prompt ends with a newline, which merges with the spaces of all HumanEval solutions."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = Chat(tokenizer)
    with gzip.open(real_data / "humaneval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    for problem in problems:
        prompt = [{"role": "user", "content": problem["prompt"]}]
        encoded = chat.encode(prompt, problem["canonical_solution"])
        assert encoded.ids[: encoded.start] == chat.prompt(prompt)
        assert tokenizer.decode(encoded.ids[encoded.start : -1]) == problem["canonical_solution"]


@pytest.mark.parametrize("end", ["#", "\n\n", "</s>"])
def test_end_of_ordinary_text_is_an_error(end: str):
    """Text can contain the end, and a token can span it and the response, as 'x#' does."""
    chat = Chat(merge_bytes(TEMPLATE.replace("'<end>'", repr(end)), "x#"))
    named = re.escape(f"the token {end[0]!r} of ordinary text")
    with pytest.raises(UserError, match=rf"{named}.*such as '<end>', or to plain"):
        chat.encode(ASK, "xy")


def test_plain_template_needs_an_end_token():
    tokenizer = byte_tokenizer(template=None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"a special token\. The tokenizer has no eos_token, which plain needs"):
        Chat(tokenizer, "plain").encode(ASK, "xy")


@pytest.mark.parametrize("response", ["x  ", "  ", " x", "x \n"])
def test_spaces_are_kept_if_offsets_exclude_them(response: str):
    """With GPT-2's trimmed offsets, a token of spaces has an empty span at the end of the response."""
    tokenizer = merge_bytes(TEMPLATE, "ĠĠ", "ĠĊ", trim=True)
    encoded = Chat(tokenizer).encode(ASK, response)
    assert decode(tokenizer, encoded.ids[encoded.start :]) == response + "<end>"


def test_smollm2_trains_the_answer_and_im_end(smollm2: Path):
    """The real template adds a system turn, and writes one <|im_start|> per turn. <|im_end|> is trained."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = Chat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.end_token) == "<|im_end|>"
    for response in ("Two.", " Two\n\n", "\nzwei é", "x  "):
        encoded = chat.encode([{"role": "user", "content": "1 + 1?\n"}], response)
        assert decode(tokenizer, encoded.ids[encoded.start :]) == response + "<|im_end|>"
        assert encoded.ids[: encoded.start] == chat.prompt([{"role": "user", "content": "1 + 1?\n"}])
        assert decode(tokenizer, encoded.ids[: encoded.start]).endswith("<|im_start|>assistant\n")
        assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_space_before_the_end_token_is_trained() -> None:
    """Llama 2's own template writes ` </s>` after an answer. The end token is the special one, not the space."""
    template = TEMPLATE.replace("'<end>'", "' <end>'")
    chat = Chat(byte_tokenizer(template))
    encoded = chat.encode([{"role": "user", "content": "q"}], "yes")
    assert chat.tokenizer.decode(encoded.ids[encoded.start :]) == "yes <end>"
    assert encoded.ids[-1] == chat.end_token == chat.tokenizer.convert_tokens_to_ids("<end>")


def test_template_is_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert read_template("{{ x }}") == "{{ x }}"
    assert read_template(str(tmp_path / "own.jinja")) == "{{ messages[0]['content'] }}"
    (tmp_path / "mark.jinja").write_text("{{ messages }}", encoding="utf-8-sig")  # Notepad's byte order mark
    assert read_template(str(tmp_path / "mark.jinja")) == "{{ messages }}"
    with pytest.raises(UserError, match=r"reward\.chat_template=absent\.jinja is not a file"):
        read_template("absent.jinja", "reward.chat_template")


def test_plain_template_can_be_trained_and_sampled() -> None:
    tokenizer = byte_tokenizer(template=None)
    chat = Chat(tokenizer, "plain")
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]
    encoded = chat.encode(prompt, "Hello")
    assert chat.tokenizer.decode(encoded.ids[encoded.start :]) == "Hello<end>"
    assert encoded.ids[: encoded.start] == chat.prompt(prompt)
    assert chat.end_token == tokenizer.eos_token_id
