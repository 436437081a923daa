#!/usr/bin/env bash
# examples/jobs/tpu_vm.sh NAME ZONE gs://BUCKET: installs and trains on all hosts of a TPU VM slice of 16 v5e chips.
# Run it again to resume; a spot slice that was taken away is created anew first.
set -euo pipefail
name=$1 zone=$2 bucket=$3
on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"
}
gcloud compute tpus tpu-vm describe "$name" --zone "$zone" > /dev/null 2>&1 ||
    gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type v5litepod-16 \
        --version v2-alpha-tpuv5-lite --spot
gcloud compute tpus tpu-vm scp --recurse . "$name:pdrop-jax" --zone "$zone" --worker all
on_all_hosts "python3 -m venv venv && venv/bin/pip install --quiet 'pdrop-jax/.[train,gcs,tpu]'"
on_all_hosts "PDROP_CACHE=$bucket/cache venv/bin/pdrop train llava-1.5-finetune --mesh fsdp=16 --set model.start=$bucket/start data.conversations=$bucket/chat.json data.images=$bucket/images data.workers=4 run.folder=$bucket/run"
