#!/usr/bin/env bash
# A job of a SLURM cluster by hand: one task of srun is one process of the run, one GPU each.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=240 launch/slurm.sh \
#     experiment=small data.shards='/shared/shards/*.tar' run_dir=/shared/runs/small
#
# What follows the script is KEY=VALUE, as for `seer train`; activate the environment that has `seer` before sbatch,
# which takes it along. Options before the script (partition, account, cpus-per-task ...) are those of sbatch. Without
# GPUs leave --gpus-per-node out: the tasks are CPU processes. Rank 0 writes to seer-JOB-0.log, the others likewise.
#
# Before the job's end the run saves, queues the job again and goes on. `scancel --signal=TERM JOB` saves and ends it,
# `scancel --signal=USR1 JOB` saves and queues it again. Never --full: srun answers SIGTERM by killing all tasks.
#SBATCH --job-name=seer
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=seer-%j.log
#SBATCH --signal=USR2@120
set -uo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,/^#SBATCH/{/^# /p;/^#$/p}' "$0"
  exit 2
fi

# SLURM's rank variables count only with this: a python in this script would be told that it is rank 0 as well.
export SEER_LAUNCHER=slurm
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT # of the shell that submitted

# Bash would die of the signals that SLURM sends to everybody at the end, and the tasks with it before they have saved.
trap ':' TERM CONT USR1 USR2

# One file a task: lines of several would mix.
srun --kill-on-bad-exit=1 --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  --output="seer-$SLURM_JOB_ID-%t.log" --open-mode=append \
  seer train "$@" &
tasks=$!

# A signal ends `wait`, although srun still lives.
while true; do
  wait "$tasks"
  code=$?
  kill -0 "$tasks" 2>/dev/null || break
done
exit "$code"
