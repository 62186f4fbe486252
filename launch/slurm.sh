#!/usr/bin/env bash
# Trains on GPUs under SLURM: submits itself and runs one process per node, with all of the node's GPUs.
#
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 -- --config=configs/sparsecut.py:size=7b,stage=pretrain
#
#   --nodes=N            (default 1)
#   --gpus-per-node=G    a number, or TYPE:NUMBER (default 8)
#   --cpus-per-task=C    CPU threads per node, for decoding pictures (default 16)
#   --time=TIME          time limit of one job (default 24:00:00); the run resumes in the next
#   --partition=P --account=A --job-name=J
#   --grace=SECONDS      how long before the limit the run is told to save (default 300)
#   --python=PATH        of the environment with jax[cuda13] (default .venv/bin/python), on a disk that all nodes see
#   --dry-run            print the command, run none
#
# Arguments after -- go to sparsecut_jax.train. SBATCH_* variables set any other option. At the time limit, and when SLURM
# preempts the job, the run saves, is requeued and resumes later; scancel ends it.

set -euo pipefail

# SLURM runs a copy of this file, in the folder from which it was submitted.
if [[ ${1-} == --in-job ]]; then
  if [[ ! ${SLURM_JOB_ID-} || ! ${SLURM_GPUS_PER_NODE-} ]]; then
    echo "error: --in-job is internal: only SLURM uses it, in a GPU job that this script submitted" >&2
    exit 2
  fi
  python=$2
  shift 2
  # By default JAX gives each process under SLURM one GPU, by its local rank.
  last=$((${SLURM_GPUS_PER_NODE##*:} - 1))
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$last")
  export JAX_LOCAL_DEVICE_IDS
  # If a process ends, the others notice, say which one, and exit themselves: srun must not kill one that is saving.
  code=0
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0 \
    "$python" -u -m sparsecut_jax.train --require-platform=gpu "$@" || code=$?
  # 3: stopped after saving. SLURM requeues a preempted job itself, and a cancelled one must not be requeued.
  if ((code == 3)) && [[ $(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID") == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

cd "$(dirname "$0")/.."
. launch/common.sh

nodes=1 gpus_per_node=8 cpus_per_task=16 time=24:00:00 partition='' account='' job_name=sparsecut grace=300
python=.venv/bin/python
flags "nodes= gpus-per-node= cpus-per-task= time= partition= account= job-name= grace= python=" "$@"
number nodes "$nodes" 1
number cpus-per-task "$cpus_per_task" 1
number grace "$grace" 1
[[ $gpus_per_node =~ ^([a-zA-Z0-9_.-]+:)?[1-9][0-9]?$ ]] ||
  fail 2 "--gpus-per-node=$gpus_per_node: expected a number or TYPE:NUMBER; without GPUs use launch/local.sh"
[[ $time =~ ^(([0-9]{1,3})-)?([0-9]{1,4}):([0-9]{1,2}):([0-9]{1,2})$ ]] ||
  fail 2 "--time=$time: expected [DAYS-]HOURS:MINUTES:SECONDS"
d=${BASH_REMATCH[2]:-0} h=${BASH_REMATCH[3]} m=${BASH_REMATCH[4]} s=${BASH_REMATCH[5]}
((grace < ((10#$d * 24 + 10#$h) * 60 + 10#$m) * 60 + 10#$s)) ||
  fail 2 "--grace=$grace: expected fewer seconds than --time=$time; otherwise every job would only save"
check_args
needs sbatch "start this on a login node of the cluster"
needs "$python" "create the environment there, or set --python=PATH"

# --signal: to the processes, not to this script, which waits for them.
command=(sbatch --job-name="$job_name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus_per_node"
  --cpus-per-task="$cpus_per_task" --time="$time" --signal="TERM@$grace" --requeue --open-mode=append)
[[ ! $partition ]] || command+=(--partition="$partition")
[[ ! $account ]] || command+=(--account="$account")
run "${command[@]}" launch/slurm.sh --in-job "$python" "${ARGS[@]}"
say "the log is slurm-JOB.out in this folder; scancel JOB ends the run"
