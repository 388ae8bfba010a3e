#!/usr/bin/env bash
# Nemotron-4 15B as three chained Slurm jobs: data parallelism grows with the batch (96 -> 192 -> 288 nodes of 8 GPUs, tensor parallelism in
# the node). Prints the commands; `... | bash` submits them. Settings (ACCOUNT, PARTITION, TIME, CONTAINER, ...) are read from the
# environment or the file SETTINGS as by slurm.sh, and further overrides may follow:
#
#   CORPUS=/data/nemotron4 ACCOUNT=llm PARTITION=batch launch/recipes/nemotron4_15b.sh run.dir=/lustre/runs/nemotron4_15b
#
# A job that meets its time limit saves, is requeued and continues; the next one starts when it has reached its train.stop_at.
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$LAUNCH_DIR/common.sh"
[[ ${1:-} != --dry-run ]] || shift # nothing but a dry run here

# shellcheck disable=SC2119  # no further names
given_settings

job() { # nodes, overrides
  local nodes=$1
  shift
  # DEPENDENCY comes from the line before, when the commands run: it must not be quoted here
  # shellcheck disable=SC2016
  local after='DEPENDENCY=${before:+afterok:${before%%;*}}'
  echo "before=\$(env $(show NODES="$nodes" JOB_NAME="nemotron4_15b-dp$nodes" ${settings[@]+"${settings[@]}"}) $after $(show bash "$LAUNCH_DIR/slurm.sh" experiment=nemotron4_15b "$@")) && echo \"\$before\"${last-" &&"}"
}
# One chain: a job that is refused ends it, for the next one would begin without what it builds on.
echo "before= &&"
echo "# batch 384: 200B tokens, ends at step 127157"
job 96 train.stop_at=127157 "$@"
echo "# batch 768: 200B tokens, ends at step 190736"
job 192 train.stop_at=190736 "$@"
echo "# batch 1152: 7,600B tokens, then the continued training, to the end"
last=
job 288 "$@"
