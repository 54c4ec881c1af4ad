"""eval.py on a tiny random model: numbers that are known, a second run that computes nothing, inputs it refuses."""

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import byte_tokenizer, tiny_model
from tests.e2e.test_commands import run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("eval")
    return [
        f"model.path={tiny_folder}", "model.name=tiny", "data.source.problems=30", "data.validation_prompts=6",
        "reward=near_number", "seeds=[0,1]", "generate.max_new_tokens=8", f"store={folder}/store",
        f"cache={folder}/cache", f"out={folder}/evals",
    ]  # fmt: skip


def result(options: list[str]) -> tuple[Path, dict]:
    (place,) = Path(options[-1].removeprefix("out=")).iterdir()
    return place, json.loads((place / "result.json").read_text())


def test_a_model_beside_itself_gains_nothing_and_every_pair_is_a_tie(evaluated: list[str], tiny_folder: Path):
    options = [f"reference={tiny_folder}", "judge=reward", *evaluated]
    done = run("eval.py", *options)
    assert done.returncode == 0, done.stderr
    place, found = result(options)
    part = found["model"]["subsets"]["arithmetic"]
    assert part["prompts"] == 6
    assert part["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert part["reward"] == found["reference"]["subsets"]["arithmetic"]["reward"]
    assert found["against_reference"]["reward"]["arithmetic"]["gain"]["mean"] == 0
    assert (found["win_rates"]["all"]["n"], found["win_rates"]["all"]["tie"]) == (12, 12)
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    rewards = [one["reward"] for record in answers for one in record["model"]]
    assert len(rewards) == 12
    assert part["reward"]["mean"] == pytest.approx(sum(rewards) / 12)
    assert len((place / "games.jsonl").read_text().splitlines()) == 12
    assert found["depends_on"]["weights"]["model"]["weights"]

    again = run("eval.py", *options)  # the store holds it all
    assert "Answers of the model" not in again.stdout
    assert result(options)[1]["model"] == found["model"]


def test_another_model_is_told_apart(evaluated: list[str], tiny_folder: Path, tmp_path: Path):
    other = tiny_model(seed=1)
    other.config._attn_implementation = "sdpa"
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    options = [f"reference={tmp_path}/other", *evaluated[:-1], f"out={tmp_path}/evals"]
    done = run("eval.py", *options)
    assert done.returncode == 0, done.stderr
    assert result(options)[1]["model"]["subsets"]["arithmetic"]["kl"]["mean"] > 1


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("there is none: set reference=", ["judge=reward"]),
        ("cannot score new text", ["reward=score"]),
        ("all seeds are one", ["generate.temperature=0"]),
        ("got [0, 0]", ["seeds=[0,0]"]),
        ("no chosen response", ["judge=reward", "against=chosen"]),
        ("leave generate.responses at 1", ["generate.responses=2"]),
        ("nothing reads this key", ["+nonsense=1"]),
        ("neither a finished run", ["init=nowhere"]),
    ],
)
def test_what_cannot_be_is_told_first(evaluated: list[str], message: str, overrides: list[str]):
    done = run("eval.py", *evaluated, *overrides)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validation_while_training_is_a_curve_of_reward_win_rate_length_and_kl(tiny_folder: Path, tmp_path: Path):
    """Under bf16-mixed too, with its gradients clipped."""
    done = run(
        "train.py", f"model.path={tiny_folder}", f"store={tmp_path}/store", f"cache={tmp_path}/cache",
        f"runs={tmp_path}/runs", "data.source.problems=30", "data.validation_prompts=4", "reward=near_number",
        "loss=sft", "trainer.max_steps=3", "trainer.log_every_n_steps=1", "eval.every_n_steps=1",
        "trainer.precision=bf16-mixed", "trainer.accelerator=cpu", "generate.max_new_tokens=6",
        "optim.optimizer.lr=1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("reward", "win_rate", "length", "kl"):
        points = {int(row["step"]): float(row[f"validation/{name}"]) for row in rows if row.get(f"validation/{name}")}
        assert set(points) >= {1, 2, 3}, name
        assert name != "kl" or points[3] > points[1] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["validation"]["win_rate"]["mean"] <= 1
