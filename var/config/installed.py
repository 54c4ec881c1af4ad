"""Exit with one line if the dependencies are not installed. The commands import this module before anything else."""

import importlib.util
import sys
from pathlib import Path

NEEDED = ("hydra", "omegaconf", "packaging")  # to compose the configuration; `check_versions` checks the others

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"Error: {', '.join(missing)}: not installed. Run: pip install -e {Path(__file__).parents[2]}")
