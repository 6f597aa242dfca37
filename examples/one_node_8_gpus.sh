#!/bin/sh
# One machine, eight GPUs, by torchrun: examples/one_node_8_gpus.sh MODEL OUT
# It was not run on GPUs here.
#
# accelerate launch does the same; its file may then say FSDP2 instead of the settings of the run:
#   accelerate launch --config_file examples/accelerate_fsdp2.yaml --no_python aletheia train MODEL \
#     --data train.jsonl --out OUT
#   accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/trl_sft.py MODEL train.jsonl plan.json OUT
set -eu
exec torchrun --standalone --nproc-per-node 8 --no-python \
  aletheia train "$1" --config "$(dirname "$0")/one_node_8_gpus.yaml" --out "$2"
