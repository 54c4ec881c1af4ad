"""Load models from safetensors: from the hub, a folder, a LoRA adapter on its base, or an installed package."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from var.data.chat import Chat
from var.data.template import read_date
from var.models.files import ModelFiles
from var.models.lora import merge_adapter
from var.utils.console import say
from var.utils.errors import UserError
from var.utils.files import atomic

ADAPTER = "adapter_config.json"  # peft's file in a folder with an adapter; it names the base
# One of these is in each tokenizer. Without any, transformers may build an empty one.
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tokenizer_config.json")

# On some CPUs bitsandbytes warns at import that an optional package is missing; it then uses its own kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Pretrained(ModelFiles):
    """A causal language model by name. Nothing is loaded before it is used.

    A LoRA adapter of peft loads as its base with the adapter merged into the weights, in `dtype`. If the base is
    quantized, the adapter stays separate.

    Attributes:
        repository: Hub id of the model that `architecture` describes; None if that is `path`.
        chat_template: Jinja template, .jinja file or `plain`; None is the tokenizer's own.
        chat_template_kwargs: Arguments of the template, such as enable_thinking.
        date: Date as YYYY-MM-DD that the template reads from the clock; None for the one in `date_file`.
        date_file: Keeps the date of a run's first start; None to read the clock each time.
        dtype: dtype of the parameters.
        attention: `packed`, or a GPU kernel for bf16: `varlen` or `flash_attention_2`; `auto`: `with_attention_for`.
        compile: Whether to compile each layer with torch.compile.
        quantization: Quantization of the linear layers, by bitsandbytes, or None.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        architecture: Sizes of the model, from which `build_meta` builds it without a download; None reads config.json.
    """

    repository: str | None = None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None = None
    date: str | None = None
    date_file: Path | None = field(default=None, compare=False)
    dtype: str
    attention: str
    compile: bool = False
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    gradient_checkpointing: bool
    architecture: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"model.dtype: expected a floating-point dtype such as float32, got {self.dtype!r}.")
        if self.attention not in ("auto", "packed", "varlen", "flash_attention_2"):
            names = "auto, packed, varlen or flash_attention_2"
            raise UserError(f"model.attention: expected {names}, got {self.attention!r}.")
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise UserError("model.attention=flash_attention_2 needs the package flash-attn. Use packed without it.")
        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.quantization needs an extra: pip install -e '.[quantization]'")

    def with_attention_for(self, gpu: bool, half: bool) -> "Pretrained":
        """Return a copy without attention=auto: `varlen` on a GPU in bf16 (half: by autocast), else `packed`."""
        half = half or self.dtype == "bfloat16"
        return replace(self, attention="varlen" if gpu and half else "packed") if self.attention == "auto" else self

    @property
    def kernel(self) -> str:
        """The attention implementation, which is never `auto`."""
        return "packed" if self.attention == "auto" else self.attention

    @cached_property
    def base(self) -> "Pretrained | None":
        """The model that the adapter in the folder belongs to; None if the folder contains a complete model."""
        folder = self.config_folder
        if not (folder / ADAPTER).exists():
            return None
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"{folder} is an adapter, which needs an extra: pip install -e '.[adapters]'")
        config = json.loads((folder / ADAPTER).read_text())
        if config.get("peft_type") != "LORA":
            raise UserError(
                f"{folder} is an adapter of type {config.get('peft_type')}, and only LORA is supported. Merge it "
                "into its base with peft, and use the folder of the merged model."
            )
        name = str(config.get("base_model_name_or_path") or "")
        if not name or (name.startswith((".", "/", "~")) and not Path(name).is_dir()):
            raise UserError(
                f"{folder / ADAPTER}: base_model_name_or_path={name!r} is not a folder on this machine. "
                "Set it to the folder of the base or to its name on the hub."
            )
        return replace(self, path=name, revision=config.get("revision"), key=str(folder / ADAPTER))

    @cached_property
    def weights(self) -> str:
        """A hash of the weights and of their config; of an adapter, including its base. No weights are downloaded."""
        if self.base is None:
            return self.hash_files("config.json", "*.safetensors")
        own = self.hash_files(ADAPTER, "adapter_model.safetensors")
        return hashlib.sha256(f"{self.base.weights} {own}".encode()).hexdigest()[:32]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the model's results depend on. Raise a UserError if it is not a decoder of text."""
        check_decoder(self.config, self.typed)
        fingerprint = {
            "weights": self.weights, "dtype": self.dtype, "template": self.chat.template.fingerprint,
            "tokenizer": self.chat.fingerprint,
        }  # fmt: skip
        return {**fingerprint, "quantization": self.quantization} if self.quantization else fingerprint

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer; if an adapter has none, that of its base."""
        from transformers import AutoTokenizer

        folder = self.config_folder
        if self.base is not None and not (folder / "tokenizer_config.json").exists():
            return self.base.tokenizer
        if not any(file.match(pattern) for file in folder.iterdir() for pattern in TOKENIZERS):
            raise UserError(f"{self.typed}: it has no tokenizer (tokenizer.json). Copy the tokenizer's files there.")
        with self.explain_reading("tokenizer"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """Transformers' config; that of an adapter is its base's."""
        return self.base.config if self.base is not None else self._read_config()

    def _read_config(self, folder: Path | None = None) -> Any:
        from transformers import AutoConfig

        folder = folder or self.config_folder
        if not (folder / "config.json").exists():
            raise UserError(
                f"{self.typed}: it has no config.json, so it is not a model in Hugging Face form. To continue a run, "
                "set init to its folder. Other forms, such as GGUF, must be converted."
            )
        with self.explain_reading("config.json"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer with its chat template."""
        own = self.tokenizer.chat_template
        today = read_date(self.date, self.date_file)
        arguments = self.chat_template_kwargs, today, self._read_end_tokens()
        chat = Chat(self.tokenizer, self.chat_template, self.path, *arguments)
        if chat.template.reads_clock and self.date is None:
            say(f"The chat template of {self.path} writes the current date; model.date={today} for this run.")
            if self.date_file is not None and not self.date_file.exists():
                with atomic(self.date_file, shared=True) as file:
                    file.write(today.isoformat())
        if own and own != chat.tokenizer.chat_template:
            origin = f"the configuration of {self.repository} or the command line"
            say(
                f"model.chat_template, from {origin if self.repository else 'the configuration'}, replaces the chat "
                f"template of {self.path}. Set model.chat_template=null to use the model's own."
            )
        return chat

    def _read_end_tokens(self) -> dict[str, Any]:
        """Return the end tokens that the model's files name: an id, a list of ids or None."""
        file = (self.base or self).config_folder / "generation_config.json"
        generation = json.loads(file.read_text()) if file.exists() else {}
        return {"generation_config.json": generation.get("eos_token_id"), "config.json": self.config.eos_token_id}

    def load(self) -> Any:
        """Load the transformers model on the CPU, in evaluation mode and without dropout."""
        from transformers import AutoModelForCausalLM

        return self._prepare(self._load(AutoModelForCausalLM))

    def build_empty(self) -> Any:
        """Build the model of `load` with its parameters on the meta device, for a model larger than a host's memory.

        After the model is sharded, `fill` reads its weights.
        """
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = self._read_config()
        options = self._options
        del options["use_safetensors"]
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, **options)
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return self._prepare(model)

    def fill(self, model: Any) -> None:
        """Read the weights of a sharded model. All ranks call this, and each reads its own part."""
        from torch.distributed import checkpoint

        checkpoint.load(untied_weights(model), storage_reader=checkpoint.HuggingFaceStorageReader(str(self.folder)))

    def can_fill(self, model: Any) -> bool:
        """Return whether `fill` finds all weights: transformers renames and merges some weights when it loads."""
        names: set[str] = set()
        for file in self.folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                names |= set(weights.keys())
        return untied_weights(model).keys() <= names

    def load_scorer(self) -> Any:
        """Load the model as a sequence classifier with one label. A new head is zero, so that scores start equal."""
        from transformers import AutoModelForSequenceClassification

        tokenizer = self.chat.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return self._prepare(self._load(AutoModelForSequenceClassification, num_labels=1, pad_token_id=pad))

    def _load(self, kind: Any, **more: Any) -> Any:
        if self.base is not None:
            return merge_adapter(self.base._load(kind, **more), self.folder, keep=self.quantization is not None)
        try:
            with self.explain_reading("weights"):
                model, found = kind.from_pretrained(self.folder, output_loading_info=True, **self._options, **more)
        except KeyError as error:
            if error.args != (self.kernel,):
                raise
            raise UserError(
                f"model.path={self.path}: {self.config.model_type} does not support attention={self.kernel}. "
                "Models of this family cannot be packed."
            ) from error
        if "score.weight" in found["missing_keys"]:
            torch.nn.init.zeros_(model.score.weight)
        return model

    @property
    def _options(self) -> dict[str, Any]:
        import var.models.attention  # noqa: F401  registers packed and varlen attention

        if self.kernel == "varlen" and not torch.cuda.is_available():
            raise UserError("model.attention=varlen needs a CUDA device. Use model.attention=packed without one.")
        options = {
            "dtype": getattr(torch, self.dtype), "attn_implementation": self.kernel,
            "trust_remote_code": self.trust_remote_code, "use_safetensors": True,
        }  # fmt: skip
        if self.quantization:
            from transformers import BitsAndBytesConfig

            kind = self.quantization
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=kind == "int8", load_in_4bit=kind != "int8", bnb_4bit_use_double_quant=True,
                bnb_4bit_quant_type=kind if kind != "int8" else "nf4", bnb_4bit_compute_dtype=options["dtype"],
            )  # fmt: skip
            options |= {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
        return options

    def _prepare(self, model: Any) -> Any:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for owner in (model.config, *model.modules()):  # families name their dropout rates differently
            for name, value in list(vars(owner).items()):
                if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
                    setattr(owner, name, 0.0)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.compile:
            for block in blocks(model):
                block.compile(dynamic=True)
        return model.eval()

    def build_meta(self) -> Any:
        """Build the model on the meta device, to count parameters.

        The sizes are from a folder's config, from `architecture`, or from config.json on the hub, downloaded alone.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        if Path(self.path).is_dir() and self.base is not None:
            return self.base.build_meta()
        if Path(self.path).is_dir():
            config = self.config
        elif self.architecture and self.repository in (None, self.path):
            sizes = dict(self.architecture)
            config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        else:
            folder = None if self.package or self.trust_remote_code else self.download_config()
            config = self.config if folder is None else self._read_config(folder)
        check_decoder(config, self.typed)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device. Buffers keep their values: those of rotary embeddings are in no file."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter stays the same object
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


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


def untied_weights(model: Any) -> dict[str, Any]:
    """Return the weights of a model without those that are tied to another weight."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: weight for name, weight in model.state_dict().items() if name not in tied}


def blocks(model: Any) -> Iterator[torch.nn.Module]:
    """Return the layers of a transformers model, which are sharded and compiled one by one."""
    names = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def find_model(run: str, key: str = "init") -> Path:
    """Return the folder of the model that a run exported; `run` may also be the folder of a model or a LoRA adapter.

    key is the setting in messages. Raises a UserError if there is no model, or if it is a reward model.
    """
    if not run:
        raise UserError(f"{key} is empty (unset shell variable?). Use {key}=null for none.")
    for folder in (Path(run).expanduser() / "model", Path(run).expanduser()):
        if (folder / ADAPTER).exists():
            if json.loads((folder / ADAPTER).read_text()).get("task_type") == "SEQ_CLS":
                raise UserError(f"{key}={run} is the adapter of a reward model. Use that of a language model.")
            return folder
        if (folder / "config.json").exists():
            kind = (json.loads((folder / "config.json").read_text()).get("architectures") or [""])[0]
            if kind.endswith("ForSequenceClassification"):
                raise UserError(
                    f"{key}={run} is a reward model. To score with it, use reward=classifier reward.path={folder}."
                )
            return folder
    raise UserError(f"{key}={run} is neither a finished run (its folder has no model/) nor the folder of a model.")
