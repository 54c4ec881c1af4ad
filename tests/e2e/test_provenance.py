"""Model card, adapter config and summary name what ran: classes with their arguments, weights and licenses."""

import json
from pathlib import Path

import pytest

from notebooks.tiny import ROOT
from tests.helpers.cli import check_run, read_summary
from tests.helpers.models import pretrained
from tests.helpers.runs import run_folder
from var.models.gguf import MODEL_PACKAGES, unpack


def test_replaced_classes_are_named(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The option's name would claim what did not run; an option with other arguments keeps its name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    check_run(
        "train.py", *(option for option in options if not option.startswith("reward")), "reward=exact_number",
        "reward._target_=brevity.Brevity", "+reward.words=7", "trainer.max_steps=1",
    )  # fmt: skip
    folder = run_folder(tmp_path / "runs")
    summary, card = read_summary(folder), (folder / "model" / "README.md").read_text()
    assert summary["ran"]["reward"] == {"_target_": "brevity.Brevity", "words": 7}
    assert summary["ran"]["loss"]["_target_"] == "var.losses.sft.SFT"
    assert summary["title"].endswith("sft")
    assert "- reward: `Brevity`" in card
    assert "reward:\n  _target_: brevity.Brevity\n  words: 7\n" in card
    assert "exact_number" not in card


def test_packaged_weights_are_named(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are de-quantized, so an adapter that names the repository would be put on other weights."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = pretrained(name, smollm2.parents[1])
    assert files.location == (str(unpack(MODEL_PACKAGES[name].name, smollm2).resolve()), None)
    assert "de-quantized from Q4_1" in files.origin
    assert files.license == "apache-2.0"


def test_license_and_origin_follow_an_adapter_to_its_base(tiny_folder: Path, tmp_path: Path):
    base = pretrained(tiny_folder, tmp_path)
    assert (base.license, base.origin) == (None, str(tiny_folder.resolve()))
    (tmp_path / "a").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder)}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    pytest.importorskip("peft")
    adapter = pretrained(tmp_path / "a", tmp_path)
    assert adapter.origin == f"{tiny_folder.resolve()}, with the adapter {(tmp_path / 'a').resolve()}"
    (tmp_path / "a" / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    assert adapter.license == "mine"
