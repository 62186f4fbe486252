#!/usr/bin/env bash
# Trains on a Cloud TPU: creates a slice, copies the tracked files, installs, runs, streams the log, deletes the slice.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-8 -- --config=configs/base.py
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-16 --slices=2 --spot --requeue=5 \
#       --mount=10.0.0.2:/share -- --config=configs/sparsecut.py:size=7b,stage=pretrain --config.mesh.replica=2
#
#   --name=NAME --zone=ZONE   of the slice; --project=P if it is not gcloud's default
#   --type=TYPE               v4-8, v5litepod-16, v5p-128, v6e-256, ...
#   --slices=N                several slices as one run; always queued
#   --queued                  wait in the queue for capacity rather than fail
#   --spot                    cheaper, and may be preempted
#   --requeue=N               a preempted slice is created again, up to N times, and the run resumes
#   --mount=HOST:/SHARE       NFS share (Filestore) that becomes runs/ on every host; required for several hosts and
#                             for --requeue. Without it, runs/ is copied to runs/NAME here before the slice is deleted
#   --version=RUNTIME         default: the one Google recommends for the type
#   --keep                    do not delete at the end, whatever happens
#   --dry-run                 print the commands, run none
#
# Arguments after -- go to sparsecut_jax.train. Exit code: the training's (0 done, 2 bad input, 4 diverged), 2 for usage
# errors here, else that of the command that failed. Stay connected: the run ends with this script.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

name='' zone='' type='' slices=1 queued='' spot='' requeue=0 mount='' project='' version=''
flags "name= zone= type= slices= queued spot requeue= mount= project= version= keep" "$@"
[[ $name ]] || fail 2 "--name is missing; for example --name=run-1"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail 2 "--name=$name: expected up to 40 lower-case letters, digits and -, starting with a letter"
[[ $zone ]] || fail 2 "--zone is missing; for example --zone=us-west4-a"
[[ $type ]] || fail 2 "--type is missing; for example --type=v5litepod-16"
slice "$type"
number slices "$slices" 1
number requeue "$requeue" 0
hosts=$((hosts * slices))
((slices == 1)) || queued=1
[[ ! $mount || $mount =~ ^[^:/]+:/.+$ ]] || fail 2 "--mount=$mount: expected HOST:/SHARE"
[[ $mount ]] || ((hosts == 1)) ||
  fail 2 "$slices x $type has $hosts hosts, which must share runs/; set --mount=HOST:/SHARE"
[[ $mount ]] || ((requeue == 0)) ||
  fail 2 "--requeue resumes from what the preempted slice saved, which needs a share; set --mount=HOST:/SHARE"
# gcloud logs in to at most 64 hosts of a queued resource at a time, and the run needs all of them at once
((slices == 1 || hosts <= 64)) ||
  fail 2 "$slices x $type has $hosts hosts; for more than 64 in several slices use launch/gke.sh"
check_args copied
[[ $mount || ! -e runs/$name ]] || fail 2 "runs/$name, where the results would go, already exists; choose another --name"
needs gcloud "see https://cloud.google.com/sdk/docs/install"

tpus=(gcloud compute tpus)
where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
if [[ $queued ]]; then group='queued-resources'; else group='tpu-vm'; fi
what="$name ($slices x $type in $zone)"
delete=("${tpus[@]}" "$group" delete "$name" "${where[@]}" --quiet)
[[ ! $queued ]] || delete+=(--force) # its slices too
# A single slice is addressed by its own name, queued or not; several through the queued resource.
if ((slices > 1)); then
  reach=queued-resources everywhere=(--worker=all --node=all --batch-size=64)
else
  reach=tpu-vm everywhere=(--worker=all)
fi
on_all() { # COMMAND, in the home folder of every host
  run "${tpus[@]}" "$reach" ssh "$name" "${where[@]}" "${everywhere[@]}" \
    --ssh-flag=-oServerAliveInterval=60 --command="$1"
}

# ----------------------------------------------------------------------------------------------------------------------
# steps; each sets `step`, which the closing message names

create() {
  local flags=("${where[@]}" --accelerator-type="$type")
  [[ ! $spot ]] || flags+=(--spot)
  step="creating $name" quiet=''
  created=1 # from here on it may cost money, even if gcloud fails
  if [[ ! $queued ]]; then
    run "${tpus[@]}" tpu-vm create "$name" "${flags[@]}" --version="${version:-$runtime}"
    return
  fi
  if ((slices > 1)); then flags+=(--node-count="$slices" --node-prefix="$name"); else flags+=(--node-id="$name"); fi
  run "${tpus[@]}" queued-resources create "$name" "${flags[@]}" --runtime-version="${version:-$runtime}" || return
  step="waiting for $name"
  local state=''
  for ((;;)); do
    ask_often ACTIVE "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)' || return
    state=$answer
    [[ $state != ACTIVE ]] || break
    [[ $state != FAILED && $state != SUSPEND* ]] || { say "Google says of $name: $state" && return 1; }
    pause 30
  done
  quiet=''
}

copy() {
  step="copying to $name"
  run "${tpus[@]}" "$reach" scp "$file" "$name:" "${where[@]}" "${everywhere[@]}"
}

# uv brings its own Python: the images have 3.10, and the project needs 3.11.
install() {
  step="installing on $name"
  on_all "set -e; mkdir -p sparsecut_jax; tar -xzf ${file##*/} -C sparsecut_jax; cd sparsecut_jax;\
 python3 -m pip install -q --user uv; ~/.local/bin/uv venv -q --python=3.12 .venv;\
 ~/.local/bin/uv pip install -q --python=.venv/bin/python -r requirements.txt 'jax[tpu]'" || return
  [[ ! $mount ]] || on_all "set -e; sudo apt-get -qq install -y nfs-common; mkdir -p sparsecut_jax/runs;\
 sudo mount -t nfs $(quoted "$mount") sparsecut_jax/runs; cd sparsecut_jax; test -w runs || sudo chmod a+rwx runs"
}

# nohup: when a spot VM is preempted, its shells get SIGTERM, which saves, and right after it SIGHUP, which would kill.
train() {
  step="the run on $name"
  on_all "cd sparsecut_jax && exec nohup .venv/bin/python -u -m sparsecut_jax.train --require-platform=tpu\
 $(quoted "${ARGS[@]}")"
}

# Copies into a new folder of runs/, never over an existing one; if it fails, the slice is kept, as it alone has the results.
fetch() {
  quiet=''
  run mkdir -p runs
  often 3 15 fetch_into "runs/$name.part" || { keep=1 && return 1; }
  run mv "runs/$name.part" "runs/$name" && say "the results are in runs/$name"
}

# shellcheck disable=SC2329 # called by often
fetch_into() { # FOLDER
  run rm -rf "$1" &&
    run "${tpus[@]}" tpu-vm scp "$name:sparsecut_jax/runs" "$1" "${where[@]}" --worker=0 --recurse
}

# Whether the run ended with CODE because the slice was preempted. Google may take a while to report it.
preempted() {
  local state i field=state
  case $1 in
    3) return 0 ;; # it was told to stop, and saved
    2 | 4 | 141) return 1 ;; # 141: the reader of the output is gone
  esac
  [[ ! $queued ]] || field=state.state
  for i in 1 2 3 4; do
    ((i == 1)) || pause 30
    state=$(ask '' "${tpus[@]}" "$group" describe "$name" "${where[@]}" --format="value($field)") || true
    [[ $state != PREEMPTED && $state != SUSPEND* ]] || return 0
  done
  return 1
}

there() { # yes, no, or unknown if gcloud fails
  local names
  if ! names=$(ask '' "${tpus[@]}" "$group" list "${where[@]}" --format='value(name.basename())'); then
    echo unknown
  elif grep -qxF -- "$name" <<<"$names"; then
    echo yes
  else
    echo no
  fi
}

# shellcheck disable=SC2329 # called by finish
gone() { # even a failed gcloud call may have created something
  [[ $step == creating* && $(there) == no ]]
}

# ----------------------------------------------------------------------------------------------------------------------

# If the name is taken, nothing of that name may be deleted.
delete_at_the_end
case $(there) in
  yes) fail 2 "$name already exists in $zone; choose another --name, or delete it with: $(quoted "${delete[@]}")" ;;
  unknown) fail 1 "gcloud cannot list the resources in $zone; nothing was created" ;;
esac

step="packing the files" file=${TMPDIR:-/tmp}/$name-$zone.tgz
pack "$file"
for ((attempt = 0; ; attempt++)); do
  code=0
  { create && copy && install && train; } || code=$?
  if ((code == 0 || attempt == requeue)) || ! preempted "$code"; then break; fi
  say "$step ended with exit code $code: the slice was preempted; creating it again ($((attempt + 1)) of $requeue)"
  step="deleting $name" quiet=''
  remove
done
if [[ $step == "the run"* && ! $mount ]] && ! fetch; then
  say "runs/ could not be copied from $name"
  ((code)) || { code=1 && step="copying runs/"; }
fi
((code)) || step=''
exit "$code"
