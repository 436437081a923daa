#!/usr/bin/env bash
# examples/jobs/prepare.sh gs://BUCKET: what a run needs, in a bucket, once and from any machine.
# Run it again if it was interrupted: a complete model is left alone, and packing goes on with the missing shards.
set -euo pipefail
bucket=$1
pdrop convert --llm lmsys/vicuna-7b-v1.5 --vision openai/clip-vit-large-patch14-336 "$bucket/start"
pdrop data pack chat.json "$bucket/shards" --images images
