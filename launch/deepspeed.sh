#!/usr/bin/env bash
# The ranks of a hostfile by DeepSpeed's launcher (ssh), for clusters without Slurm. Any engine: engine=deepspeed or engine=fsdp.
#
#   HOSTFILE=hosts launch/deepspeed.sh [--dry-run] [Hydra overrides]
#
#   HOSTFILE         lines `host slots=8`; needed
#   MASTER_ADDR, MASTER_PORT   first host and a free port there (default: chosen by DeepSpeed, 29500)
#   RUN_DIR          run directory, unless run.dir=... is among the overrides; on a file system that all hosts share
#   ENV_FILE         variables for NCCL and the like (default none)
#   SSH_PORT, DEEPSPEED_ARGS   further options of the launcher
#   PYTHON, SETTINGS interpreter; a file with any of these settings
#
# SIGUSR1, SIGTERM or Ctrl-C here: on one host the ranks save and stop. DeepSpeed's launcher passes no signal to other hosts: there, send
# SIGUSR1 to one rank (`pkill -USR1 -f "megatron_lite train"` on any host); all ranks agree to save and stop.
# `check=true` among the overrides runs `mlite preflight` in the place of training.
# Exit codes as in local.sh: 0 finished or train.stop_at reached, 75 preempted, otherwise an error.
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$LAUNCH_DIR/common.sh"
read_command_line "$@"
set -- ${OVERRIDES[@]+"${OVERRIDES[@]}"}
PYTHON=${PYTHON:-${MLITE_PYTHON:-python3}}
[[ -n ${HOSTFILE:-} ]] || fail "HOSTFILE is not set: name a file with lines 'host slots=8'"
[[ -r $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE cannot be read"
whole_numbers 1 MASTER_PORT SSH_PORT
export MLITE_JOB=${JOB:-$(hostname)-$(date +%s)-$$}
directory=$(run_dir "$@")

command=("$PYTHON" -m deepspeed.launcher.runner --hostfile="$HOSTFILE" --module --no_local_rank)
hosts=$(sed -E 's/#.*//; /^[[:space:]]*$/d; s/[[:space:]].*//' "$HOSTFILE" | sort -u)
if [[ $hosts == localhost || $hosts == 127.0.0.1 ]]; then # no ssh to oneself
  command+=(--no_ssh_check)
  MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
fi
[[ -z ${MASTER_ADDR:-} ]] || command+=(--master_addr="$MASTER_ADDR")
[[ -z ${MASTER_PORT:-} ]] || command+=(--master_port="$MASTER_PORT")
[[ -z ${SSH_PORT:-} ]] || command+=(--ssh_port="$SSH_PORT")
if [[ -n ${DEEPSPEED_ARGS:-} ]]; then
  read -r -a more <<<"$DEEPSPEED_ARGS"
  command+=("${more[@]}")
fi
command+=(megatron_lite "$COMMAND" "$@" run.dir="$directory")

read_env_file
if [[ -n ${DRY_RUN:-} ]]; then
  ranks=$(sed -E 's/#.*//; s/.*slots=([0-9]+).*/\1/' "$HOSTFILE" | awk '/^[0-9]+$/ { sum += $1 } END { print sum + 0 }')
  check_config "$PYTHON" "$ranks" "$@" run.dir="$directory"
  show_env_file
  show env MLITE_JOB="$MLITE_JOB" "${command[@]}"
  exit 0
fi

ulimit -Sn "$(ulimit -Hn)" # as node.sh does; on the other hosts the limits are those of their sshd
# Variables reach the other hosts through this file.
environment=$(mktemp)
trap 'rm -f "$environment"' EXIT
export DS_ENV_FILE=$environment
{
  echo "MLITE_JOB=$MLITE_JOB"
  for name in $(env_file_names); do echo "$name=${!name:-}"; done
} >"$environment"

child=
# shellcheck disable=SC2317,SC2329  # called by the traps
ranks_below() { # every training process below a process
  local process
  for process in $(pgrep -P "$1" || true); do
    ranks_below "$process"
    if tr '\0' ' ' <"/proc/$process/cmdline" 2>/dev/null | grep -q -- '-m megatron_lite train' &&
      [[ -z $(pgrep -P "$process" -f -- '-m megatron_lite train' || true) ]]; then echo "$process"; fi
  done
}
# shellcheck disable=SC2317,SC2329  # called by the traps
pass_on() {
  [[ -n $child ]] || exit 75
  local rank
  for rank in $(ranks_below "$child"); do kill -USR1 "$rank" 2>/dev/null || true; done
}
trap pass_on USR1 TERM INT
before=$(cat "$directory/status.json" 2>/dev/null || true)
# A session of its own: a Ctrl-C in the terminal must not reach DeepSpeed's launcher, which would kill the ranks.
run_child setsid "${command[@]}"
[[ $COMMAND == train ]] || exit "$code"
case $(settled_outcome "$directory" "$MLITE_JOB" "$before") in
  finished | stopped) exit 0 ;;
  preempted) exit 75 ;;
  none) exit "$code" ;;
  *) exit $((code == 0 ? 1 : code)) ;;
esac
