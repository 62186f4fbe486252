#!/usr/bin/env bash
# Trains on the GPUs of several nodes under SLURM: submits itself, one process a node with all GPUs of it.
#
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 -- --config=configs/sparsecut.py:size=7b,stage=pretrain
#
#   --nodes=N            (default 1)
#   --gpus-per-node=G    a number, or TYPE:NUMBER (default 8)
#   --cpus-per-task=C    threads of a node's process, for reading pictures (default 16)
#   --time=TIME          limit of one go (default 24:00:00); the run goes on in the next
#   --partition=P --account=A --job-name=J
#   --grace=SECONDS      how long before the limit the run is told to save (default 300)
#   --python=PATH        of the environment with jax[cuda13] (default .venv/bin/python), on a disk that all nodes see
#   --dry-run            print the command, run none
#
# Behind -- stand the arguments of sparsecut_jax.train. SBATCH_* variables give any further option. At the time limit,
# and when SLURM takes the nodes away, the run saves, goes back into the queue, and goes on later; scancel ends it.

set -euo pipefail

# SLURM runs a copy of this file, in the folder from which it was submitted.
if [[ ${1-} == --in-job ]]; then
  if [[ ! ${SLURM_JOB_ID-} || ! ${SLURM_GPUS_PER_NODE-} ]]; then
    echo "error: --in-job is for SLURM alone, inside a job with GPUs that this script has submitted" >&2
    exit 2
  fi
  python=$2
  shift 2
  # Left alone, JAX gives every process under SLURM one GPU: that of its number on the node.
  last=$((${SLURM_GPUS_PER_NODE##*:} - 1))
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$last")
  export JAX_LOCAL_DEVICE_IDS
  # Where a process ends the others notice, say which, and end by themselves: srun must not kill one that is saving.
  code=0
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0 \
    "$python" -u -m sparsecut_jax.train --require-platform=gpu "$@" || code=$?
  # 3: stopped after saving. A preempted job SLURM requeues by itself, and a cancelled one shall not go on.
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
  fail 2 "--grace=$grace: expected fewer seconds than --time=$time gives; every go would only save"
check_args
needs sbatch "start this on a login node of the cluster"
needs "$python" "make the environment there, or give --python=PATH"

# --signal: to the processes, not to this script, which waits for them.
command=(sbatch --job-name="$job_name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus_per_node"
  --cpus-per-task="$cpus_per_task" --time="$time" --signal="TERM@$grace" --requeue --open-mode=append)
[[ ! $partition ]] || command+=(--partition="$partition")
[[ ! $account ]] || command+=(--account="$account")
run "${command[@]}" launch/slurm.sh --in-job "$python" "${ARGS[@]}"
say "its log is slurm-JOB.out here; scancel JOB ends it"
