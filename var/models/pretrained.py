"""Load models from safetensors: from the hub, a folder, a LoRA adapter on its base, or an installed package."""

import hashlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from var.config.run_files import read_mapping
from var.data.chat import Chat
from var.data.clock import read_date
from var.models.checks import check_decoder, check_kinds, check_vocabulary, is_classifier
from var.models.files import ADAPTER, ModelFiles
from var.models.lora import HEAD, merge_adapter
from var.models.structure import Shapes, blocks, parameters_on_meta, read_weight_shapes, untied_weights
from var.utils.console import say
from var.utils.errors import UserError
from var.utils.extras import name_install

# One of these is in each tokenizer. Without any, transformers may build an empty one.
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tokenizer_config.json")

ASK = [{"role": "user", "content": ""}]  # shows which tokens a chat template writes

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
        date: Date as YYYY-MM-DD that the template reads from the clock; None for today's.
        dtype: dtype of the parameters.
        attention: `packed`, or a GPU kernel for bf16: `varlen` or `flash_attention_2`; `auto`: `with_attention_for`.
        compile: Whether to compile each layer with torch.compile.
        quantization: Quantization of the linear layers, by bitsandbytes, or None.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        architecture: Sizes of the model, from which `build_meta` builds it without a download; None reads config.json.
    """

    repository: str | None = None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
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
            raise UserError(f"{self.group}.dtype: expected a floating-point dtype such as float32, got {self.dtype!r}.")
        if self.attention not in ("auto", "packed", "varlen", "flash_attention_2"):
            names = "auto, packed, varlen or flash_attention_2"
            raise UserError(f"model.attention: expected {names}, got {self.attention!r}.")
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise UserError("model.attention=flash_attention_2 needs the package flash-attn. Use packed without it.")
        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"model.quantization needs an extra: {name_install('quantization')}")

    def with_attention_for(self, gpu: bool, half: bool) -> "Pretrained":
        """Return a copy without attention=auto: `varlen` on a GPU in bf16 (half: by autocast), else `packed`."""
        half = half or self.dtype == "bfloat16"
        return replace(self, attention="varlen" if gpu and half else "packed") if self.attention == "auto" else self

    def at(self, path: str, **changes: Any) -> "Pretrained":
        """Return the model elsewhere, with changed fields. Code there never runs: `trust_remote_code` is of `path`."""
        return replace(self, **{"path": path, "revision": None, "trust_remote_code": False, **changes})

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
            raise UserError(f"{folder} is an adapter, which needs an extra: {name_install('adapters')}")
        config = read_mapping(folder / ADAPTER)
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
        return self.at(name, revision=config.get("revision"), key=str(folder / ADAPTER))

    @property
    def origin(self) -> str:
        """The weights that are used, in words; of an adapter, with its base."""
        return super().origin if self.base is None else f"{self.base.origin}, with the adapter {super().origin}"

    @property
    def license(self) -> str | None:
        """The license of the weights; of an adapter without a license, that of its base."""
        return super().license or (None if self.base is None else self.base.license)

    @cached_property
    def weights(self) -> str:
        """A hash of the weights and of their config; of an adapter, including its base. No weights are downloaded."""
        if self.base is None:
            return self.hash_files("config.json", "*.safetensors")
        own = self.hash_files(ADAPTER, "adapter_model.safetensors")
        return hashlib.sha256(f"{self.base.weights} {own}".encode()).hexdigest()[:32]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the model's results depend on. Raise a UserError if it is not a decoder of text with its tokenizer."""
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
            config = AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
            check_kinds(config)
            return config

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer with its chat template. Raise a UserError if the model lacks embeddings for them."""
        own = self.tokenizer.chat_template
        today = read_date(self.date)
        arguments = self.chat_template_kwargs, today, self._read_end_tokens(), self.config.vocab_size
        chat = Chat(self.tokenizer, self.chat_template, self.path, *arguments)
        check_vocabulary(
            chat.tokenizer, self.config, lambda: chat.render(ASK) + chat.suffix, self.typed,
            f"{self.group}.chat_template",
        )  # fmt: skip
        if chat.template.reads_clock:
            say(f"The chat template of {self.path} writes the current date: model.date={today}.")
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
        generation = read_mapping(file) if file.exists() else {}
        return {"generation_config.json": generation.get("eos_token_id"), "config.json": self.config.eos_token_id}

    def load(self) -> Any:
        """Load the transformers model on the CPU, in evaluation mode and without dropout."""
        from transformers import AutoModelForCausalLM

        model, missing = self._load(AutoModelForCausalLM)
        self._check_complete(missing)
        return self._prepare(model)

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
        return untied_weights(model).keys() <= (read_weight_shapes(self.folder) or {}).keys()

    def load_scorer(self, new_head: bool = False, packed: bool = True) -> Any:
        """Load the model as a sequence classifier with one label. A head that is in no file is an error.

        Args:
            new_head: whether a language model gets a new head instead, to train it. The head is zero, so that scores
                start equal.
            packed: whether sequences are packed; otherwise attention is the model's own.
        """
        from transformers import AutoModelForSequenceClassification

        more: dict[str, Any] = {"num_labels": 1}
        if not is_classifier(self.config):  # a classifier's own config says where its head is read
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            more["pad_token_id"] = pad if pad is not None else end
        model, missing = self._load(AutoModelForSequenceClassification, packed, **more)
        if new_head and missing == {f"{HEAD}.weight"}:
            torch.nn.init.zeros_(model.get_parameter(f"{HEAD}.weight"))
        else:
            self._check_complete(missing)
        return self._prepare(model)

    @property
    def weight_shapes(self) -> Shapes | None:
        """The weights in the files, of an adapter with those of its base; None if they are only on the hub."""
        if self.base is None:
            return read_weight_shapes(self.config_folder)
        own, below = read_weight_shapes(self.config_folder, adapter=True), self.base.weight_shapes
        return None if own is None or below is None else {**below, **own}

    def _check_complete(self, missing: set[str]) -> None:
        """Raise a UserError for weights that are in no file. transformers initializes them at random."""
        if missing:
            names = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise UserError(
                f"{self.typed}: it lacks weights ({names}): they are in no file, or have another shape there, and "
                "would be random. Use a folder with the complete model."
            )

    def _load(self, kind: Any, packed: bool = True, **more: Any) -> tuple[Any, set[str]]:
        """Return the model, and the names of its weights that are in no file of it, of its adapter or of its base."""
        if self.base is not None:
            model, missing = self.base._load(kind, packed, **more)
            merged = merge_adapter(model, self.folder, keep=self.quantization is not None)
            return merged, missing - (read_weight_shapes(self.folder, adapter=True) or {}).keys()
        options = self._options
        if not packed:
            del options["attn_implementation"]
        try:
            with self.explain_reading("weights"):
                model, found = kind.from_pretrained(
                    self.folder, output_loading_info=True, ignore_mismatched_sizes=True, **options, **more
                )
        except KeyError as error:
            if error.args != (self.kernel,):
                raise
            raise UserError(
                f"{self.typed}: {self.config.model_type} does not support attention={self.kernel}. Models of this "
                "family cannot be packed."
            ) from error
        return model, {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}

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
