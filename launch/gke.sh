#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: fills in and applies launch/gke.yaml, streams the log, deletes the JobSet.
#
#   launch/gke.sh --name=NAME --type=v5litepod-16 --claim=PVC -- --config=configs/sparsecut.py:size=7b,stage=pretrain
#
#   --name=NAME      of the JobSet, and of the ConfigMap with the tracked files
#   --type=TYPE      of the slice: v4-8, v5litepod-16, v5p-128, v6e-256, ...
#   --claim=PVC      a ReadWriteMany volume claim (Filestore, say) that becomes runs/ on every host
#   --slices=N       several slices as one run
#   --spot           only on spot nodes
#   --requeue=N      restarts allowed after preemptions (default 10)
#   --grace=SECONDS  time to save after SIGTERM (default 600; spot nodes always give less)
#   --image=IMAGE    default: python:3.12, into which the requirements are installed
#   --context=C --namespace=N   default: kubectl's own
#   --keep           do not delete, even if this script is stopped: the run continues
#   --dry-run        print the commands and the manifest, run none
#
# Arguments after -- go to sparsecut_jax.train. The cluster needs JobSet, and node pools of that type or autoscaling that
# creates them. Exit code: the training's, 2 for usage errors here, else that of the command that failed.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

name='' type='' claim='' slices=1 spot='' requeue=10 grace=600 image=python:3.12 context='' namespace=''
flags "name= type= claim= slices= spot requeue= grace= image= context= namespace= keep" "$@"
[[ $name ]] || fail 2 "--name is missing; for example --name=run-1"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail 2 "--name=$name: expected up to 40 lower-case letters, digits and -, starting with a letter"
[[ $type ]] || fail 2 "--type is missing; for example --type=v5litepod-16"
slice "$type"
[[ $claim =~ ^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$ ]] ||
  fail 2 "--claim=$claim: expected the name of a ReadWriteMany volume claim, which becomes runs/"
[[ $image =~ ^[a-zA-Z0-9][a-zA-Z0-9._/:@-]*$ ]] || fail 2 "--image=$image: expected the name of an image"
number slices "$slices" 1
number requeue "$requeue" 0
number grace "$grace" 1
((slices == 1 || hosts > 1)) || fail 2 "--slices=$slices: GKE only joins slices with several hosts; $type has one host"
check_args copied
needs kubectl "see https://kubernetes.io/docs/tasks/tools"

kubectl=(kubectl)
[[ ! $context ]] || kubectl+=(--context="$context")
[[ ! $namespace ]] || kubectl+=(--namespace="$namespace")
what="$name ($slices x $type)"
delete=("${kubectl[@]}" delete "jobset/$name" "configmap/$name" --ignore-not-found)

manifest() {
  local text line args
  args=$(quoted "${ARGS[@]}") # Kubernetes expands $(VAR), and reads $$ as $
  text=$(if [[ $spot ]]; then cat launch/gke.yaml; else sed '/# spot only$/d' launch/gke.yaml; fi)
  while IFS='' read -r line; do # NAME=VALUE replaces ${NAME}
    text=${text//"\${${line%%=*}}"/"${line#*=}"}
  done <<END
NAME=$name
SLICES=$slices
HOSTS=$hosts
CHIPS=$chips_per_host
ACCELERATOR=$accelerator
TOPOLOGY=$topology
REQUEUE=$requeue
GRACE=$grace
IMAGE=$image
CLAIM=$claim
ARGS=${args//'$'/'$$'}
END
  echo "$text"
}

# ----------------------------------------------------------------------------------------------------------------------

delete_at_the_end
# If the name is taken, nothing of that name may be deleted.
taken=$(ask '' "${kubectl[@]}" get "jobset/$name" "configmap/$name" --ignore-not-found --output=name) ||
  fail 1 "kubectl cannot read the cluster (is JobSet installed?); nothing was created"
[[ ! $taken ]] || fail 2 "$name already exists; choose another --name, or delete it with: $(quoted "${delete[@]}")"

file=${TMPDIR:-/tmp}/$name.tgz
step="packing the files"
pack "$file"
created=1
step="creating $name"
run "${kubectl[@]}" create configmap "$name" --from-file="code.tgz=$file"
since=$(date -u +%Y-%m-%dT%H:%M:%SZ)
filled=$(manifest)
if [[ $dry_run ]]; then
  printf '%s\n' "$(quoted "${kubectl[@]}" apply --filename=-) <<'END'" "$filled" END
else
  run "${kubectl[@]}" apply --filename=- <<<"$filled"
fi

# The first process prints. After each restart its log continues here, until the JobSet has ended.
step="the run of $name"
first="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
state=''
say "the log follows once the run has started; kubectl get pods shows what it is waiting for"
until [[ $state ]]; do
  run "${kubectl[@]}" logs --follow --selector="$first" --since-time="$since" 2>/dev/null || true # fails if it has not started yet
  since=$(date -u +%Y-%m-%dT%H:%M:%SZ)
  ask_often Completed "${kubectl[@]}" get "jobset/$name" --output='jsonpath={.status.terminalState}'
  state=$answer
  [[ $state ]] || pause 15
done
code=0
if [[ $state != Completed ]]; then
  codes='jsonpath={.items[*].status.containerStatuses[0].state.terminated.exitCode}'
  code=$(ask 1 "${kubectl[@]}" get pods --selector="$first" --output="$codes")
  code=${code##* }
  ((code)) || code=1 # another process failed
fi
exit "$code"
