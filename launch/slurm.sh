#!/usr/bin/env bash
# Submit slurm.sbatch with everything a site wants to say; prints the job's number.
#
#   launch/slurm.sh [--dry-run] [Hydra overrides]
#
#   NODES            nodes of the job (default 1)
#   GPUS_PER_NODE    GPUs of a node (default 8; 0 for CPU nodes: then say RANKS_PER_NODE)
#   TIME             time limit (default 04:00:00); the run continues in the next job, however short this one is
#   ACCOUNT, PARTITION, QOS, RESERVATION, CONSTRAINT, COMMENT, DEPENDENCY, MEM, CPUS_PER_NODE   as sbatch's options; empty: not given
#   GRES             how the site asks for GPUs, where --gpus-per-node is refused: gpu:8, gpu:h100:8; `none`: not at all
#   EXCLUSIVE        1 (default): whole nodes, with all of their memory (MEM=0). 0: a part of a node, which needs CPUS_PER_NODE
#   SIGNAL_SECONDS   how long before the time limit the ranks are asked to save (default 600); refused if below SAVE_SECONDS
#   SAVE_SECONDS     seconds that they need: max(one step, 5 s) and a save (default: as the run's last job measured, else 30)
#   JOB_NAME         default: last part of the run directory
#   LOG_DIR          job output (default: <run directory>/logs)
#   SBATCH_ARGS      any further options of sbatch, separated by spaces
# `check=true` among the overrides runs `mlite preflight` in the place of training (TIME then 00:15:00, nothing is requeued).
# The config is checked here, by a dry run too, for NODES x RANKS_PER_NODE ranks, before the job waits in the queue, if the package is
# installed here; the ranks check it in any case.
# What the job itself reads (RANKS_PER_NODE, MIN_NODES, CONTAINER, ...) is described in slurm.sbatch.
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAUNCH_DIR
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$LAUNCH_DIR/common.sh"
read_command_line "$@"
[[ ${1:-} != --dry-run ]] || shift
if [[ $COMMAND == preflight ]]; then
  TIME=${TIME:-00:15:00} SIGNAL_SECONDS=${SIGNAL_SECONDS:-60}
fi
TIME=${TIME:-04:00:00}
export GPUS_PER_NODE=${GPUS_PER_NODE:-8} SIGNAL_SECONDS=${SIGNAL_SECONDS:-600}
export NODES=${NODES:-1}
directory=$(run_dir "$@")
logs=${LOG_DIR:-$directory/logs}
whole_numbers 1 NODES MIN_NODES RANKS_PER_NODE SIGNAL_SECONDS START_SECONDS MAX_FAILURES MASTER_PORT CPUS_PER_NODE
whole_numbers 0 GPUS_PER_NODE MAX_RESTARTS SAVE_SECONDS
[[ $COMMAND == preflight ]] || enough_to_save SIGNAL_SECONDS "$directory"
limit=$(seconds "$TIME") || fail "TIME=$TIME is not a time; write hours:minutes:seconds, days-hours or minutes"
((limit == 0 || limit > SIGNAL_SECONDS + 60)) ||
  fail "TIME=$TIME leaves no time to train before the signal to save, SIGNAL_SECONDS=$SIGNAL_SECONDS and up to a minute before the end"
[[ $GPUS_PER_NODE != 0 || -n ${RANKS_PER_NODE:-} ]] || fail "GPUS_PER_NODE=0 needs RANKS_PER_NODE, the processes of a node"
[[ ${EXCLUSIVE:-1} == 1 || -n ${CPUS_PER_NODE:-} ]] || fail "EXCLUSIVE=$EXCLUSIVE needs CPUS_PER_NODE: Slurm would give one CPU to all ranks of a node"
find_container
if [[ -z ${DEPENDENCY:-} ]]; then # a job that waits for another one begins at a step, and with a batch size, that is not known yet
  # PYTHON may be one of the nodes or of the container
  check_config "${MLITE_PYTHON:-${PYTHON:-python3}}" $((NODES * ${RANKS_PER_NODE:-$GPUS_PER_NODE})) ${OVERRIDES[@]+"${OVERRIDES[@]}"} run.dir="$directory"
fi

command=(sbatch --parsable --nodes="$NODES" --ntasks-per-node=1 --time="$TIME" --job-name="${JOB_NAME:-$(basename "$directory")}"
  --signal="B:USR1@$SIGNAL_SECONDS" --requeue --open-mode=append --output="${logs//%/%%}/%x-%j.out" --export=ALL
  --propagate=NONE) # limits (memlock, open files) are those of the nodes, not of the machine that this is called on
if [[ -n ${GRES:-} ]]; then
  [[ $GRES == none ]] || command+=(--gres="$GRES")
elif [[ $GPUS_PER_NODE != 0 ]]; then
  command+=(--gpus-per-node="$GPUS_PER_NODE")
fi
if [[ ${EXCLUSIVE:-1} == 1 ]]; then
  MEM=${MEM-0} # all of it: where a site sets a default per CPU or node, --exclusive alone would give that
  command+=(--exclusive)
fi
# A job that may continue with fewer nodes must survive the loss of one.
((${MIN_NODES:-$NODES} == NODES)) || command+=(--no-kill)
for setting in ACCOUNT PARTITION QOS RESERVATION CONSTRAINT COMMENT DEPENDENCY MEM; do
  [[ -z ${!setting:-} ]] || command+=("--$(tr '[:upper:]' '[:lower:]' <<<"$setting")=${!setting}")
done
[[ -z ${CPUS_PER_NODE:-} ]] || command+=(--cpus-per-task="$CPUS_PER_NODE")
if [[ -n ${SBATCH_ARGS:-} ]]; then
  read -r -a more <<<"$SBATCH_ARGS"
  command+=("${more[@]}")
fi
command+=("$LAUNCH_DIR/slurm.sbatch" "$@")

if [[ -n ${DRY_RUN:-} ]]; then
  echo "# submit"
  show "${command[@]}"
  echo "# and the job then runs"
  DRY_RUN=1 bash "$LAUNCH_DIR/slurm.sbatch" "$@"
  exit 0
fi
mkdir -p "$logs"
exec "${command[@]}"
