#!/bin/bash
# Train on a SLURM cluster: sbatch --export=ALL,RUN=/shared/runs/iad1 examples/slurm.sh
#
# Two nodes of eight GPUs. Three minutes before the time is up the run is saved, the job is queued again, and goes on from
# there; the same after preemption. RUN is a directory that all nodes see.
#SBATCH --job-name=iad1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
# Where a node has several network interfaces:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# SLURM tells this script alone that the time is nearly up. A run that ends by itself, finished or not, is not queued again.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun --kill-on-bad-exit=0 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:29500" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --max-restarts 3 \
  --log-dir "$RUN/logs" --redirects 3 --tee 3 \
  -m engine train --method iad1 --amp --batch-size 1024 --lr-scale linear \
  --set checkpoint_every=500 --out "$RUN" --resume auto &
wait $!
status=$?
if [ "$stopped" ]; then
  wait $!  # the signal ended the wait above, and not the run
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
