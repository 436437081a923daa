#!/usr/bin/env bash
# examples/jobs/xpk.sh CLUSTER gs://BUCKET REGISTRY: the job of jobset.yaml, submitted with XPK to one v5e slice of 16 chips.
set -euo pipefail
cluster=$1 bucket=$2 registry=$3
xpk workload create --cluster "$cluster" --workload llava-finetune --tpu-type v5litepod-16 --num-slices 1 \
    --docker-image "$registry/pdrop-jax:tpu" --max-restarts 20 --env "PDROP_CACHE=$bucket/cache" --command \
    "pdrop train llava-1.5-finetune --mesh fsdp=16 --set model.start=$bucket/start data.conversations=$bucket/chat.json data.images=$bucket/images data.workers=4 run.folder=$bucket/run"
