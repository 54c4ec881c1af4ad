#!/usr/bin/env bash
# One run on several machines without a scheduler. Run the same line on each machine, with its own NODE.
#   NODES=2 NODE=0 MASTER=10.0.0.1 launch/torchrun.sh loss=var_grouped strategy=fsdp    # on 10.0.0.1 itself
#   NODES=2 NODE=1 MASTER=10.0.0.1 launch/torchrun.sh loss=var_grouped strategy=fsdp    # on the second machine
#   … launch/torchrun.sh annotate.py loss=var_grouped      # only annotate: the first word can name the program
# All machines must share the folders `annotation_cache` and `runs`; each may have its own `cache`.
# PER_NODE: processes per machine, one per GPU (default: all GPUs of the machine). PORT: a free port of the first machine.
set -euo pipefail
program=train.py
if [[ "${1:-}" == *.py ]]; then program=$1; shift; fi
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${PER_NODE:-gpu}" \
  --master-addr "$MASTER" --master-port "${PORT:-29500}" \
  "$(dirname "$0")/../$program" trainer.num_nodes="$NODES" trainer.devices="${PER_NODE:-auto}" "$@"
