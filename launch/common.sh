# shellcheck shell=bash
# What the launch scripts share. Sourced, never run.
#
# Settings are environment variables; a file named by SETTINGS is read first (NAME=value lines; what is exported already wins).
# `--dry-run` as the first word, or DRY_RUN=1, prints what would run and runs nothing.

# What every script does first. Sets DRY_RUN, the settings, COMMAND (what the ranks run: `check=true` asks for `mlite preflight` instead of
# training) and OVERRIDES (the other words).
# shellcheck disable=SC2034  # read by the scripts
read_command_line() { # the words of the script
  if [[ ${1:-} == --dry-run ]]; then
    DRY_RUN=1
    shift
  fi
  read_settings
  local word
  COMMAND=train OVERRIDES=()
  for word in "$@"; do
    case $word in
      check=true) COMMAND=preflight ;;
      check=*) fail "$word: check takes true; leave it out to train" ;;
      *) OVERRIDES+=("$word") ;;
    esac
  done
}

# The settings file fills in what the environment leaves open. Lines are NAME=value as a shell reads them, comments, or empty.
read_settings() {
  [[ -n ${SETTINGS:-} ]] || return 0
  [[ -f $SETTINGS && -r $SETTINGS ]] || fail "SETTINGS=$SETTINGS cannot be read"
  local line name value number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'} # as an editor on Windows ends lines
    [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z_0-9]*)= ]] ||
      fail "$SETTINGS, line $number: '$line' is not NAME=value"
    name=${BASH_REMATCH[2]} value=${line#"${BASH_REMATCH[0]}"}
    [[ -z ${!name+set} ]] || continue
    # one word at most: `A=one two` would be cut after `one`, and an open quote would end this script
    (words=() && set -f && eval "words=($value"$'\n)' && ((${#words[@]} < 2))) 2>/dev/null ||
      fail "$SETTINGS, line $number: '$line' is not NAME=value; quote a value with spaces or signs"
    eval "export $name=$value"
  done <"$SETTINGS"
}

# Exports every variable of ENV_FILE (NCCL and friends) that is not set yet. A relative name is also looked up beside the scripts, so
# that launch/env/dgx_h100.env means the same in a container's working directory.
read_env_file() {
  [[ -n ${ENV_FILE:-} ]] || return 0
  if [[ ! -f $ENV_FILE && $ENV_FILE != /* && -f $LAUNCH_DIR/${ENV_FILE#launch/} ]]; then ENV_FILE=$LAUNCH_DIR/${ENV_FILE#launch/}; fi
  [[ -f $ENV_FILE && -r $ENV_FILE ]] || fail "ENV_FILE=$ENV_FILE cannot be read; ENV_FILE= (empty) goes without"
  SETTINGS=$ENV_FILE read_settings
}

# The names that ENV_FILE sets.
env_file_names() {
  [[ -z ${ENV_FILE:-} ]] || sed -n -E 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z_0-9]*)=.*/\2/p' "$ENV_FILE"
}

# For a dry run: the variables of ENV_FILE as the ranks get them.
show_env_file() {
  local name
  [[ -n ${ENV_FILE:-} ]] || return 0
  echo "# environment from $ENV_FILE"
  for name in $(env_file_names); do echo "$name=${!name}"; done
}

# Refuses a setting that is not a whole number.
whole_numbers() { # lowest value, names
  local lowest=$1 name
  shift
  for name in "$@"; do
    [[ -z ${!name:-} || (${!name} =~ ^(0|[1-9][0-9]{0,8})$ && ${!name} -ge $lowest) ]] || fail "$name=${!name} is not a whole number from $lowest on"
  done
}

# Refuses a time to save that is too short: a signal is noticed within max(one step, 5 s), and then comes a save. What that takes
# together is SAVE_SECONDS, else what the run's last job measured, else 30.
enough_to_save() { # name of the setting, run directory
  local needed
  needed=${SAVE_SECONDS:-$(status_number "$2/status.json" grace_seconds)}
  ((${!1} >= ${needed:=30})) ||
    fail "$1=${!1} is too short: the ranks need $needed s for a step (at least 5 s) and a save; raise it, or set SAVE_SECONDS if they need less"
}

# Checks the config for a number of ranks as they will, without touching the run directory. Exits with 2 and the message of `mlite train`
# if it is wrong. Where the package is not installed the ranks alone check it.
check_config() { # interpreter, ranks, overrides
  local python=$1 ranks=$2 code=0
  shift 2
  if ! "$python" -c 'import megatron_lite' 2>/dev/null; then
    echo "note: $python cannot import megatron_lite here, so the config is not checked before the start" >&2
    return 0
  fi
  WORLD_SIZE=$ranks "$python" -m megatron_lite train "$@" train.validate_only=true >/dev/null || code=$?
  ((code != 2)) || exit 2
}

# For a recipe: the array `settings` with NAME=value of all that was given here, which must reach the jobs, whoever runs the printed line.
# shellcheck disable=SC2034  # read by the recipes
given_settings() { # further names
  local name
  settings=()
  for name in SETTINGS ACCOUNT PARTITION QOS RESERVATION CONSTRAINT COMMENT GRES MEM CPUS_PER_NODE TIME SIGNAL_SECONDS SAVE_SECONDS MAX_FAILURES \
    EXCLUSIVE SBATCH_ARGS LOG_DIR RUN_DIR GPUS_PER_NODE RANKS_PER_NODE MAX_RESTARTS MASTER_PORT CONTAINER CONTAINER_MOUNTS CONTAINER_ENV \
    CONTAINER_ARGS START_SECONDS NUMA_BINDING ENV_FILE PYTHON MLITE_PYTHON CORPUS "$@"; do
    [[ -z ${!name+set} ]] || settings+=("$name=${!name}")
  done
  if [[ -n ${SETTINGS:-} ]]; then settings[0]=SETTINGS=$(cd "$(dirname "$SETTINGS")" && pwd)/$(basename "$SETTINGS"); fi
}

# Runs a command as the process `child` and waits for it; `code` is then its exit status. A trap ends `wait` before the child has ended.
# shellcheck disable=SC2034  # read by the scripts
run_child() { # command
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
}

# pyxis takes CONTAINER for a file only if it begins with `/` or `.`, and for an image of a registry otherwise.
find_container() {
  [[ -n ${CONTAINER:-} ]] || return 0
  if [[ -f $CONTAINER ]]; then
    CONTAINER=$(cd "$(dirname "$CONTAINER")" && pwd)/$(basename "$CONTAINER")
  elif [[ $CONTAINER == *.sqsh ]]; then
    fail "CONTAINER=$CONTAINER is not a file; name one that all nodes see, or an image of a registry"
  fi
  export CONTAINER
  case " ${CONTAINER_ARGS:-}" in # an option of pyxis reaches the nodes once: a second one would replace ours
    *" --container-env"*) fail "CONTAINER_ARGS=$CONTAINER_ARGS would replace the names of ENV_FILE; write CONTAINER_ENV=NAME,NAME" ;;
    *" --container-mounts"*) fail "CONTAINER_ARGS=$CONTAINER_ARGS would replace the run directory's mount; write CONTAINER_MOUNTS=/from:/to" ;;
  esac
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# A command as one line that a shell understands; plain words stay plain.
show() {
  local word line='' plain='^[A-Za-z0-9_./:=,@%+-]+$'
  for word in "$@"; do
    [[ $word =~ $plain ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

# Seconds of a time limit as Slurm reads it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]; 0 where there is none.
seconds() { # time
  local form='^(([0-9]+)-)?([0-9]+)(:([0-9]+))?(:([0-9]+))?$' days a b c
  case $1 in UNLIMITED | INFINITE | unlimited | infinite | -1) echo 0 && return ;; esac
  [[ $1 =~ $form ]] || return 1
  days=$((10#${BASH_REMATCH[2]:-0})) a=$((10#${BASH_REMATCH[3]})) b=$((10#${BASH_REMATCH[5]:-0})) c=$((10#${BASH_REMATCH[7]:-0}))
  if [[ -n ${BASH_REMATCH[1]} || -n ${BASH_REMATCH[6]} ]]; then
    echo $((days * 86400 + a * 3600 + b * 60 + c))
  else
    echo $((a * 60 + b))
  fi
}

# The run directory: run.dir=, else RUN_DIR, else runs/<run.name= or experiment=>, else runs/default. The last override wins, as in Hydra.
run_dir() {
  local word directory='' name='' experiment=''
  for word in "$@"; do
    case $word in
      run.dir=* | ++run.dir=*) directory=$(plain "${word#*=}") ;;
      run.name=* | ++run.name=*) name=$(plain "${word#*=}") ;;
      experiment=* | +experiment=*) experiment=${word#*=} ;;
    esac
  done
  name=${name:-${experiment:-default}}
  directory=${directory:-${RUN_DIR:-runs/$name}}
  # shellcheck disable=SC2016  # a dollar sign as it is written
  [[ $directory != *'${'* ]] || fail "run.dir=$directory: a launch needs the directory itself, without \${...}"
  echo "$directory"
}

# A value without the quotes that Hydra takes off.
plain() { # value
  local value=$1 quote=${1:0:1}
  if [[ ${#value} -gt 1 && ($quote == "'" || $quote == '"') && ${value: -1} == "$quote" ]]; then
    value=${value:1:${#value}-2}
    value=${value//"\\$quote"/$quote}
  fi
  echo "$value"
}

# One text of the one-line JSON object that training leaves in <run.dir>/status.json, up to a quote inside it.
status_value() { # file key
  grep -o "\"$2\": *\"[^\"]*" "$1" 2>/dev/null | head -n 1 | sed -E 's/^"[a-z]*": *"//; s/\\$//' || true
}

# One number of the same object.
status_number() { # file key
  grep -oE "\"$2\": *[0-9]+" "$1" 2>/dev/null | head -n 1 | grep -oE '[0-9]+$' || true
}

# How this job's training ended, by status.json alone: finished | stopped | preempted | failed | running | none.
#   stopped: train.stop_at was reached.   preempted: a signal came, everything is saved.
#   running: the ranks were gone before they could write.   none: training never began in this job.
outcome() { # run directory, job, text of status.json before the job
  local file=$1/status.json state
  [[ -r $file && "$(cat "$file")" != "$3" && $(status_value "$file" job) == "$2" ]] || {
    echo none
    return
  }
  state=$(status_value "$file" state)
  if [[ $state == preempted && $(status_value "$file" reason) == train.stop_at=* ]]; then state=stopped; fi
  echo "${state:-none}"
}

# `outcome`, but with patience for rank 0 on another node that is just about to write.
settled_outcome() {
  local found tries
  for tries in 1 2 3 4 5 6 7 8 9 10; do
    found=$(outcome "$@")
    [[ $found == running && $tries -lt 10 ]] || break
    sleep 1
  done
  echo "$found"
}

# The newest checkpoint's name, empty when there is none.
newest_checkpoint() { # run directory
  local found
  found=$(find "$1/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort | tail -n 1)
  echo "${found##*/}"
}

# One line a job in <run.dir>/attempts.log: time, job, outcome, newest checkpoint, reason.
note_attempt() { # run directory, job, outcome
  [[ -d $1 ]] || return 0
  printf '%s\t%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$2" "$3" "$(newest_checkpoint "$1")" \
    "$(status_value "$1/status.json" reason)" >>"$1/attempts.log"
}

# How many attempts in a row, the last one included, ended badly without a new checkpoint.
failures_in_a_row() { # run directory
  awk -F'\t' '
    $3 == "failed" || $3 == "running" || $3 == "none" { count = ($4 == last) ? count + 1 : 1; last = $4; next }
    { count = 0; last = "" }
    END { print count + 0 }' "$1/attempts.log" 2>/dev/null || echo 0
}
