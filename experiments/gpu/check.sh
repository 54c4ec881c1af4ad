#!/usr/bin/env bash
# Check on one GPU, in about ten minutes and without a network, which faults that were only read or computed are real.
#
#   bash experiments/gpu/check.sh [folder]          the findings go to <folder>/findings.jsonl (default: build/gpu)
#   DRY=1 bash experiments/gpu/check.sh [folder]    tiny sizes, also on a CPU: checks that the script runs through
#
# Install it on an image that has torch and transformers: see README.md next to this file.
set -u
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
python=${PYTHON:-python}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
rm -f "$out/findings.jsonl"

PYTHONPATH=. "$python" experiments/gpu/checks.py "$out" ${DRY:+--dry}   # kernels, precision and synchronizations, in this process
PYTHONPATH=. "$python" experiments/gpu/runs.py "$out" ${DRY:+--dry}     # the gpu tests, whole runs, and speed next to TRL's
PYTHONPATH=. "$python" experiments/gpu/findings.py "$out"               # the table; exits with 1 if a finding is not as expected
