#!/bin/bash
# Several nodes: sbatch docs/slurm/nodes.sh SCANS OUT, from the bundle's root, on a file system that all nodes share.
#SBATCH --job-name=vdvae
#SBATCH --output=vdvae-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -uo pipefail
processes=${PROCESSES:-$SLURM_GPUS_ON_NODE}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# five minutes before the time is up: save a checkpoint, stop, and queue again
again() {
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap again USR1

srun .venv/bin/torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$processes" \
    --max-restarts=3 --shutdown-timeout=240 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    -m monai.bundle run training --config_file "['configs/train.json','configs/multi_gpu_train.json']" \
    --dataset_dir "$1" --output_dir "$2" --resume auto "${@:3}" &
training=$!
wait "$training"
