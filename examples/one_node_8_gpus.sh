#!/bin/sh
# One machine with eight GPUs, started with torchrun: examples/one_node_8_gpus.sh MODEL OUT
# It has not been run on GPUs yet.
#
# accelerate launch does the same; its own file can then set FSDP2 instead of the settings of the run:
#   accelerate launch --config_file examples/accelerate_fsdp2.yaml --no_python aletheia train MODEL \
#     --data train.jsonl --out OUT
#   accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/trl_sft.py MODEL train.jsonl plan.json OUT
set -eu
exec torchrun --standalone --nproc-per-node 8 --no-python \
  aletheia train "$1" --config "$(dirname "$0")/one_node_8_gpus.yaml" --out "$2"
