# shellcheck shell=bash
# What the launch scripts share. Sourced, never run.
#
# Settings are environment variables; a file named by SETTINGS is read first (NAME=value lines; what is exported already wins).
# `--dry-run` as the first word, or DRY_RUN=1, prints what would run and runs nothing.

# The settings file fills in what the environment leaves open.
read_settings() {
  [[ -n ${SETTINGS:-} ]] || return 0
  [[ -r $SETTINGS ]] || fail "SETTINGS=$SETTINGS cannot be read"
  local line name
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z_0-9]*)= ]] || continue
    name=${BASH_REMATCH[2]}
    [[ -n ${!name+set} ]] || eval "export $line"
  done <"$SETTINGS"
}

# Exports every variable of ENV_FILE (NCCL and friends) that is not set yet, and prints it in a dry run.
read_env_file() {
  [[ -n ${ENV_FILE:-} ]] || return 0
  [[ -r $ENV_FILE ]] || fail "ENV_FILE=$ENV_FILE cannot be read; ENV_FILE= (empty) goes without"
  echo "# environment from $ENV_FILE"
  SETTINGS=$ENV_FILE read_settings
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

# The run directory: run.dir=, else RUN_DIR, else runs/<run.name= or experiment=>, else runs/default. The last override wins, as in Hydra.
run_dir() {
  local word directory='' name='' experiment=''
  for word in "$@"; do
    case $word in
      run.dir=*) directory=${word#run.dir=} ;;
      run.name=*) name=${word#run.name=} ;;
      experiment=* | +experiment=*) experiment=${word#*=} ;;
    esac
  done
  name=${name:-${experiment:-default}}
  echo "${directory:-${RUN_DIR:-runs/$name}}"
}

# One value of the one-line JSON object that training leaves in <run.dir>/status.json.
status_value() { # file key
  grep -o "\"$2\": *\"\?[^\",}]*" "$1" 2>/dev/null | head -n 1 | sed -E 's/^"[a-z]*": *"?//' || true
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
