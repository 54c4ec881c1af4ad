"""Train several runs on one process or one group of processes.

    python [-m torch.distributed.run …] tests/helpers/ranks.py jobs.json

jobs.json is [[folder, overrides, attributes], …]; the attributes of the training module are optional. Each folder
receives metrics.csv, weights.pt (the trained policy's weights), and the results of each rank's evaluations,
with the number of policies that it holds at the end.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

sys.path[0] = str(Path(__file__).parents[2])  # in place of this folder, whose modules are in the package tests.helpers


def main(jobs: str) -> None:
    """Run all jobs."""
    from tests.helpers.runs import composed
    from var.models.policy import Policy
    from var.training.run import Run

    for folder, overrides, *attributes in json.loads(Path(jobs).read_text()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        run = Run.compose(composed(*overrides), Path(folder))
        torch.manual_seed(0)
        trainer, module = run.trainer(), run.module()
        vars(module).update(*attributes)
        trainer.fit(module, run.data)
        weights = get_model_state_dict(module.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        gc.collect()
        result = {**run.validation.result, "policies": sum(isinstance(found, Policy) for found in gc.get_objects())}
        (Path(folder) / f"result-{trainer.global_rank}.json").write_text(json.dumps(result))
        if trainer.is_global_zero:
            torch.save(weights, Path(folder) / "weights.pt")


if __name__ == "__main__":
    main(sys.argv[1])
