#!/usr/bin/env bash
# One node's ranks: a laptop process, one GPU, all GPUs of a node, or this node's part of a multi-node run.
#
#   launch/local.sh [--dry-run] [Hydra overrides]
#
#   RANKS_PER_NODE   processes here (default: the number of GPUs, else 1)
#   RUN_DIR          run directory, unless run.dir=... is among the overrides
#   NODES, MIN_NODES nodes of the run (default 1) and the fewest it continues with (default NODES)
#   RENDEZVOUS       host:port that all nodes reach (the first node), needed for NODES > 1
#   NODE_INDEX       0 on the node that RENDEZVOUS names (default: Kubernetes' JOB_COMPLETION_INDEX, else found by name or LOCAL_ADDR)
#   LOCAL_ADDR       this node's address, where its host name does not resolve for the others
#   JOB              name of this attempt, the same on all nodes (default: host, time and process id)
#   START_SECONDS    how long nodes wait for each other at the start (default 1200): the slowest to pull its image decides
#   MAX_RESTARTS     restarts in place after a rank or a node is lost (default 0; 3 where MIN_NODES < NODES)
#   SHUTDOWN_TIMEOUT seconds that ranks have to save after a signal (default 600); refused if below SAVE_SECONDS
#   SAVE_SECONDS     seconds that they need: max(one step, 5 s) and a save (default: as the run's last job measured, else 30)
#   ENV_FILE         file of variables for NCCL and the like (default none)
#   NUMA_BINDING     see node.sh
#   PYTHON, SETTINGS interpreter; a file with any of these settings
#
# SIGUSR1, SIGTERM or Ctrl-C: the ranks save after their step, then this ends. Again, some seconds later: at once, without a save.
# `check=true` among the overrides runs `mlite preflight` in the place of training, and ends with its exit code.
# Ends with 0 when the run is finished or reached train.stop_at, 75 when it was preempted (start it again), otherwise with an error.
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$LAUNCH_DIR/common.sh"
read_command_line "$@"
set -- ${OVERRIDES[@]+"${OVERRIDES[@]}"}
gpus() { # those that the ranks will see
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi
}
PYTHON=${PYTHON:-${MLITE_PYTHON:-python3}}
NODES=${NODES:-1} MIN_NODES=${MIN_NODES:-${NODES:-1}}
RANKS_PER_NODE=${RANKS_PER_NODE:-$(gpus)}
whole_numbers 1 NODES MIN_NODES START_SECONDS
whole_numbers 0 RANKS_PER_NODE MAX_RESTARTS NODE_INDEX SHUTDOWN_TIMEOUT SAVE_SECONDS
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600}
((RANKS_PER_NODE > 0)) || RANKS_PER_NODE=1
restarts=0
((MIN_NODES == NODES)) || restarts=3
MLITE_JOB=${JOB:-$(hostname)-$(date +%s)-$$}
directory=$(run_dir "$@")

ranks=$((NODES * RANKS_PER_NODE))
export MLITE_JOB TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN_TIMEOUT # a variable: torchrun has the option from torch 2.12 on
command=("$PYTHON")
if ((ranks > 1)); then
  enough_to_save SHUTDOWN_TIMEOUT "$directory"
  command=(bash "$LAUNCH_DIR/node.sh" "$ranks" "$PYTHON" --nproc-per-node="$RANKS_PER_NODE" --max-restarts="${MAX_RESTARTS:-$restarts}"
    --signals-to-handle='SIGTERM,SIGINT,SIGUSR1')
  if ((NODES > 1)); then
    [[ -n ${JOB:-} ]] || fail "NODES=$NODES needs JOB, the same name on every node"
    [[ -n ${RENDEZVOUS:-} ]] || fail "NODES=$NODES needs RENDEZVOUS=host:port, the same on every node"
    command+=(--nnodes="$MIN_NODES:$NODES" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="$MLITE_JOB")
    index=${NODE_INDEX:-${JOB_COMPLETION_INDEX:-}}
    seconds=${START_SECONDS:-1200}
    patience=read_timeout=$seconds,join_timeout=$seconds
    if [[ -n ${LOCAL_ADDR:-} ]]; then
      command+=(--local-addr="$LOCAL_ADDR")
      if [[ -z $index ]]; then
        index=1
        [[ $LOCAL_ADDR != "${RENDEZVOUS%:*}" ]] || index=0
      fi
    fi
    [[ -z $index ]] || patience=is_host=$((index == 0)),$patience
    command+=(--rdzv-conf="$patience")
  else
    command+=(--standalone)
  fi
fi
command+=(-m megatron_lite "$COMMAND" ${@+"$@"} run.dir="$directory")

read_env_file
if [[ -n ${DRY_RUN:-} ]]; then
  check_config "$PYTHON" "$ranks" ${@+"$@"} run.dir="$directory"
  show_env_file
  show env MLITE_JOB="$MLITE_JOB" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$SHUTDOWN_TIMEOUT" "${command[@]}"
  exit 0
fi

child=
signals=0
# shellcheck disable=SC2317,SC2329  # called by the traps
below() { # every process below one
  local process
  for process in $(pgrep -P "$1" 2>/dev/null || true); do
    echo "$process"
    below "$process"
  done
}
# shellcheck disable=SC2317,SC2329  # called by the traps
pass_on() {
  [[ -n $child ]] || exit 75
  if ((signals == 0)); then
    signals=1 signalled_at=$SECONDS
    echo "$1: the ranks save and stop (once more: stop at once)" >&2
    kill -USR1 "$child" 2>/dev/null || true
  elif ((SECONDS > signalled_at + 1)); then # sooner it is the same one: `timeout` and others send theirs twice
    local processes
    processes=$(below "$child") # torchrun itself would wait for its ranks, and leave them behind when it is killed
    # shellcheck disable=SC2086  # a list of numbers
    kill -KILL "$child" $processes 2>/dev/null || true
  fi
}
for name in USR1 TERM INT; do
  # shellcheck disable=SC2064
  trap "pass_on SIG$name" "$name"
done
before=$(cat "$directory/status.json" 2>/dev/null || true)
run_child "${command[@]}"

[[ $COMMAND == train ]] || exit "$code"
case $(settled_outcome "$directory" "$MLITE_JOB" "$before") in
  finished | stopped) exit 0 ;;
  preempted) exit 75 ;;
  none) # the run was finished before, or its config was refused: nothing was written, the process itself says which
    ((code == 0 || signals == 0)) || exit 75
    # torchrun ends with 1 whatever its ranks said; a wrong config is 2 here as with one process
    ((code == 0 || ranks == 1)) || check_config "$PYTHON" "$ranks" ${@+"$@"} run.dir="$directory" 2>/dev/null
    exit "$code" ;;
  *) exit $((code == 0 ? 1 : code)) ;;
esac
