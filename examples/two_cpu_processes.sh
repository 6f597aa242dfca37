#!/bin/sh
# Two processes on the CPU, to try a launch before it costs GPUs; it runs on any machine:
#   examples/two_cpu_processes.sh MODEL train.jsonl OUT
# First the command with torchrun, then the TRL script with accelerate launch and the plan that the command made.
set -eu
export OMP_NUM_THREADS=1
torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 --no-python \
  aletheia train "$1" --data "$2" --steps 12 --batch-size 2 --out "$3/command"
# --multi_gpu starts the processes; --cpu would start only one. The script sees that there is no GPU.
accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --main_process_port 0 "$(dirname "$0")/trl_sft.py" "$1" "$2" "$3/command/plan.json" "$3/trl"
