"""Write the folders of finished runs and evaluations, as far as reports read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_run(
    folder: Path, *overrides: str, seed: int = 0, after: float = 0.3, answers: list[list[float]] | None = None,
    text: str = "4", data_report: dict[str, Any] | None = None, **top: Any,
) -> Path:  # fmt: skip
    """Write the folder of a run as train.py does, and return it.

    Args:
        folder: the run's folder.
        overrides: overrides of keys of `loss`.
        seed: the seed of the run.
        after: the mean reward after training.
        answers: the rewards after training, of the answers to each prompt.
        text: the text of all answers.
        data_report: further entries of the data report.
        top: further keys of summary.json.
    """
    loss = {key.removeprefix("loss."): value for key, value in (line.split("=") for line in overrides)}
    (folder / ".hydra").mkdir(parents=True)
    lines = "".join(f"- {line}\n" for line in [*overrides, f"seed={seed}", f"runs={folder.parent}"])
    (folder / ".hydra" / "overrides.yaml").write_text(lines)
    mean = {"mean": 0.1, "se": 0.02}
    summary = {
        "title": "tiny, arithmetic, var", "folder": str(folder), "reward": after, "steps": 2, "skipped_steps": 0,
        "validation": {
            "reward": {"before": mean, "after": {"mean": after, "se": 0.03}, "gain": {"mean": after - 0.1, "se": 0.04}},
            "length": {"before": {"mean": 9.0, "se": 1.0}, "after": {"mean": 7.0, "se": 1.0}},
            "truncated": {"before": 0.0, "after": 0.1},
            "kl": {"mean": 10 * after, "se": 0.2}, "win_rate": {"mean": 0.6, "se": 0.02},
            "judge": {"win": 5, "tie": 1, "loss": 2, "error": 0, "win_rate": 62.5, "se_prompts": 10.0, "reason": None},
        },
        "tokens_per_second": 100.0, "ess": 0.5, "data": {"rows": 8, **(data_report or {})},
        "seconds": {"annotating": 1.0, "training": 2.0, "evaluating": 3.0},
        "hashes": {"plan": "p", "weights": "w"}, "seeds": {"run": seed}, "versions": {"torch": "2.13"},
        "config": {"seed": seed, "runs": str(folder.parent), "loss": loss, "trainer": {"ess_warning": 0.25}}, **top,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.csv").open("w") as file:
        file.write("step,train/loss,train/weight/ess,validation/reward,validation/reward_se\n")
        file.write(f"0,,,0.1,0.02\n1,2.0,0.2,,\n2,{1.0 + seed},0.6,{after},0.03\n")
    answers = answers or [[after, after]] * 3
    with (folder / "samples.jsonl").open("w") as file:
        for i, rewards in enumerate(answers):
            side = {"texts": [text] * len(rewards), "lengths": [1] * len(rewards)}
            record = {"id": f"r{i}", "prompt": [{"role": "user", "content": f"{i}?"}], "answer": "4"}
            before, later = side | {"rewards": [0.1] * len(rewards)}, side | {"rewards": rewards}
            file.write(json.dumps({**record, "before": before, "after": later}) + "\n")
    np.savez(
        folder / "plan.npz", micro=np.array([[2, 0], [1, -1]]), tokens=np.array([3, 1]), row=np.array([7, 8, 9]),
        weight=np.array([0.5, 2.0, 0.5]),
    )  # fmt: skip
    return folder


def write_evaluation(folder: Path, answers: list[list[float]] | None = None, reward: str = "one") -> Path:
    """Write the folder of an evaluation as eval.py does, and return it.

    Args:
        folder: the evaluation's folder.
        answers: the rewards of the answers to each prompt.
        reward: the program that computed the rewards.
    """
    part = {
        "reward": {"mean": 0.5, "se_seeds": 0.1, "se_prompts": 0.2}, "kl": {"mean": 1.0, "se_prompts": None},
        "length": {"mean": 12.0, "se": 1.5},
    }  # fmt: skip
    game = {"win": 3, "tie": 2, "loss": 1, "error": 0, "win_rate": 50.0, "se_prompts": 9.0}
    result = {
        "title": "one on 100% of it", "model": {"subsets": {"hard": part}, "averages": {}},
        "against_reference": {"reward": {"hard": {"gain": {"mean": 0.25, "se_prompts": 0.05}}}},
        "win_rates": {"subsets": {}, "all": game},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(
        json.dumps(result | {"depends_on": {"rewards": {"reward": {"program": reward}}}})
    )
    with (folder / "answers.jsonl").open("w") as file:
        for i, rewards in enumerate(answers or []):
            record = {"subset": "hard", "prompt": f"{i}?", "model": [{"text": "x", "reward": r} for r in rewards]}
            file.write(json.dumps(record) + "\n")
    return folder
