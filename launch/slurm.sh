#!/usr/bin/env bash
# One run on several machines under SLURM, from the repository's folder; options of sbatch's own set another size.
#   sbatch launch/slurm.sh loss=var_grouped strategy=fsdp
#   sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh loss=var_grouped
# `store`, `runs` and `cache` must be seen by every node. A job that was pre-empted or cut off by its time limit goes on
# from its last checkpoint by the same line.
#SBATCH --job-name=var
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail
srun python train.py trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
