"""A resumed run uses the settings of its command, or rejects them by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from tests.helpers.runs import Killed, Result, assert_identical, column, composed, curve, fit, write_lines
from var.config.schema import pick_fields
from var.models.pretrained import Pretrained
from var.training.checkpoints import checkpoints
from var.training.checks import warn_of_other_arguments
from var.training.module import AlignmentModule
from var.training.run import Run
from var.training.summary import check_same_settings
from var.utils.errors import UserError

MORE = ("data.global_batch=4", "data.micro_batch=2", "trainer.precision=32-true", "trainer.checkpoint_every_n_steps=1")
STEP = 5


class AtStep(Callback):
    """Changes what trains by hand, between two optimizer steps."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP and batch_idx == 2 * STEP:
            self.change(trainer, module)


@pytest.fixture
def saved(options: list[str], tmp_path: Path) -> str:
    """Return the checkpoint of step 5 of a run of 20 steps, which is stopped there."""
    real, calls = AlignmentModule.training_step, [0]

    def step(self: AlignmentModule, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > 2 * STEP:
            raise Killed
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignmentModule, "training_step", step)
        with pytest.raises(Killed):
            fit(options, tmp_path / "first", *MORE)
    checkpoint = checkpoints(tmp_path / "first" / "checkpoints")[-1]
    assert checkpoint.stem == f"step-{STEP}"
    return str(checkpoint)


def change_by_hand(options: list[str], folder: Path, change: Any) -> Result:
    """Train without a break, and change something by hand after the fifth step."""
    folder.mkdir(parents=True)
    run = Run.compose(composed(*options, *MORE), folder)
    torch.manual_seed(0)
    trainer, module = run.trainer(AtStep(change)), run.module()
    trainer.fit(module, run.data)
    return run, {name: value.clone() for name, value in module.policy.state_dict().items()}, curve(folder)


def set_rate(trainer: Any, module: Any) -> None:
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    scheduler.base_lrs = [0.02]
    trainer.optimizers[0].param_groups[0]["lr"] = 0.02 * scheduler.lr_lambdas[0](STEP)


def set_group(**values: Any) -> Any:
    return lambda trainer, _: trainer.optimizers[0].param_groups[0].update(values)


def set_schedule(trainer: Any, module: Any) -> None:
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    scheduler.lr_lambdas = [lambda _: 1.0]
    trainer.optimizers[0].param_groups[0]["lr"] = scheduler.base_lrs[0]


def set_clipping(trainer: Any, module: Any) -> None:
    trainer.gradient_clip_val = 1e-3


@pytest.mark.parametrize(
    ("words", "change", "text"),
    [
        (["optim.optimizer.lr=0.02"], set_rate, "optim.optimizer.lr 0.003 → 0.02"),
        (["optim.optimizer.betas=[0.5,0.7]"], set_group(betas=(0.5, 0.7)),
         "optim.optimizer.betas [0.9, 0.95] → [0.5, 0.7]"),
        (["optim.optimizer.weight_decay=0.5", "optim.optimizer.eps=1e-3"], set_group(weight_decay=0.5, eps=1e-3),
         "optim.optimizer.eps 1e-08 → 0.001, optim.optimizer.weight_decay 0.0 → 0.5"),
        (["optim.schedule.kind=constant"], set_schedule, "optim.schedule.kind cosine → constant"),
        (["trainer.gradient_clip=1e-3"], set_clipping, "trainer.gradient_clip 1.0 → 0.001"),
    ],
)  # fmt: skip
def test_changed_setting_equals_a_change_by_hand(words, change, text, saved, options, tmp_path, capsys):
    resumed = fit(options, tmp_path / "resumed", *MORE, *words, f"resume={saved}")
    assert f"resume: {text} " in " ".join(capsys.readouterr().out.split())
    expected = change_by_hand(options, tmp_path / "straight", change)
    tail = [[row for row in result[2] if int(row["step"]) > STEP] for result in (resumed, expected)]
    assert_identical((*expected[:2], tail[1]), (*resumed[:2], tail[0]), "step", "train/loss", "train/lr")


def test_more_epochs_continue_with_the_schedule_of_their_length(options, tmp_path):
    """The first run ends at rate 0. The rates of the resumed one are those of its 30 steps."""
    first = (*MORE, "trainer.epochs=1", "optim.schedule.kind=linear")
    fit(options, tmp_path / "first", *first)
    checkpoint = checkpoints(tmp_path / "first" / "checkpoints")[-1]
    _, _, rows = fit(options, tmp_path / "more", *first, "trainer.epochs=3", f"resume={checkpoint}")
    straight = fit(options, tmp_path / "straight", *first, "trainer.epochs=3")[2]
    done = int(checkpoint.stem.removeprefix("step-"))
    assert column(rows, "step") == list(range(done + 1, 3 * done + 1))
    assert column(rows, "train/lr") == column(straight, "train/lr")[done:]


def test_everything_that_cannot_change_is_rejected_together(saved, options, tmp_path, monkeypatch):
    monkeypatch.setattr("var.models.pretrained.Pretrained.load", lambda *_: pytest.fail("loaded a model"))
    words = (
        "loss=weighted", "data.micro_batch=1", "data.global_batch=8", "seed=1", "adapter=lora", "model.dtype=bfloat16",
        "optim.optimizer.fused=false", "trainer.max_steps=3", "trainer.epochs=9", "optim.optimizer.lr=1.0",
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        Run.compose(composed(*options, *MORE, *words, f"resume={saved}"), tmp_path / "other")
    lines = str(error.value).splitlines()
    found = [line.split(":")[0].strip() for line in lines[1:-1]]
    assert found == [
        "seed", "adapter", "generate.seed", "data.micro_batch", "data.global_batch", "data.seed", "model.dtype", "loss",
        "optim.optimizer.fused", "trainer.max_steps",
    ]  # fmt: skip
    assert "  data.micro_batch: 2 → 1; " in str(error.value)
    assert "  loss: SFT → Weighted; " in str(error.value)
    assert "3 ends at step 3, and the checkpoint is of step 5" in str(error.value)
    assert "resume=false" in lines[-1]


def test_other_kind_of_optimizer_is_rejected(saved, options, tmp_path):
    words = ("optim.optimizer._target_=torch.optim.Adam", "optim.optimizer.eps=1e-3")
    with pytest.raises(UserError, match=r"optim\.optimizer: AdamW → Adam; "):
        Run.compose(composed(*options, *MORE, *words, f"resume={saved}"), tmp_path / "other")


def test_moved_data_with_other_content_is_rejected_before_annotation(saved, options, rows, tmp_path):
    other = tmp_path / "moved.jsonl"
    other.write_text(rows.read_text())
    fit(options, tmp_path / "moved", *MORE, f"data.path={other}", f"resume={saved}")
    other.write_text(rows.read_text().replace("question", "riddle"))
    with pytest.raises(UserError, match="was made with plan"):
        fit(options, tmp_path / "changed", *MORE, f"data.path={other}", f"resume={saved}")


@pytest.mark.parametrize(
    ("key", "value"), [("answer", "4"), ("score", -3.0), ("weight", 2.0), ("ordered", True), ("subset", "x")]
)
def test_other_labels_of_the_same_responses_are_rejected(key, value, saved, options, rows, tmp_path):
    """Scores, weights, answers and orders of pairs train too. The subset of a row does not."""
    records = list(map(json.loads, rows.read_text().splitlines()))
    (records[-1] if key in ("answer", "ordered", "subset") else records[-1]["responses"][-1])[key] = value
    other = write_lines(tmp_path / "moved.jsonl", records)
    if key == "subset":
        fit(options, tmp_path / "changed", *MORE, f"data.path={other}", f"resume={saved}")
        return
    with pytest.raises(UserError, match="was made with other scores, weights or answers of the same responses"):
        fit(options, tmp_path / "changed", *MORE, f"data.path={other}", f"resume={saved}")


def test_saved_configuration_states_what_runs(saved, options, tmp_path):
    """A rejected command leaves it alone. Changes are recorded by step, also over several resumes."""
    folder = tmp_path / "first"
    run = Run.compose(composed(*options, *MORE), folder)
    run.recorded.write()
    config = folder / ".hydra" / "config.yaml"
    before = config.read_text()
    with pytest.raises(UserError):
        Run.compose(composed(*options, *MORE, "loss=weighted"), folder)
    assert config.read_text() == before
    fit(options, folder, *MORE, "optim.optimizer.lr=0.5", "trainer.max_steps=7")
    assert OmegaConf.load(config).optim.optimizer.lr == 0.5
    run = fit(options, folder, *MORE, "optim.optimizer.lr=0.25", "trainer.max_steps=8")[0]
    expected = [
        {"step": 5, "changes": {"optim.optimizer.lr": [0.003, 0.5], "trainer.max_steps": [-1, 7]}},
        {"step": 7, "changes": {"optim.optimizer.lr": [0.5, 0.25], "trainer.max_steps": [7, 8]}},
    ]
    assert run.recorded.history == expected
    assert json.loads((folder / "changes.json").read_text()) == expected


def test_places_loggers_and_devices_may_differ_silently(saved, options, tmp_path, capsys):
    words = (f"runs={tmp_path}/elsewhere", "logger=tensorboard", "trainer.keep_checkpoint=true", "strategy=ddp")
    run = Run.compose(composed(*options, *MORE, *words, f"resume={saved}"), tmp_path / "other")
    assert run.recorded.changes == []
    assert "resume:" not in capsys.readouterr().out


def test_empty_resume_is_an_error(options, tmp_path):
    with pytest.raises(UserError, match="resume: is empty"):
        Run.compose(composed(*options, "resume="), tmp_path)


def test_other_form_of_checkpoint_is_rejected(saved, options, tmp_path):
    with pytest.raises(UserError, match="strategy: auto → fsdp; the checkpoint is stored in the form"):
        Run.compose(composed(*options, *MORE, "strategy=fsdp", f"resume={saved}"), tmp_path / "other")


def test_checkpoint_of_an_earlier_version_is_not_compared(saved, options, tmp_path, capsys):
    state = torch.load(saved, weights_only=True)
    del state["settings"]
    torch.save(state, tmp_path / "old.ckpt")
    fit(options, tmp_path / "other", *MORE, "optim.optimizer.lr=0.5", f"resume={tmp_path}/old.ckpt")
    assert "they are not compared" in " ".join(capsys.readouterr().out.split())


def test_finished_run_with_other_settings_is_an_error(tmp_path):
    """It can only be in a folder that the user names."""
    cfg = {"optim": {"optimizer": {"lr": 0.1}}, "eval": {"enabled": True}, "runs": "a"}
    finished = {"folder": "runs/mine", "config": {**cfg, "runs": "b", "eval": {"enabled": False}}}
    check_same_settings(OmegaConf.create(cfg), finished)
    finished["config"]["optim"] = {"optimizer": {"lr": 0.2}}
    with pytest.raises(UserError, match=r"runs/mine holds a finished run .*\n  optim\.optimizer\.lr: 0\.2 → 0\.1"):
        check_same_settings(OmegaConf.create(cfg), finished)


@pytest.mark.parametrize(("own", "warned"), [({"thinking": False}, False), ({}, True)])
def test_init_with_other_template_arguments_is_a_warning(
    own: dict[str, Any], warned: bool, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run learned with enable_thinking=false is not what a prompt without it asks for."""
    (tmp_path / "config.yaml").write_text("model: {chat_template_kwargs: {thinking: false}}\n")
    words = [f"+model.chat_template_kwargs.{name}={value}" for name, value in own.items()]
    model = composed(f"model.path={tiny_folder}", *words).model
    warn_of_other_arguments(tmp_path, Pretrained(**pick_fields(Pretrained, model), cache=str(tmp_path)))
    assert ("model.chat_template_kwargs={'thinking': False}, and" in "".join(capsys.readouterr())) == warned
