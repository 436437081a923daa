#!/usr/bin/env bash
# examples/jobs/prepare.sh gs://BUCKET: what a run needs, in a bucket, once and from any machine.
# Stops if a record is invalid; without the first command a run skips such records.
set -euo pipefail
bucket=$1
pdrop data check chat.json --images images
gcloud storage cp chat.json "$bucket/chat.json"
gcloud storage rsync --recursive images "$bucket/images"
pdrop convert --llm lmsys/vicuna-7b-v1.5 --vision openai/clip-vit-large-patch14-336 "$bucket/start"
