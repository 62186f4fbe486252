#!/usr/bin/env bash
# Trains as several processes on this machine, to try out a multi-host run.
#
#   launch/local.sh --processes=2 --devices=2 -- --config=configs/base.py:smoke
#
#   --processes=N   (default 2)
#   --devices=D     simulated CPU devices per process; without it each process takes what JAX finds: on GPUs use one process
#   --port=PORT     port of the coordinator (default: a free one)
#   --python=PATH   (default .venv/bin/python if it exists, else python3)
#   --dry-run       print the commands, run none
#
# Arguments after -- go to sparsecut_jax.train. Only the first process prints. SIGTERM saves (exit code 3), ^C stops. Exit
# code: 2 or 4 if any process returns it, else that of the process that failed first, not of those that noticed.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

processes=2 devices='' port='' python=python3
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
flags "processes= devices= port= python=" "$@"
number processes "$processes" 1
[[ ! $devices ]] || number devices "$devices" 1
if [[ $port ]]; then
  number port "$port" 1
  ((port < 65536)) || fail 2 "--port=$port: expected an integer, 65535 or less"
fi
((${#ARGS[@]})) || fail 2 "no arguments for the training; add them after --, for example -- --config=configs/base.py:smoke"
command -v "$python" >/dev/null || fail 2 "--python=$python does not exist"
[[ $port ]] || port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')

command=("$python" -m sparsecut_jax.train)
if [[ $devices ]]; then
  # The other scheduler lets the collectives of several CPU devices wait for one another for ever.
  flag="--xla_force_host_platform_device_count=$devices --xla_cpu_enable_concurrency_optimized_scheduler=false"
  command=(env JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$flag" "${command[@]}")
fi
command+=(--coordinator="localhost:$port" --processes="$processes")

pids=()
# shellcheck disable=SC2329 # called by the traps
pass_on() { # sends a signal to the processes that still run
  kill -"$1" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
set -m # without it, background processes would ignore SIGINT
for ((i = 0; i < processes; i++)); do
  echo "$(quoted "${command[@]}" --process="$i" "${ARGS[@]}")${dry_run:+ &}" >&3
  [[ ! $dry_run ]] || continue
  "${command[@]}" --process="$i" "${ARGS[@]}" </dev/null &
  pids+=($!)
done
[[ ! $dry_run ]] || { echo wait && exit 0; }
set +m # with it, ^C would reach only the command that this script waits for

# 5 means that another process died, which has the reason; 3 that the run stopped after saving.
rank() {
  case $1 in 0) echo 0 ;; 3) echo 1 ;; 5) echo 2 ;; 4) echo 4 ;; 2) echo 5 ;; *) echo 3 ;; esac
}
worst=0 since=''
while ((${#pids[@]})); do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    else
      code=0
      wait "$pid" || code=$?
      (($(rank "$code") <= $(rank "$worst"))) || worst=$code
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  # If one process fails on bad input before all have connected, the others would wait for it for five minutes.
  if ((worst == 2)); then
    if [[ ! $since ]]; then
      since=$SECONDS
      pass_on TERM
    elif ((SECONDS - since >= 10)); then
      pass_on KILL
    fi
  fi
  sleep 0.2 || true
done
exit "$worst"
