#!/bin/sh
# Four machines with eight GPUs each. Start it on every one of them, with the same arguments:
#   examples/four_nodes.sh HEAD MODEL OUT
# HEAD is the name of one of the machines, which all of them reach on port 29500. It has not been run on several
# machines yet.
#
# OUT must be on a file system that all machines share: checkpoints are written and read there. The cache folder can be
# there, too, or on a disk of each machine, which then computes what its own processes see.
#
# With accelerate launch, give every machine its number:
#   accelerate launch --config_file examples/accelerate_fsdp2.yaml --num_machines 4 --num_processes 32 \
#     --machine_rank NUMBER --main_process_ip HEAD --main_process_port 29500 --no_python aletheia train MODEL ...
set -eu
exec torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$1:29500" --rdzv-id aletheia \
  --no-python aletheia train "$2" --config "$(dirname "$0")/one_node_8_gpus.yaml" --out "$3"
