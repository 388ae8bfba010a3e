#!/usr/bin/env bash
# Submit slurm.sbatch with everything a site wants to say; prints the job's number.
#
#   launch/slurm.sh [--dry-run] [Hydra overrides]
#
#   NODES            nodes of the job (default 1)
#   GPUS_PER_NODE    GPUs of a node (default 8; 0 for CPU nodes: then say RANKS_PER_NODE)
#   TIME             time limit (default 04:00:00); the run continues in the next job, however short this one is
#   ACCOUNT, PARTITION, QOS, RESERVATION, CONSTRAINT, COMMENT, DEPENDENCY, MEM, CPUS_PER_NODE   as sbatch's options; empty: not given
#   EXCLUSIVE        1 (default): whole nodes
#   SIGNAL_SECONDS   how long before the time limit the ranks are asked to save (default 600); refused if below SAVE_SECONDS
#   SAVE_SECONDS     seconds that they need: max(one step, 5 s) and a save (default: as the run's last job measured, else 30)
#   JOB_NAME         default: last part of the run directory
#   LOG_DIR          job output (default: <run directory>/logs)
#   SBATCH_ARGS      any further options of sbatch, separated by spaces
# The config is checked here for NODES x RANKS_PER_NODE ranks, before the job waits in the queue, if the package is
# installed here; the ranks check it in any case.
# What the job itself reads (RANKS_PER_NODE, MIN_NODES, CONTAINER, ...) is described in slurm.sbatch.
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAUNCH_DIR
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$LAUNCH_DIR/common.sh"
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
read_settings
export GPUS_PER_NODE=${GPUS_PER_NODE:-8} SIGNAL_SECONDS=${SIGNAL_SECONDS:-600}
export NODES=${NODES:-1}
directory=$(run_dir "$@")
logs=${LOG_DIR:-$directory/logs}
whole_numbers 1 NODES MIN_NODES RANKS_PER_NODE SIGNAL_SECONDS MAX_FAILURES MASTER_PORT CPUS_PER_NODE
whole_numbers 0 GPUS_PER_NODE MAX_RESTARTS SAVE_SECONDS
enough_to_save SIGNAL_SECONDS "$directory"
limit=$(seconds "${TIME:-04:00:00}") || fail "TIME=$TIME is not a time; write hours:minutes:seconds, days-hours or minutes"
((limit == 0 || limit > SIGNAL_SECONDS + 60)) ||
  fail "TIME=${TIME:-04:00:00} leaves no time to train before the signal to save, SIGNAL_SECONDS=$SIGNAL_SECONDS and up to a minute before the end"
[[ $GPUS_PER_NODE != 0 || -n ${RANKS_PER_NODE:-} ]] || fail "GPUS_PER_NODE=0 needs RANKS_PER_NODE, the processes of a node"

command=(sbatch --parsable --nodes="$NODES" --ntasks-per-node=1 --time="${TIME:-04:00:00}" --job-name="${JOB_NAME:-$(basename "$directory")}"
  --signal="B:USR1@$SIGNAL_SECONDS" --requeue --open-mode=append --output="${logs//%/%%}/%x-%j.out" --export=ALL)
[[ $GPUS_PER_NODE == 0 ]] || command+=(--gpus-per-node="$GPUS_PER_NODE")
[[ ${EXCLUSIVE:-1} != 1 ]] || command+=(--exclusive)
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
python=${MLITE_PYTHON:-${PYTHON:-python3}} # PYTHON may be one of the nodes or of the container
# A job that waits for another one begins at a step, and with a batch size, that is not known yet.
if [[ -z ${DEPENDENCY:-} ]] && "$python" -c 'import megatron_lite' 2>/dev/null; then
  check_config "$python" $((NODES * ${RANKS_PER_NODE:-$GPUS_PER_NODE})) "$@" run.dir="$directory" || [[ $? != 2 ]] || exit 2
fi
mkdir -p "$logs"
exec "${command[@]}"
