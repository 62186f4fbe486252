#!/usr/bin/env bash
# Trains on a Cloud TPU: creates a slice, copies the tracked files, installs, runs, streams the log, deletes the slice.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-8 -- --config=configs/base.py
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-16 --slices=2 --spot --requeue=5 \
#       --mount=10.0.0.2:/share -- --config=configs/sparsecut.py:size=7b,stage=pretrain --config.mesh.replica=2
#
#   --name=NAME --zone=ZONE   of the slice; --project=P where it is not gcloud's own
#   --type=TYPE               v4-8, v5litepod-16, v5p-128, v6e-256, ...
#   --slices=N                several slices as one run; always queued
#   --queued                  wait in the queue until there is room, rather than fail
#   --spot                    cheaper, and may be taken away
#   --requeue=N               a slice that was taken away is created anew up to N times; the run goes on where it was
#   --mount=HOST:/SHARE       NFS (Filestore) that becomes runs/ on every host; needed for several hosts and to
#                             requeue. Without it runs/ is copied to runs/NAME here before the slice is deleted
#   --version=RUNTIME         default: what Google names for the type
#   --keep                    do not delete at the end, whatever happens
#   --dry-run                 print the commands, run none
#
# Behind -- stand the arguments of sparsecut_jax.train. Exit code: the training's (0 done, 2 something to mend, 4
# diverged), 2 for mistakes here, otherwise that of the command that failed. Stay connected: without you the run ends.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

name='' zone='' type='' slices=1 queued='' spot='' requeue=0 mount='' project='' version=''
flags "name= zone= type= slices= queued spot requeue= mount= project= version= keep" "$@"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail 2 "--name=$name: expected up to 40 small letters, digits and -, a letter first"
[[ $zone ]] || fail 2 "--zone is missing; for example --zone=us-west4-a"
[[ $type ]] || fail 2 "--type is missing; for example --type=v5litepod-16"
slice "$type"
number slices "$slices" 1
number requeue "$requeue" 0
hosts=$((hosts * slices))
((slices == 1)) || queued=1
[[ ! $mount || $mount =~ ^[^:/]+:/.+$ ]] || fail 2 "--mount=$mount: expected HOST:/SHARE"
[[ $mount ]] || ((hosts == 1)) ||
  fail 2 "$slices x $type has $hosts hosts, which must share runs/: give --mount=HOST:/SHARE"
[[ $mount ]] || ((requeue == 0)) ||
  fail 2 "--requeue goes on from what the last slice has saved: give --mount=HOST:/SHARE"
# gcloud logs in to at most 64 hosts of a queued resource at a time, and the run needs all of them at once
((slices == 1 || hosts <= 64)) ||
  fail 2 "$slices x $type has $hosts hosts; more than 64 in several slices need launch/gke.sh"
check_args copied
[[ $mount || ! -e runs/$name ]] || fail 2 "runs/$name is already there, and is where the results would go; choose another --name"
needs gcloud "see https://cloud.google.com/sdk/docs/install"

tpus=(gcloud compute tpus)
where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
if [[ $queued ]]; then group='queued-resources'; else group='tpu-vm'; fi
what="$name ($slices x $type in $zone)"
delete=("${tpus[@]}" "$group" delete "$name" "${where[@]}" --quiet)
[[ ! $queued ]] || delete+=(--force) # its slices too
# One slice is reached by its own name, queued or not; several through the queued resource.
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
# steps; a step says which it is, for the sentence at the end

create() {
  local flags=("${where[@]}" --accelerator-type="$type")
  [[ ! $spot ]] || flags+=(--spot)
  step="creating $name" quiet=''
  created=1 # from here on it may cost money, also where gcloud ends with an error
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

# nohup: when a spot VM is taken away its shells get SIGTERM, which saves, and right after SIGHUP, which would kill.
train() {
  step="the run on $name"
  on_all "cd sparsecut_jax && exec nohup .venv/bin/python -u -m sparsecut_jax.train --require-platform=tpu\
 $(quoted "${ARGS[@]}")"
}

# Beside what is in runs/ here, never into it; where it fails the slice stays, for it alone has the results.
fetch() {
  quiet=''
  run mkdir -p runs
  often 3 15 fetch_into "runs/$name.part" || { keep=1 && return 1; }
  run mv "runs/$name.part" "runs/$name" && say "its results are in runs/$name"
}

# shellcheck disable=SC2329 # called by often
fetch_into() { # FOLDER
  run rm -rf "$1" &&
    run "${tpus[@]}" tpu-vm scp "$name:sparsecut_jax/runs" "$1" "${where[@]}" --worker=0 --recurse
}

# Whether the run ended with CODE because the slice was taken away. Google may need a while to say so.
preempted() {
  local state i field=state
  case $1 in
    3) return 0 ;; # it was told to stop, and has saved
    2 | 4 | 141) return 1 ;; # 141: nobody reads any more
  esac
  [[ ! $queued ]] || field=state.state
  for i in 1 2 3 4; do
    ((i == 1)) || pause 30
    state=$(ask '' "${tpus[@]}" "$group" describe "$name" "${where[@]}" --format="value($field)") || true
    [[ $state != PREEMPTED && $state != SUSPEND* ]] || return 0
  done
  return 1
}

there() { # yes, no, or unknown where gcloud does not say
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
gone() { # also where gcloud has failed it may have created something
  [[ $step == creating* && $(there) == no ]]
}

# ----------------------------------------------------------------------------------------------------------------------

# Of a name that is taken nothing may be deleted.
delete_at_the_end
case $(there) in
  yes) fail 2 "$name is already in $zone; choose another --name, or delete it with: $(quoted "${delete[@]}")" ;;
  unknown) fail 1 "gcloud cannot list what is in $zone; nothing was created" ;;
esac

step="packing the files" file=${TMPDIR:-/tmp}/$name-$zone.tgz
pack "$file"
for ((attempt = 0; ; attempt++)); do
  code=0
  { create && copy && install && train; } || code=$?
  if ((code == 0 || attempt == requeue)) || ! preempted "$code"; then break; fi
  say "$step ended with exit code $code: the slice was taken away; creating it again ($((attempt + 1)) of $requeue)"
  step="deleting $name" quiet=''
  remove
done
if [[ $step == "the run"* && ! $mount ]] && ! fetch; then
  say "runs/ could not be copied from $name"
  ((code)) || { code=1 && step="copying runs/"; }
fi
((code)) || step=''
exit "$code"
