"""The model card of an exported model: what it was made of, what ran, and how to use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from var.utils.files import atomic

CARD = """---
{front}---

# {name}

Made from {origin} by the loss `{loss}` with [VAR](https://arxiv.org/abs/2502.11026)'s codebase var-align {version}.

| | before | after |
| --- | --- | --- |
{table}

- weights before training: {origin}
- license of these weights: {license}
- data: {data}, license: {data_license}, hash of the plan `{plan}`
- reward: {reward}
- trained for {steps} optimizer steps, seed {seed}{changes}
- chat template: in `chat_template.jinja`; use it unchanged, the model was trained with it

Loss and reward, as they ran:

```yaml
{parts}```

## Usage

```python
{usage}```

The complete configuration is in `config.yaml` next to the model.
"""
GENERATE = """\
messages = [{"role": "user", "content": "What is two and two?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = inputs["input_ids"]
output = model.generate(input_ids=ids, attention_mask=inputs["attention_mask"], max_new_tokens=100)
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
"""
SCORE = """\
messages = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]
text = tokenizer.apply_chat_template(messages, tokenize=False)  # it has the BOS
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
print(model(input_ids=ids).logits[0, 0].item())
"""


def write_card(folder: Path, card: Mapping[str, Any], place: Path | None = None) -> None:
    """Write the model card of an exported model. place: where the folder will be, if it is moved afterwards."""
    front = {
        **({"base_model": card["base"]} if card["base"] else {}),
        **({"license": card["license"]} if card["license"] else {}),
        "library_name": "peft" if (folder / "adapter_config.json").exists() else "transformers",
        "tags": ["alignment", card["loss"]],
    }
    known = {name: card[name] or "not known" for name in ("license", "data_license")}
    text = CARD.format(
        **{
            **card, **known, "front": yaml.safe_dump(front, sort_keys=False),
            "usage": make_usage(folder, place or folder, card["dtype"], card["quantization"]),
            "parts": yaml.safe_dump(card["parts"], sort_keys=False, allow_unicode=True),
        }
    )  # fmt: skip
    with atomic(folder / "README.md") as file:
        file.write(text)


def make_usage(folder: Path, place: Path, dtype: str, quantization: str | None) -> str:
    """Return Python code that loads the model or adapter in a folder with transformers and runs it.

    Args:
        folder: where the files are now.
        place: where they will be.
        dtype: of the weights under an adapter, in training.
        quantization: of these weights, or None.
    """
    adapter = folder / "adapter_config.json"
    config = json.loads((adapter if adapter.exists() else folder / "config.json").read_text())
    kinds = config.get("architectures") or []
    scores = config.get("task_type") == "SEQ_CLS" or any(kind.endswith("ForSequenceClassification") for kind in kinds)
    kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    names = [kind, "AutoTokenizer"]
    lines = [f"path = {json.dumps(str(place.resolve()))}  # or its name on the hub"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(path)"]
    if adapter.exists():
        options = [json.dumps(config["base_model_name_or_path"])]
        options += [f'revision="{config["revision"]}"'] if config.get("revision") else []
        options += [f'dtype="{dtype}"']
        if quantization:
            names.append("BitsAndBytesConfig")
            bits = ["load_in_8bit=True"] if quantization == "int8" else [
                "load_in_4bit=True", "bnb_4bit_use_double_quant=True",
                f"bnb_4bit_quant_type={json.dumps(quantization)}", f"bnb_4bit_compute_dtype={json.dumps(dtype)}",
            ]  # fmt: skip
            options += [f"quantization_config=BitsAndBytesConfig({', '.join(bits)})"]
        if scores:  # without a padding token, a batch cannot be scored
            lines += ["pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id"]
            options += ["num_labels=1", "pad_token_id=pad"]
        lines += [f"base = {kind}.from_pretrained({', '.join(options)})"]
        lines += ["model = PeftModel.from_pretrained(base, path).eval()"]
    else:
        lines += [f"model = {kind}.from_pretrained(path)"]
    head = ["from peft import PeftModel"] * adapter.exists() + [f"from transformers import {', '.join(sorted(names))}"]
    return "\n".join([*head, "", *lines]) + "\n" + (SCORE if scores else GENERATE)
