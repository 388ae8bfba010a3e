#!/usr/bin/env bash
# One node of a run: check and raise its limits, then become torchrun's agent. local.sh and slurm.sbatch call it on every node.
#
#   launch/node.sh <ranks of the whole run> <interpreter> <torchrun's arguments>
#
#   NUMA_BINDING     torchrun's --numa-binding: the CPUs that a rank may use (default `node`, those beside its GPU, where there are
#                    GPUs and the program numactl, which it needs; empty: none)
#   NCCL_IB_HCA      `=name,name` is dropped, with a warning, on a node that lacks one of these devices: NCCL then chooses by itself
set -euo pipefail
ranks=$1 python=$2
shift 2
devices=${INFINIBAND_DEVICES:-/sys/class/infiniband} # a variable for the tests

# gloo connects every process with every rank, in two groups; a process that hosts the rendezvous has one more connection a rank.
# Slurm and shells often hand on 1,024 as the soft limit.
needed=$((2 * ranks + 500))
hard=$(ulimit -Hn) soft=$(ulimit -Sn)
if [[ $hard != unlimited ]] && ((hard < needed)); then
  echo "error: $(hostname) allows $hard open files (ulimit -Hn), and $ranks ranks need $needed: raise nofile there (limits.conf, LimitNOFILE of slurmd)" >&2
  exit 2
fi
wanted=$((needed > 65536 ? needed : 65536))
if [[ $hard != unlimited ]] && ((hard < wanted)); then wanted=$hard; fi
[[ $soft == unlimited ]] || ((soft >= wanted)) || ulimit -Sn "$wanted"

# InfiniBand registers memory, which counts as locked.
ulimit -l unlimited 2>/dev/null || true
locked=$(ulimit -l)
if [[ -n $(ls -A "$devices" 2>/dev/null) && $locked != unlimited ]] && ((locked < 1024 * 1024)); then
  echo "warning: $(hostname) allows $locked KiB of locked memory (ulimit -l): NCCL on InfiniBand fails or is slow; it must be unlimited (README.md)" >&2
fi

if [[ ${NCCL_IB_HCA:-} == =* ]]; then
  IFS=, read -r -a names <<<"${NCCL_IB_HCA#=}"
  for name in "${names[@]}"; do
    [[ ! -e $devices/${name%%:*} ]] || continue
    echo "warning: $(hostname) has no $name, which NCCL_IB_HCA names: NCCL chooses its devices there by itself" >&2
    unset NCCL_IB_HCA
    break
  done
fi

if [[ -z ${NUMA_BINDING+set} ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null && command -v numactl >/dev/null; then NUMA_BINDING=node; fi
exec "$python" -m torch.distributed.run ${NUMA_BINDING:+--numa-binding="$NUMA_BINDING"} "$@"
