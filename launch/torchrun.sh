#!/usr/bin/env bash
# Trains on the GPUs of this machine, or of several machines of which each is given the same command. No scheduler.
#
#   launch/torchrun.sh experiment=small data.shards='SHARDS_DIR/*.tar' run_dir=runs/small
#   NODES=2 NODE=0 MASTER=host0 launch/torchrun.sh ... run_dir=/shared/runs/small      on host0
#   NODES=2 NODE=1 MASTER=host0 launch/torchrun.sh ... run_dir=/shared/runs/small      on the other
#
# What follows is KEY=VALUE, as for `seer train`. With several machines, run_dir and shards lie where all see them.
#   PROCESSES  processes of each machine; default: its GPUs, or 2 on a machine without
#   NODES      machines (1);  NODE: the number of this one, 0 on MASTER;  MASTER: name or address of machine 0
#   PORT       a free port of machine 0 (29500)
#   INTERFACE  network interface between the machines, such as eth0; default: gloo and NCCL find one
#
# The same command goes on where a stopped run stands. To stop it, send SIGTERM to the process of rank 0 and not to
# torchrun, which kills ranks that need more than 30 seconds to save. torchrun ends with 1 whenever a rank does not end
# with 0, also when that saved and can go on (75).
set -euo pipefail

if [ "$#" -eq 0 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
  sed -n '2,/^set /{/^#/p}' "$0"
  exit 0
fi

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
fi
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
nodes=${NODES:-1}

if [ "$nodes" -eq 1 ]; then
  where=(--standalone)
else
  where=(--nnodes "$nodes" --node-rank "${NODE:?the number of this machine, 0 on MASTER}")
  where+=(--master-addr "${MASTER:?name or address of machine 0}" --master-port "${PORT:-29500}")
fi
if [ -n "${INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the run sets its own threads; without this torchrun warns

# No restarts by torchrun: its restarted ranks meet the addresses of their predecessors. Give the command again instead.
exec python -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" --max-restarts 0 -m seer train "$@"
