"""A Hugging Face sequence classifier as reward model, such as OffsetBias-RM."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from var.data.messages import Message, Prompt
from var.data.template import Template, hash_tokenizer, read_template
from var.models.frozen import free_memory
from var.models.packing import whole
from var.models.pretrained import ADAPTER, Pretrained
from var.models.reward_model import RewardModel
from var.models.simulate import measure_activations
from var.rewards.base import Answers, Prompts
from var.utils.distributed import bind_device
from var.utils.errors import UserError

DECODERS = {"llama", "qwen2", "qwen3", "mistral"}  # models whose attention can be replaced by the packed one
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # endings of language models' class names


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Score the chat-rendered prompt and response with the raw logit of a classifier with one label.

    The template writes the only BOS.
    """

    path: str  # hub id, folder with safetensors, folder of a PEFT adapter, or folder of a finished run
    revision: str | None = None  # commit or tag of the hub
    chat_template: str | None = None  # replaces the tokenizer's
    dtype: str = "float32"  # of the weights; part of the cache key
    max_length: int = 4096  # tokens; a longer row is an error
    tokens: int = 8192  # tokens per forward pass, in packed rows
    cache: str = "~/.cache/var-align"
    architecture: Mapping[str, Any] = field(default_factory=dict, compare=False)  # sizes, for debug=dry without the hub
    device: str = field(default="auto", compare=False)

    scores_text = True

    @cached_property
    def _files(self) -> Any:
        model = Path(self.path).expanduser() / "model"  # in the folder of a finished run
        path = str(model) if any((model / name).exists() for name in ("config.json", ADAPTER)) else self.path
        return Pretrained(
            name=Path(self.path).name, path=path, key="reward.path", revision=self.revision,
            chat_template=self.chat_template, dtype=self.dtype, attention="auto", trust_remote_code=False,
            gradient_checkpointing=False, architecture=self.architecture, cache=self.cache,
        )  # fmt: skip

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._files.tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template, "reward.chat_template")
        if not tokenizer.chat_template:
            raise UserError(
                f"reward.path={self.path}: the reward model has no chat template, so its scores would be meaningless. "
                "Set reward.chat_template to the template it was trained with"
            )
        return tokenizer

    @cached_property
    def _template(self) -> Template:
        return Template(self._tokenizer, key="reward.chat_template")

    @cached_property
    def _config(self) -> Any:
        """The configuration of the model. Raise a `UserError` if it is not a classifier with one label."""
        files = self._files
        if files.base is not None:
            kind = json.loads((files.config_folder / ADAPTER).read_text()).get("task_type")
            if kind != "SEQ_CLS":
                raise UserError(
                    f"reward.path={self.path}: expected an adapter of a reward model (task_type SEQ_CLS), got {kind}"
                )
            return files.config  # the adapter has the head with one label
        config = files.config
        if kinds := [kind for kind in config.architectures or () if kind.endswith(GENERATIVE)]:
            raise UserError(
                f"reward.path={self.path}: expected a sequence classifier with one label, got a language model "
                f"({kinds[0]}). loss=bradley_terry trains a classifier."
            )
        if config.num_labels != 1:
            raise UserError(f"reward.path={self.path}: expected a classifier with one label, got {config.num_labels}")
        return config

    @cached_property
    def _scorer(self) -> RewardModel:
        from transformers import AutoModelForSequenceClassification

        import var.models.attention  # noqa: F401  registers the packed attention

        packed = self._config.model_type in DECODERS
        kernel = self._files.with_attention_for(gpu=self._device.startswith("cuda"), half=False).kernel
        if self._files.base is not None:
            model = replace(self._files, attention=kernel if packed else "sdpa").load_scorer()
            return RewardModel(model.requires_grad_(False).to(self._device)).eval()
        options = {"attn_implementation": kernel} if packed else {}
        model, report = AutoModelForSequenceClassification.from_pretrained(
            self._files.folder, dtype=getattr(torch, self.dtype), use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
        if missing := sorted(report["missing_keys"]):  # transformers would initialize them at random, with a warning
            raise UserError(f"reward.path={self.path}: the reward model lacks weights: {', '.join(missing)}")
        return RewardModel(model.to(self._device)).eval()

    @property
    def _device(self) -> str:
        return bind_device() if self.device == "auto" else self.device

    def release(self) -> None:
        """Free the loaded model. The next use loads it again."""
        if self.__dict__.pop("_scorer", None) is not None:
            free_memory()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Hashes of weights, tokenizer and template, and the settings. Raise errors of the model and its template."""
        self._config  # noqa: B018
        return {
            "weights": self._files.weights, "dtype": self.dtype, "template": self._tokenizer.chat_template,
            "tokenizer": hash_tokenizer(self._tokenizer), "max_length": self.max_length,
        }  # fmt: skip

    def measure_memory(self) -> float | None:
        """Return the bytes of the model with a forward pass, or None if its sizes are not known here."""
        try:
            model = self._files.build_meta()
        except (UserError, KeyError):
            return None
        config = copy.deepcopy(model.config)
        config.vocab_size = 8  # a classifier has no logits
        head = model.get_output_embeddings().weight
        tied = head is model.get_input_embeddings().weight
        parameters = sum(p.numel() for p in model.parameters()) - (0 if tied else head.numel())
        dtype = getattr(torch, self.dtype)
        length = min(self.max_length, self.tokens)
        passes = measure_activations(config, max(1, self.tokens // length), length, dtype=dtype, train=False)
        return float(parameters * dtype.itemsize + max(passes))

    @torch.inference_mode()
    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one logit per response."""
        rows = [self.encode(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        if longer := [ids for ids in rows if len(ids) > self.max_length]:
            raise UserError(f"reward.max_length={self.max_length}: {len(longer)} responses are longer. Increase it")
        scores: list[float] = []
        batch: list[list[int]] = []
        for i, ids in enumerate(rows):
            batch.append(ids)
            if i + 1 == len(rows) or sum(map(len, batch)) + len(rows[i + 1]) > self.tokens:
                scores.extend(self._scorer(whole(batch).to(self._device)).float().tolist())
                batch = []
        return scores

    def encode(self, prompt: Sequence[Message], response: str) -> list[int]:
        """Return the tokens that the reward model reads."""
        template, asked = self._template, Prompt(prompt, getattr(prompt, "tools", ()))  # not the policy's arguments
        ids = template.tokenize(template.render([*asked, {"role": "assistant", "content": response}], asked)).ids
        bos = self._tokenizer.bos_token
        if bos and ids[:2] == [self._tokenizer.bos_token_id] * 2:
            raise UserError(f"two BOS tokens ({bos}) at the start: the reward model's template writes both")
        return ids
