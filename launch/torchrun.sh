#!/usr/bin/env bash
# One run on several machines without a scheduler: the same line on each, but for its number.
#   NODES=2 NODE=0 MASTER=10.0.0.1 launch/torchrun.sh loss=var_grouped strategy=fsdp    # on 10.0.0.1 itself
#   NODES=2 NODE=1 MASTER=10.0.0.1 launch/torchrun.sh loss=var_grouped strategy=fsdp    # on the second
# Every machine must see one folder for `store` and `runs`, and have a `cache` of its own or the same one.
# PER_NODE: processes on each, one a GPU; all of the machine's where it is not given. PORT: free on the first.
set -euo pipefail
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${PER_NODE:-gpu}" \
  --master-addr "$MASTER" --master-port "${PORT:-29500}" \
  "$(dirname "$0")/../train.py" trainer.num_nodes="$NODES" trainer.devices="${PER_NODE:-auto}" "$@"
