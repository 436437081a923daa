#!/usr/bin/env bash
# sbatch examples/jobs/slurm.sh: LLaVA-1.5's finetuning on four nodes of eight GPUs, a process for each GPU.
#SBATCH --job-name=pdrop
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# SIGTERM comes two minutes before the time is over: a checkpoint is written, and the same command goes on.
set -euo pipefail
srun --kill-on-bad-exit=1 pdrop train llava-1.5-finetune --mesh data=4 fsdp=8 \
    --set model.start=start data.conversations=chat.json data.images=images data.workers=4 run.folder=run
