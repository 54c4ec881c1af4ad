#!/usr/bin/env bash
# One run on several machines under SLURM. Submit it from the repository's folder; options of sbatch set another size.
#   sbatch launch/slurm.sh loss=var_grouped strategy=fsdp
#   sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh loss=var_grouped
# All nodes must share the folders `annotation_cache`, `runs` and `cache`. A job that is preempted, or reaches its time
# limit, is queued again and resumes from its last checkpoint.
#SBATCH --job-name=var
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=slurm-%j.out
set -euo pipefail
status=0
srun python train.py trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE" "$@" || status=$?
# 128 + SIGUSR1: the run saved its step and exited five minutes before the time limit
if [ "$status" = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
