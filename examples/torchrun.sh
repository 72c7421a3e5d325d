#!/bin/sh
# Train on several machines: run this on each of them, with the same arguments.
#
#   HEAD=node1 NODES=2 RUN=/shared/runs/iad1 examples/torchrun.sh
#
# HEAD: one of the machines, NODES: how many there are, RUN: a directory that all of them see.
# Call it again after an interruption: it goes on, also with another number of machines.
set -eu

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
  --rdzv-id "$(basename "$RUN")" \
  --max-restarts 3 \
  --log-dir "$RUN/logs" --redirects 3 --tee 3 \
  -m engine train --method iad1 --amp --batch-size 1024 --lr-scale linear \
  --set checkpoint_every=500 --out "$RUN" --resume auto
