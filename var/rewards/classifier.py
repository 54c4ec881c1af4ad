"""A Hugging Face sequence classifier as reward model; OffsetBias-RM is one configuration of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from var.data.chat import fingerprint, rendered
from var.data.rows import Message
from var.models.packing import whole
from var.models.pretrained import ADAPTER, Pretrained
from var.models.reward_model import RewardModel
from var.utils.errors import UserError

DECODERS = {"llama", "qwen2", "qwen3", "mistral"}  # `score` on a backbone that attends by AttentionInterface
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how transformers ends a language model's name


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The raw logit of a one-label classifier for the chat-rendered prompt and response.

    path: hub id, folder with safetensors or of a LoRA adapter of PEFT's, or a finished run's folder. chat_template:
    where the tokenizer has none. dtype: of the weights; it is in the store's key. tokens: packed tokens at once. The
    template writes the BOS; no second one is added.
    """

    path: str
    revision: str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    max_length: int = 4096
    tokens: int = 8192
    cache: str = "~/.cache/var-align"
    device: str = field(default="auto", compare=False)

    scores_text = True

    @cached_property
    def _files(self) -> Any:
        find_model = Path(self.path) / "model"  # of a finished run
        path = str(find_model) if any((find_model / name).exists() for name in ("config.json", ADAPTER)) else self.path
        return Pretrained(
            name=Path(self.path).name, path=path, revision=self.revision, chat_template=self.chat_template,
            dtype=self.dtype, attention="packed", trust_remote_code=False, gradient_checkpointing=False,
            architecture={}, cache=self.cache,
        )  # fmt: skip

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._files.tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        if not tokenizer.chat_template:
            raise UserError(
                f"the reward model {self.path} has no chat template, so its scores would mean nothing; set "
                "reward.chat_template to the one that it was trained with"
            )
        return tokenizer

    @cached_property
    def _config(self) -> Any:

        files = self._files
        if files.base is not None:
            kind = json.loads((files.folder / ADAPTER).read_text()).get("task_type")
            if kind != "SEQ_CLS":
                raise UserError(
                    f"reward.path={self.path} is an adapter for {kind}, and a reward model's is for SEQ_CLS"
                )
            return files.config  # the adapter brings the one label itself
        config = files.config
        if kinds := [kind for kind in config.architectures or () if kind.endswith(GENERATES)]:
            raise UserError(
                f"reward.path={self.path} is a language model ({kinds[0]}), which gives no score; a reward model is a "
                "sequence classifier with one label, as loss=bradley_terry trains it"
            )
        if config.num_labels != 1:
            raise UserError(f"the reward model {self.path} has {config.num_labels} labels; a reward model has one")
        return config

    @cached_property
    def _scorer(self) -> RewardModel:
        from transformers import AutoModelForSequenceClassification

        import var.models.attention  # noqa: F401  registers the packed attention

        packed = self._config.model_type in DECODERS
        if self._files.base is not None:
            model = replace(self._files, attention="packed" if packed else "sdpa").load_scorer()
            return RewardModel(model.requires_grad_(False).to(self._device)).eval()
        options = {"attn_implementation": "packed"} if packed else {}
        model, found = AutoModelForSequenceClassification.from_pretrained(
            self._files.folder, dtype=getattr(torch, self.dtype), use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
        if found["missing_keys"]:  # transformers would fill them at random, with a warning
            raise UserError(f"the reward model {self.path} lacks weights: {', '.join(sorted(found['missing_keys']))}")
        return RewardModel(model.to(self._device)).eval()

    @property
    def _device(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def identity(self) -> dict[str, Any]:
        self._config  # noqa: B018  what is no reward model is told before anything is sampled
        return {
            "weights": self._files.weights, "dtype": self.dtype, "template": self._tokenizer.chat_template,
            "tokenizer": fingerprint(self._tokenizer), "max_length": self.max_length,
        }  # fmt: skip

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        rows = [self.encode(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        if longer := [i for i, ids in enumerate(rows) if len(ids) > self.max_length]:
            raise UserError(f"{len(longer)} responses are longer than reward.max_length={self.max_length} tokens")
        scores: list[float] = []
        batch: list[list[int]] = []
        for i, ids in enumerate(rows):
            batch.append(ids)
            if i + 1 == len(rows) or sum(map(len, batch)) + len(rows[i + 1]) > self.tokens:
                scores.extend(self._scorer(whole(batch).to(self._device)).float().tolist())
                batch = []
        return scores

    def encode(self, prompt: Sequence[Message], response: str) -> list[int]:
        """The tokens that the reward model sees."""
        messages = [*prompt, {"role": "assistant", "content": response}]
        text = rendered(self._tokenizer, messages, add_generation_prompt=False)
        bos = self._tokenizer.bos_token
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if bos and ids[:2] == [self._tokenizer.bos_token_id] * 2:
            raise UserError(f"two BOS tokens ({bos}) at the start: the reward model's template writes one twice")
        return ids
