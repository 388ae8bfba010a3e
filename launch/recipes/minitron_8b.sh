#!/usr/bin/env bash
# Mistral-NeMo-Minitron 8B as two chained Slurm jobs of 32 nodes of 8 GPUs (arXiv 2408.11796): the 12B is corrected on the data of the
# distillation, then the pruned 8B learns from it. The 8B is cut out of the original 12B, which needs one process and no GPU; that command is
# printed first, as a comment, and its output must be there when the second job starts. Prints the commands; `... | bash` submits them.
# Settings are read as by slurm.sh, overrides may follow (`run.dir=` is the student's), and three variables name the models:
#
#   ORIGINAL=/models/mistral_nemo_12b TEACHER=/runs/corrected STUDENT=/runs/pruned CORPUS=/data/corpus launch/recipes/minitron_8b.sh
set -euo pipefail
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$LAUNCH_DIR/common.sh"
[[ ${1:-} != --dry-run ]] || shift # nothing but a dry run here

original=${ORIGINAL:-models/mistral_nemo_12b} teacher=${TEACHER:-runs/minitron_8b_teacher} student=${STUDENT:-runs/minitron_8b_pruned}
# shellcheck disable=SC2119  # no further names
given_settings

job() { # name of the experiment, what names the job before, overrides
  local experiment=$1 after=$2
  shift 2
  echo "$(show env NODES="${NODES:-32}" JOB_NAME="$experiment" ${settings[@]+"${settings[@]}"}) $after $(show bash "$LAUNCH_DIR/slurm.sh" experiment="$experiment" "$@")"
}
echo "# $(show mlite prune checkpoint="$original" data=nemotron4_blend data.seq_len=8192 output="$student" target.hidden_size=4096 target.ffn_size=11520)"
echo "# corrects the teacher: 100B tokens"
echo "before=\$($(job minitron_8b_teacher '' init_from="$original" "$@" run.dir="$teacher")) && echo \"\$before\" &&"
echo "# the student learns from it: 380B tokens"
# DEPENDENCY comes from the line before, when the commands run: it must not be quoted here
# shellcheck disable=SC2016
job minitron_8b 'DEPENDENCY=afterok:${before%%;*}' objective.teacher="$teacher" init_from="$student" "$@"
