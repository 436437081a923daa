#!/usr/bin/env bash
# sbatch examples/jobs/slurm.sh: fine-tunes LLaVA-1.5 on four nodes with eight GPUs each, one process per GPU.
# The folder that it is started in is on a file system that all nodes share.
#SBATCH --job-name=pdrop
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# SIGTERM arrives two minutes before the time limit: a checkpoint is written, and the requeued command resumes.
set -euo pipefail
export PDROP_CACHE=$PWD/cache # compiled programs, for all nodes and for the next start
srun --kill-on-bad-exit=1 pdrop train llava-1.5-finetune --mesh data=4 fsdp=8 \
    --set model.start=start data.conversations=chat.json data.images=images data.workers=4 run.folder=run
