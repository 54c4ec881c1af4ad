"""Runs in one process, or in one group of ranks: `python [-m torch.distributed.run …] tests/ranks.py jobs.json`.

jobs.json: [[folder, overrides], …]; each folder gets metrics.csv and weights.pt, the policy's after training.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

sys.path.insert(0, str(Path(__file__).parent.parent))


def main(jobs: str) -> None:
    from tests.conftest import composed
    from var.training.run import Run

    for folder, overrides in json.loads(Path(jobs).read_text()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        run = Run.compose(composed(*overrides), Path(folder))
        torch.manual_seed(0)
        trainer, module = run.trainer(), run.module()
        trainer.fit(module, run.data)
        weights = get_model_state_dict(module.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            torch.save(weights, Path(folder) / "weights.pt")


if __name__ == "__main__":
    main(sys.argv[1])
