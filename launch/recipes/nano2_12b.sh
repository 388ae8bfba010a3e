#!/usr/bin/env bash
# Nemotron Nano 2 12B as one Slurm job of 32 nodes of 8 GPUs: tensor parallelism 8 inside the node, 32 data-parallel ranks, which divide
# the batch of 736 = 2^5 x 23 (NODES=92 does too). Prints the command; `... | bash` submits it. Settings are read as by slurm.sh, and
# further overrides may follow:
#
#   CORPUS=/data/nano2 ACCOUNT=llm PARTITION=batch launch/recipes/nano2_12b.sh run.dir=/lustre/runs/nano2_12b
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$LAUNCH_DIR/common.sh"
[[ ${1:-} != --dry-run ]] || shift # nothing but a dry run here

given_settings DEPENDENCY

nodes=${NODES:-32}
echo "# batch 736 over $nodes data-parallel ranks of 8 GPUs: 20T tokens in 3,317,128 steps"
echo "env $(show NODES="$nodes" JOB_NAME=nano2_12b ${settings[@]+"${settings[@]}"}) $(show bash "$LAUNCH_DIR/slurm.sh" experiment=nano2_12b "$@")"
