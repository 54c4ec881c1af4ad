"""Tokenizers of the kinds that models have, small, with the control tokens of a chat template."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from notebooks.tiny import byte_tokenizer

CORPUS = [
    "the harbour wall keeps the tide out of the old town. what is two and two? it is four.\n\n" * 4,
    "def add(a, b):\n    return a + b\n\n\nuser assistant system model tool name arguments [INST] <<SYS>> {}\n",
    "### Assistant:\n    <b>bold</b> |im_start|> |eot_id|> start_of_turn> 日本語 naïve café 😀\n" * 2,
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
WORDS = Regex(r"\p{N}|[^\s\p{N}]+|\s*[\r\n]+|\s+")


def train_bytes(trim: bool = False, normalizer: Any = None, split: bool = False) -> Tokenizer:
    """Return a BPE of bytes. trim: offsets exclude spaces, as GPT-2's do. split: digits and words apart, as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    words = pre_tokenizers.Split(WORDS, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, level]) if split else level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_sentencepiece(prepend: str) -> Tokenizer:
    """Return a BPE of characters with bytes for unknown ones and ▁ for spaces.

    prepend: where a space is added: to the `first` text, `always` to every text between control tokens, `never`, or
    by the `normalizer`, as in the first converted tokenizers.
    """
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *fallback], show_progress=False)
    trained.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    trained.model.byte_fallback = True
    trained.model.fuse_unk = True
    tokenizer = Tokenizer(trained.model)
    spaces = [normalizers.Replace(" ", "▁")]
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
    elif prepend == "never":
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    strip = [] if prepend == "never" else [decoders.Strip(content=" ", left=1)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: byte_tokenizer(None).backend_tokenizer,  # no merges
    "gpt2": lambda: train_bytes(trim=True),
    "qwen": lambda: train_bytes(normalizer=normalizers.NFC(), split=True),
    "split": lambda: train_bytes(split=True),  # as Llama 3's
    "strip": train_bytes,  # its control tokens swallow the spaces around them, as Phi-3's
    "added": train_bytes,  # its control tokens are not special
    "first": lambda: train_sentencepiece("first"),
    "always": lambda: train_sentencepiece("always"),
    "prepend": lambda: train_sentencepiece("normalizer"),
    "gemma": lambda: train_sentencepiece("never"),  # line ends are added tokens
}
SENTENCEPIECE = {"first", "always", "prepend", "gemma"}
LOSES_SPACES = {"strip", "first", "always", "prepend"}  # the decoded text has other spaces around control tokens


@lru_cache
def train(kind: str) -> str:
    return KINDS[kind]().to_str()


def build(kind: str, controls: Sequence[str], plain: Sequence[str], bos: str | None, eos: str, smollm2: Path) -> Any:
    """Return a tokenizer with some control tokens and other added tokens that are not special (`plain`).

    kind: one of KINDS, or smollm2 for the real one.
    """
    if kind == "smollm2":
        found = AutoTokenizer.from_pretrained(smollm2)
        found.add_special_tokens({"additional_special_tokens": list(controls)})
        found.add_tokens(list(plain))
        found.bos_token, found.eos_token = bos, eos
        return found
    inner = Tokenizer.from_str(train(kind))
    swallow = kind == "strip"
    ends = [name for name in (bos, eos) if name]
    turns = [name for name in controls if name not in ends]
    inner.add_special_tokens([make(name, swallow) for name in ends])
    if kind == "added":
        inner.add_tokens([make(name, special=False) for name in turns])
    else:
        inner.add_special_tokens([make(name, swallow) for name in turns])
    inner.add_tokens([make(name, special=False) for name in plain])
    if kind == "gemma":
        inner.add_tokens([make("\n" * n, special=False) for n in range(1, 5)])
        inner.add_tokens([make("▁" * n, special=False) for n in range(2, 5)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos and make(bos, swallow), eos_token=make(eos, swallow)
    )


def make(text: str, swallow: bool = False, special: bool = True) -> AddedToken:
    return AddedToken(text, special=special, normalized=False, lstrip=swallow, rstrip=swallow)
