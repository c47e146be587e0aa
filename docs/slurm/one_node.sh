#!/bin/bash
# One node: sbatch docs/slurm/one_node.sh SCANS OUT, from the bundle's root.
#SBATCH --job-name=vdvae
#SBATCH --output=vdvae-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -uo pipefail
processes=${PROCESSES:-$SLURM_GPUS_ON_NODE}

# five minutes before the time is up: save a checkpoint, stop, and queue again
again() {
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap again USR1

srun .venv/bin/torchrun --standalone --nnodes=1 --nproc_per_node="$processes" \
    --max-restarts=3 --shutdown-timeout=240 \
    -m monai.bundle run training --config_file "['configs/train.json','configs/multi_gpu_train.json']" \
    --dataset_dir "$1" --output_dir "$2" --resume auto "${@:3}" &
training=$!
wait "$training"
