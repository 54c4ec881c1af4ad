"""The model card: what it names, and its usage snippet, which runs as it is pasted."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from notebooks.tiny import byte_tokenizer
from tests.helpers.models import CARD, decoder, pretrained, saved, tiny_model
from var.data.chat import Chat
from var.models.export import export
from var.models.lora import LoRA
from var.rewards.classifier import Classifier
from var.utils.hub import read_license

ASK = [{"role": "user", "content": "What is two and two?"}]


def paste(folder: Path) -> dict[str, Any]:
    """Run the snippet of a card; return its variables."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    return names


def attach(model: Any, folder: Path) -> Any:
    """Attach an adapter that changes the model."""
    model = LoRA(r=4, alpha=8, targets="all-linear", rslora=False, merge=False).attach(model, str(folder))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


def test_front_matter_names_base_and_license(tmp_path: Path):
    export(tiny_model(), Chat(byte_tokenizer()), tmp_path / "out", CARD)
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "tiny/base"
    card = (tmp_path / "out" / "README.md").read_text()
    for name in CARD.keys() - {"parts", "dtype", "quantization"}:
        assert str(CARD[name]) in card
    assert "loss:\n  _target_: var.losses.var.VAR\n  temperature: 0.25\n" in card
    assert front["license"] == read_license(str(tmp_path / "out")) == "apache-2.0"


@pytest.mark.parametrize("adapter", [False, True])
def test_snippet_of_a_language_model_gives_its_logits(adapter: bool, tiny_folder: Path, tmp_path: Path):
    model = tiny_model()
    if adapter:
        pytest.importorskip("peft")
        model = attach(pretrained(tiny_folder, tmp_path).load(), tiny_folder)
    export(model, Chat(byte_tokenizer()), tmp_path / "out", CARD)
    names = paste(tmp_path / "out")
    ids = torch.tensor([Chat(byte_tokenizer()).prompt(ASK)])
    assert torch.equal(names["ids"], ids)
    assert names["output"].shape[1] > ids.shape[1]
    again = pretrained(tmp_path / "out", tmp_path).load()
    again.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert_close(names["model"](input_ids=ids).logits, again(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_snippet_of_a_reward_model_gives_its_score(
    adapter: bool, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = decoder()
    if adapter:
        pytest.importorskip("peft")
        model = attach(pretrained(tiny_folder, tmp_path).load_scorer(new_head=True), tiny_folder)
        model.score.weight.data.normal_()
    export(model, Chat(byte_tokenizer()), tmp_path / "out", CARD)
    paste(tmp_path / "out")
    reward = Classifier(path=str(tmp_path / "out"), cache=str(tmp_path))
    (expected,) = reward([ASK], ["Four."], [None])
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(expected, abs=1e-5)
    assert expected != 0


def test_snippet_loads_the_base_in_4_bit(tmp_path: Path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    base = saved(tmp_path / "base", tiny_model(hidden_size=128, intermediate_size=256))
    files = pretrained(base, tmp_path, quantization="nf4")
    export(attach(files.load(), base), files.chat, tmp_path / "out", {**CARD, "quantization": "nf4"})
    names = paste(tmp_path / "out")
    again = pretrained(tmp_path / "out", tmp_path, quantization="nf4").load()
    again.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = again(input_ids=names["ids"]).logits
        assert_close(names["model"](input_ids=names["ids"]).logits, logits, rtol=0, atol=1e-4)
