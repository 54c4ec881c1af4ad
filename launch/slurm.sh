#!/usr/bin/env bash
# One run on several machines under SLURM. Submit it from the repository's folder; options of sbatch set another size.
#   sbatch launch/slurm.sh loss=var_grouped strategy=fsdp
#   sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh loss=var_grouped
#   sbatch launch/slurm.sh annotate.py loss=var_grouped      # only annotate: the first word can name the program
# All nodes must share the folders `annotation_cache` and `runs`; each may have its own `cache`. A job that is
# preempted, or reaches its time limit, is queued again. It resumes from its last checkpoint or, if it was annotating,
# from the annotation cache.
#SBATCH --job-name=var
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -euo pipefail
program=train.py
if [[ "${1:-}" == *.py ]]; then program=$1; shift; fi
# Since SLURM 22.05, srun does not take over sbatch's --cpus-per-task.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
status=0
# --wait: if one process has ended, the others have a minute to end, too, and do not wait for it until the time limit.
srun --wait=60 python "$program" trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE" "$@" \
  || status=$?
# 128 + SIGUSR1: the run kept what it had and exited five minutes before the time limit
if [ "$status" = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
