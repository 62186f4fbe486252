# Sourced by the scripts in this folder: flags, messages, and commands that are printed before they run.
# shellcheck shell=bash

dry_run=''
ARGS=() # arguments after --, for sparsecut_jax.train
exec 3>&2

usage() { # the header comment of the script
  sed -n '2,/^$/ s/^# \{0,1\}//p' "launch/${0##*/}"
}

fail() { # CODE SENTENCE
  echo "error: $2" >&2
  exit "$1"
}

say() { # reports what happened; silent in a dry run
  [[ $dry_run ]] || echo "launch: $*" >&2
}

# flags "name= spot ..." "$@": sets variables of the same names; NAME= takes a value, NAME alone is a switch.
flags() {
  local known=" $1 dry-run " arg key
  shift
  (($#)) || fail 2 "no arguments; for example: $(usage | sed -n 's/^ *\(launch\/\)/\1/p' | head -n 1) (--help lists the flags)"
  while (($#)); do
    arg=$1 key=${1#--}
    key=${key%%=*}
    shift
    case $arg in
      --help | -h) usage && exit 0 ;;
      --) ARGS=("$@") && break ;;
      --*=*)
        [[ $known == *" $key= "* ]] || fail 2 "unknown flag --$key= (--help lists the flags)"
        printf -v "${key//-/_}" '%s' "${arg#*=}"
        ;;
      --*)
        [[ $known != *" $key= "* ]] || fail 2 "--$key needs a value: --$key=..."
        [[ $known == *" $key "* ]] || fail 2 "unknown flag --$key (--help lists the flags)"
        printf -v "${key//-/_}" 1
        ;;
      *) fail 2 "unexpected argument '$arg'; arguments for the training go after --" ;;
    esac
  done
  [[ $dry_run ]] || return 0
  exec 3>&1
  [[ $OLDPWD -ef . ]] || quoted cd "$PWD" >&3
}

needs() { # COMMAND HINT
  [[ $dry_run ]] || command -v "$1" >/dev/null || fail 2 "$1 is not installed here; $2"
}

number() { # FLAG VALUE LEAST
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then fail 2 "--$1=$2: expected an integer, $3 or more"; fi
}

quoted() { # its arguments as one line of shell
  local arg line='' whole=$'*[!a-zA-Z0-9_@%+=:,./^-]*'
  for arg in "$@"; do
    # shellcheck disable=SC2053 # a pattern
    [[ $arg && $arg != $whole ]] || arg="'${arg//\'/\'\\\'\'}'"
    line+=" $arg"
  done
  echo "${line# }"
}

# Prints a command and runs it; a dry run only prints it. It runs in the background, so that a signal is handled at once.
child='' quiet=''
run() {
  [[ $quiet ]] || quoted "$@" >&3 || unread
  [[ ! $dry_run ]] || return 0
  local code=0
  "$@" <&0 &
  child=$!
  wait "$child" || code=$?
  child=''
  return "$code"
}

# ask ANSWER COMMAND...: prints the command's output; a dry run prints ANSWER instead.
ask() {
  [[ $quiet ]] || quoted "${@:2}" >&3
  if [[ $dry_run ]]; then echo "$1"; else "${@:2}"; fi
}

# often TIMES SECONDS COMMAND...: retries until it succeeds. A short network failure must not end a run of days.
often() {
  local misses=0
  until "${@:3}"; do
    ((++misses < $1)) || return 1
    pause "$2"
  done
}

# ask_often ANSWER COMMAND...: sets `answer`
answer=''
# shellcheck disable=SC2034 # for the scripts
asked() { answer=$(ask "$@"); }
ask_often() { often 20 15 asked "$@"; }

# Waits before the next poll, whose commands are not printed again. A signal is handled at once.
pause() { # SECONDS
  quiet=1
  sleep "${LAUNCH_POLL:-$1}" &
  child=$!
  wait "$child" || true
  child=''
}

# Refuses bad arguments before anything costs money. copied: the hosts get only the files that git tracks.
check_args() { # [copied]
  local i arg key file=''
  ((${#ARGS[@]})) || fail 2 "no arguments for the training; add them after --, for example -- --config=configs/base.py"
  for ((i = 0; i < ${#ARGS[@]}; i++)); do
    arg=${ARGS[i]}
    key=${arg#-} key=${key#-} # absl accepts one dash or two, and --flag VALUE as well as --flag=VALUE
    case $key in
      config | config.workdir | workdir) arg+="=${ARGS[++i]-}" key+="=${ARGS[i]-}" ;;
    esac
    [[ $arg != *$'\n'* ]] || fail 2 "an argument contains a line break: $(quoted "$arg")"
    case $key in
      config.workdir=*://* | workdir=*://*) fail 2 "$arg: the workdir must be a folder that all hosts share, not a bucket" ;;
      config.workdir=runs/* | workdir=runs/*) ;;
      config.workdir=* | workdir=*) [[ ! ${1-} ]] || fail 2 "$arg: only runs/ outlives the hosts; choose a folder in it" ;;
      config=*) file=${key#*=} file=${file%%:*} ;;
    esac
  done
  [[ $file ]] || fail 2 "--config is missing from the training's arguments; for example -- --config=configs/base.py"
  [[ $file != /* || ! ${1-} ]] || fail 2 "$file: the hosts have another path; give it relative to the project's folder"
  [[ -f $file ]] || fail 2 "$file: no such file"
  [[ ! ${1-} ]] || check_copied "${file#./}"
}

check_copied() { # FILE
  local lost
  needs git "the script copies the files that git tracks"
  git rev-parse --git-dir >/dev/null 2>&1 ||
    fail 2 "$PWD is not a git repository; the script copies the files that git tracks"
  "${TRACKED[@]}" | tr '\0' '\n' | grep -xF -- "$1" >/dev/null ||
    fail 2 "$1 would not be copied: only files that git tracks are, without tests and docs; git add it"
  lost=$("${TRACKED[@]}" --deleted | tr '\0' ' ')
  [[ ! $lost ]] || fail 2 "git tracks files that do not exist: ${lost% }; restore them, or git rm them"
}

TRACKED=(git ls-files -z . ':!tests' ':!docs') # the files that a run needs

pack() { # FILE: as they are on this disk
  run sh -c "$(quoted "${TRACKED[@]}") | tar -czf $(quoted "$1") --null -T -"
}

# ----------------------------------------------------------------------------------------------------------------------
# What was created is deleted however the script ends; if that fails, the script says what is left and how to delete it.

what='' delete=() keep='' # set by the script: what it creates, the command that deletes it, whether to keep it
step='' created='' file='' # the current step; whether there may be something to delete; the packed files
ending=''

remove() {
  often 3 10 run "${delete[@]}" && created=''
}

unread() { # the reader of the output is gone: the run ends, but what was created is still deleted
  exec >/dev/null 2>&1 3>&1
  [[ $ending ]] || exit 141
}

gone() { # whether there is certainly nothing to delete
  false
}

# shellcheck disable=SC2329 # called by the trap
finish() {
  local code=$? how
  how="delete it with: $(quoted "${delete[@]}")"
  set +e
  trap '' INT TERM HUP PIPE
  trap - EXIT
  quiet='' ending=1
  [[ ! $child ]] || kill "$child" 2>/dev/null
  ((code == 0)) || [[ ! $step ]] || say "$step ended with exit code $code"
  [[ ! $file ]] || run rm -f "$file"
  if [[ ! $created ]]; then
    exit "$code"
  elif ((code < 128)) && gone; then # after a signal the request may still be in flight
    say "$what: nothing is left"
  elif [[ $keep ]]; then
    say "$what still exists and costs money; $how"
  elif remove; then
    say "$what was deleted"
  else
    say "$what was created, may still cost money, and could not be deleted; $how"
    ((code)) || code=1
  fi
  exit "$code"
}

delete_at_the_end() {
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  trap unread PIPE
}

# ----------------------------------------------------------------------------------------------------------------------
# TPU slices: type and topology, as listed by Google. v4 and v5p count TensorCores (two per chip), the others chips.

V4='8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 512:4x8x8 1024:8x8x8 1536:8x8x12 2048:8x8x16 4096:8x16x16'
V5E='1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16'
V5P='8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 384:4x4x12 512:4x8x8 640:4x4x20 768:4x8x12 896:4x4x28'
V5P+=' 1024:8x8x8 1536:8x8x12 2048:8x8x16 3072:8x12x16 4096:8x16x16 6144:12x16x16 8192:16x16x16 12288:16x16x24'

# slice TYPE: sets topology, hosts, chips_per_host, accelerator (GKE's name of the chip) and runtime. Exits if unknown.
slice() {
  local family=${1%-*} size=${1##*-} sizes entry chips known=''
  case $family in
    v4) sizes=$V4 accelerator=tpu-v4-podslice runtime=tpu-ubuntu2204-base ;;
    v5litepod) sizes=$V5E accelerator=tpu-v5-lite-podslice runtime=v2-alpha-tpuv5-lite ;;
    v5p) sizes=$V5P accelerator=tpu-v5p-slice runtime=v2-alpha-tpuv5 ;;
    v6e) sizes=$V5E accelerator=tpu-v6e-slice runtime=v2-alpha-tpuv6e ;;
    *)
      fail 2 "--type=$1: unknown slice type; expected v4-8 to v4-4096, v5litepod-1 to v5litepod-256, \
v5p-8 to v5p-12288, v6e-1 to v6e-256"
      ;;
  esac
  topology=''
  for entry in $sizes; do
    [[ ${entry%:*} != "$size" ]] || topology=${entry#*:}
    known+=" $family-${entry%:*}"
  done
  [[ $topology ]] || fail 2 "--type=$1: unknown slice type; expected one of$known"
  chips=$((${topology//x/*}))
  case $topology in
    *x*x*) chips_per_host=4 ;;
    *) chips_per_host=$((chips > 8 ? 4 : chips)) ;; # up to eight of these chips share one host
  esac
  hosts=$((chips / chips_per_host))
  : "$accelerator" "$runtime" "$hosts"
}
