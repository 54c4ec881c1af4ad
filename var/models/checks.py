"""Check a model's kind and its vocabulary by its config, before its weights are loaded."""

from collections.abc import Callable
from typing import Any

from var.utils.errors import Problems, UserError


def check_decoder(config: Any, typed: str) -> None:
    """Raise a UserError if the config is not that of a decoder of text. typed: the setting and its value."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    kind = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        what = "an encoder-decoder model"
    elif config.get_text_config() is not config:
        what = "a multimodal model"
    elif not known or kind.endswith("ForMaskedLM"):
        what = "not a causal language model"
    else:
        return
    raise UserError(f"{typed}: {kind} is {what}. Use a decoder-only language model of text, such as Llama or Qwen.")


def check_kinds(config: Any) -> None:
    """Raise a ValueError if the names of classes in a config are not texts."""
    kinds = config.architectures
    if not (kinds is None or (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds))):
        raise ValueError(f"architectures must be a list of names, got {kinds}")


def is_classifier(config: Any) -> bool:
    """Return whether a config is that of a sequence classifier, so that the files should have a head."""
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())


def list_foreign_tokens(tokenizer: Any, config: Any) -> dict[str, int]:
    """Return the tokens of a tokenizer that have no embedding, with their ids. A larger embedding is only padded."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return {} if rows is None else {t: i for t, i in sorted(tokenizer.get_vocab().items()) if i >= rows}


def check_vocabulary(tokenizer: Any, config: Any, render: Callable[[], str], typed: str, key: str) -> None:
    """Raise a UserError if the tokenizer is not the model's, or its chat template writes a token without an embedding.

    A token that was added to the tokenizer and that no text contains is not an error.

    Args:
        tokenizer: the tokenizer.
        config: the model's config.
        render: returns a conversation, rendered by the chat template.
        typed: the setting and its value, which a message starts with.
        key: the setting of the chat template.
    """
    if not (foreign := list_foreign_tokens(tokenizer, config)):
        return
    rows = config.get_text_config().vocab_size
    problems = Problems(f"{typed}: the model has {rows} embeddings, too few for its tokenizer", 5)
    added = tokenizer.get_added_vocab()
    for token, number in foreign.items():
        if token not in added:
            problems.add(f"token {token!r}, id {number}", "it is in the tokenizer's own vocabulary")
    problems.check("This tokenizer belongs to another model. Copy the files of the model's own tokenizer there.")
    written = set(tokenizer(render(), add_special_tokens=False)["input_ids"])
    for token, number in foreign.items():
        if number in written:
            problems.add(f"token {token!r}, id {number}", "the chat template writes it")
    problems.check(
        f"Set {key} to a template without it, or use a model whose embeddings were resized to its tokenizer "
        "(model.resize_token_embeddings)."
    )
