"""Run annotate.py or sample.py on the machines of a Ray cluster, which share one annotation cache and the work.

    python launch/ray_workers.py --workers 8 --gpus 1 sample.py model=qwen2.5-7b data=prompts out=rows.jsonl

Each worker runs the same command. Workers of one machine claim the items that they compute, and machines see each
other's results in the cache, so each item is computed about once (docs/design.md). Every worker needs this folder, the
data, `annotation_cache` and `out` at the same path. Ray prints the lines of all workers here, and starts a worker that
dies again; what it had finished is in the cache. The same command continues an interrupted one.

Needs the extra `ray`: pip install -e '.[ray]'. Tested with a Ray cluster of one machine and without GPUs.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("annotate.py", "sample.py")
TRIES = 3  # of a worker that is killed


def run_worker(number: int, arguments: list[str], folder: str) -> tuple[int, int]:
    """Run the command in a process of its own, in `folder`; return the worker's number and the exit status."""
    print(f"worker {number} starts", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], cwd=folder)
    return number, done.returncode


def main() -> None:
    """Start the workers, and wait for all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="processes, over all machines")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per worker (default: 0)")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs per worker (default: 1)")
    parser.add_argument("--address", default="auto", help="of the cluster; `local` starts one on this machine")
    parser.add_argument("program", choices=PROGRAMS)
    options, overrides = parser.parse_known_args()
    try:
        import ray
    except ModuleNotFoundError:
        sys.exit("Ray is not installed: pip install -e '.[ray]'")
    ray.init(address=options.address, log_to_driver=True)
    remote: Any = ray.remote(num_gpus=options.gpus, num_cpus=options.cpus, max_retries=TRIES)
    task = remote(run_worker)
    arguments, folder = [options.program, *overrides], os.getcwd()
    waiting = [task.remote(number, arguments, folder) for number in range(options.workers)]
    tries, finished = Counter(range(options.workers)), 0
    while waiting:
        (done,), waiting = ray.wait(waiting)
        number, status = ray.get(done)
        if status < 0 and tries[number] < TRIES:  # killed; after an error of its own, it would fail again
            tries[number] += 1
            waiting.append(task.remote(number, arguments, folder))
        elif status:
            sys.exit(f"worker {number} failed with status {status}; its error is above")
        else:
            finished += 1
            print(f"worker {number} is done; {finished} of {options.workers}", flush=True)


if __name__ == "__main__":
    main()
