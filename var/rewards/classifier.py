"""A Hugging Face sequence classifier as reward model, such as OffsetBias-RM."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from var.config.run_files import read_mapping
from var.data.clock import read_date
from var.data.messages import Message, Prompt
from var.data.template import Template, hash_tokenizer
from var.data.template_file import read_template
from var.models.attention import list_lengths
from var.models.checks import check_vocabulary
from var.models.files import ADAPTER
from var.models.frozen import free_memory
from var.models.packing import whole
from var.models.pretrained import Pretrained
from var.models.reward_model import RewardModel
from var.models.simulate import measure_activations
from var.models.structure import build_meta_scorer, check_saved_parts, list_head, list_positions
from var.rewards.base import Answers, Prompts
from var.utils.distributed import bind_device
from var.utils.errors import Problems, UserError

DECODERS = {"llama", "qwen2", "qwen3", "mistral"}  # models whose attention can be replaced by the packed one
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # endings of language models' class names
LIMIT = 4096  # the default of max_length, if the model has as many positions
ADVICE = "Leave these rows out, or choose a reward model that reads them."
PROBE = [{"role": "user", "content": "probe"}]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Score the chat-rendered prompt and response with the raw logit of a classifier with one label.

    The template writes the only BOS.
    """

    path: str  # hub id, folder with safetensors, folder of a PEFT adapter, or folder of a finished run
    revision: str | None = None  # commit or tag of the hub
    chat_template: str | None = None  # replaces the tokenizer's
    date: str | None = None  # YYYY-MM-DD, which the template reads from the clock; None: today's
    dtype: str = "float32"  # of the weights; part of the cache key
    max_length: int | None = None  # tokens; a longer text is an error. None: the model's positions, at most 4096
    tokens: int = 8192  # tokens per forward pass, in packed rows
    cache: str = "~/.cache/var-align"
    repository: str | None = None  # hub id of the model that `architecture` describes; None: that is `path`
    architecture: Mapping[str, Any] = field(default_factory=dict, compare=False)  # sizes, for debug=dry without the hub
    device: str = field(default="auto", compare=False)
    key: str = field(default="reward", compare=False)  # where these settings are, for messages

    scores_text = True

    def __post_init__(self) -> None:
        for name in ("max_length", "tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{self.key}.{name}={value}: must be at least 1")

    @cached_property
    def _files(self) -> Pretrained:
        model = Path(self.path).expanduser() / "model"  # in the folder of a finished run
        path = str(model) if any((model / name).exists() for name in ("config.json", ADAPTER)) else self.path
        return Pretrained(
            name=Path(self.path).name, path=path, key=f"{self.key}.path", revision=self.revision,
            chat_template=self.chat_template, dtype=self.dtype, attention="auto", trust_remote_code=False,
            gradient_checkpointing=False, repository=self.repository, architecture=self.architecture, cache=self.cache,
        )  # fmt: skip

    @property
    def _typed(self) -> str:
        return f"{self.key}.path={self.path}"

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._files.tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template, f"{self.key}.chat_template")
        if not tokenizer.chat_template:
            raise UserError(
                f"{self._typed}: the reward model has no chat template, so its scores would be meaningless. "
                f"Set {self.key}.chat_template to the template it was trained with"
            )
        return tokenizer

    @cached_property
    def _template(self) -> Template:
        today = read_date(self.date, f"{self.key}.date")
        return Template(self._tokenizer, today=today, key=f"{self.key}.chat_template")

    @cached_property
    def _config(self) -> Any:
        """The configuration of the model. Raise a `UserError` if it is not a classifier with one label."""
        files = self._files
        if files.base is not None:
            kind = read_mapping(files.config_folder / ADAPTER).get("task_type")
            if kind != "SEQ_CLS":
                raise UserError(f"{self._typed}: expected an adapter of a reward model (task_type SEQ_CLS), got {kind}")
            return files.config  # loading checks the shape of the head
        config = files.config
        if kinds := [kind for kind in config.architectures or () if kind.endswith(GENERATIVE)]:
            raise UserError(
                f"{self._typed}: expected a sequence classifier with one label, got a language model "
                f"({kinds[0]}). loss=bradley_terry trains a classifier."
            )
        if config.num_labels != 1:
            raise UserError(f"{self._typed}: expected a classifier with one label, got {config.num_labels}")
        return config

    @cached_property
    def _limit(self) -> int:
        """The longest text in tokens. Raise a `UserError` if the model has fewer positions than max_length."""
        limits = list(list_positions(self._meta))
        if self._is_packed:
            limits += list_lengths(self._config)
        most, reason = min(limits, default=(self.max_length or LIMIT, ""))
        if self.max_length is not None and self.max_length > most:
            raise UserError(
                f"{self.key}.max_length={self.max_length}: {self._typed} {reason}. Set it to at most {most}, or to "
                "null for the model's own limit."
            )
        return self.max_length or min(most, LIMIT)

    @cached_property
    def _meta(self) -> Any:
        """The model without its weights."""
        config = copy.deepcopy(self._config)
        config.num_labels = 1  # the default of a language model's config, on which an adapter was trained, is 2
        return build_meta_scorer(config, self._typed)

    @property
    def _placed(self) -> Pretrained:
        """The files, with the attention of the device."""
        return self._files.with_attention_for(gpu=self._device.startswith("cuda"), half=False)

    @property
    def _is_packed(self) -> bool:
        return self._config.model_type in DECODERS

    @cached_property
    def _scorer(self) -> RewardModel:
        model = self._placed.load_scorer(packed=self._is_packed).requires_grad_(False)
        return RewardModel(model.to(self._device)).eval()

    @property
    def _device(self) -> str:
        return bind_device() if self.device == "auto" else self.device

    @property
    def license(self) -> str | None:
        """The license of the model, or None if it is not known here."""
        return self._files.license

    @property
    def origin(self) -> str:
        """The weights that are used, in words."""
        return self._files.origin

    def release(self) -> None:
        """Free the loaded model. The next use loads it again."""
        if self.__dict__.pop("_scorer", None) is not None:
            free_memory()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Hashes of weights, tokenizer and template, and the settings. Raise an error if the model cannot score."""
        self._check()
        return {
            "weights": self._files.weights, "dtype": self.dtype, "template": self._template.fingerprint,
            "tokenizer": hash_tokenizer(self._tokenizer), "max_length": self._limit,
        }  # fmt: skip

    def _check(self) -> None:
        """Raise errors of the model, its template, its positions, its vocabulary and its head, before it is needed."""
        config, key = self._config, f"{self.key}.chat_template"
        check_vocabulary(self._tokenizer, config, lambda: self._render(PROBE, "probe"), self._typed, key)
        self.encode(PROBE, "probe")
        self._limit  # noqa: B018
        if self._files.base is not None:
            check_saved_parts(self._files.config_folder, self._meta)
        shapes, head = self._files.weight_shapes, list_head(self._meta)
        if shapes is not None and any(shapes.get(name, ()) not in (None, shape) for name, shape in head.items()):
            self._scorer  # noqa: B018  transformers decides: it may find the head under an earlier name

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
        length = min(self.max_length or LIMIT, self.tokens)
        passes = measure_activations(config, max(1, self.tokens // length), length, dtype=dtype, train=False)
        return float(parameters * dtype.itemsize + max(passes))

    @torch.inference_mode()
    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one logit per response."""
        rows = [self.encode(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        problems = Problems(f"{self._typed}: texts that it cannot score", shown=5)
        for ids, response in zip(rows, responses, strict=True):
            if fault := self._find_fault(ids):
                problems.add(f"response {response[:60]!r}", fault)
        problems.check(ADVICE)
        scores: list[float] = []
        batch: list[list[int]] = []
        for i, ids in enumerate(rows):
            batch.append(ids)
            if i + 1 == len(rows) or sum(map(len, batch)) + len(rows[i + 1]) > self.tokens:
                scores.extend(self._scorer(whole(batch).to(self._device)).float().tolist())
                batch = []
        return scores

    def text_fault(self, prompt: Sequence[Message], response: str) -> str | None:
        """Return why the model cannot score a text, or None."""
        return self._find_fault(self.encode(prompt, response))

    def _find_fault(self, ids: Sequence[int]) -> str | None:
        rows = getattr(self._config.get_text_config(), "vocab_size", None)
        if len(ids) > self._limit:
            return f"it has {len(ids)} tokens with its prompt, more than {self.key}.max_length={self._limit}"
        if rows is not None and (token := max(ids, default=0)) >= rows:
            name = self._tokenizer.convert_ids_to_tokens(token)
            return f"token {name!r}, id {token}, is beyond the {rows} embeddings of {self._typed}"
        return None

    def _render(self, prompt: Sequence[Message], response: str) -> str:
        asked = Prompt(prompt, getattr(prompt, "tools", ()))  # without the policy's arguments of the template
        return self._template.render([*asked, {"role": "assistant", "content": response}], asked)

    def encode(self, prompt: Sequence[Message], response: str) -> list[int]:
        """Return the tokens that the reward model reads."""
        ids = self._template.tokenize(self._render(prompt, response)).ids
        bos = self._tokenizer.bos_token
        if bos and ids[:2] == [self._tokenizer.bos_token_id] * 2:
            raise UserError(
                f"{self._typed}: two BOS tokens ({bos}) at the start: the reward model's template writes both. Set "
                f"{self.key}.chat_template to one that writes one."
            )
        return ids
