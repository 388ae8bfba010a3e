#!/usr/bin/env bash
# Everything that one GPU can show, in under 25 minutes: the bf16 parts first, then Transformer Engine is built and the FP8 parts run.
#
#   benchmarks/gpu_session.sh                   bf16, build and fp8, one after the other
#   benchmarks/gpu_session.sh bf16              only this; then build, then fp8, where a command may not take so long
#
#   OUT         folder of the logs and of table.txt, to which each call adds (default runs/gpu_session)
#   PYTHON      interpreter with the project's packages (default .venv/bin/python, else python3)
#   TE          version of Transformer Engine (default: the one in constraints.txt)
#   TE_WHEELS   folder with its packages, for a machine without a network: transformer_engine-*.whl, transformer_engine_cu1?-*.whl,
#               transformer_engine_torch-* (source, to be compiled) and what they need that is not installed (onnx, onnxscript, einops,
#               pydantic, nvdlfw-inspect, nvidia-cudnn-frontend, packaging, setuptools, wheel, ninja, pybind11); whole or as pieces of
#               `split -b 48M FILE FILE.part.`
#   DEVICE=cpu  a dry pass without a GPU: builds nothing; FP8 tests run on the CPU; TINY=1: small models
#
# A part that fails or runs out of its time costs nothing else. Ends with 1 if one did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/gpu_session} DEVICE=${DEVICE:-cuda}
if [[ -z ${PYTHON:-} ]]; then PYTHON=.venv/bin/python && [[ -x $PYTHON ]] || PYTHON=python3; fi
TE=${TE:-$(sed -n 's/^transformer_engine==//p' constraints.txt)}
small=()
[[ -z ${TINY:-} ]] || small=(--tiny --steps 2 --warmup 1)
parts=" ${*:-bf16 build fp8} "
for word in $parts; do
  [[ $word =~ ^(bf16|build|fp8)$ ]] || { echo "$0: unknown part $word; choose bf16, build or fp8" >&2; exit 2; }
done
mkdir -p "$OUT"
rows=() failed=0

part() { # part NAME SECONDS COMMAND...: runs it, keeps its output and how it ended
  local name=$1 seconds=$2 begin=$SECONDS result=ok
  shift 2
  printf '== %s\n' "$name"
  timeout --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1 || { result="failed ($?)" && failed=1; }
  # the last line of text; a table's frame is not ASCII
  rows+=("$(printf '%-12s %-12s %5ds  %s' "$name" "$result" $((SECONDS - begin)) "$(LC_ALL=C grep '^[[:print:]]*[[:alnum:]][[:print:]]*$' \
    "$OUT/$name.log" | tail -n 1 | cut -c -100)")")
  [[ $result == ok ]]
}

# shellcheck disable=SC2329 # through bash_part
tests() { "$PYTHON" -m pytest -p no:xdist -v -m gpu "$@"; }

# shellcheck disable=SC2329 # through bash_part
build() { # the compiled library comes as a wheel, the bindings to this torch are compiled here
  local from=() name file
  "$PYTHON" -m pip --version || "$PYTHON" -m ensurepip
  if [[ -n ${TE_WHEELS:-} ]]; then
    for file in "$TE_WHEELS"/*.part.aa; do
      [[ -e $file ]] || continue
      name=${file%.part.aa}
      cat "$name".part.* >"$OUT/$(basename "$name")"
    done
    from=(--no-index --find-links "$TE_WHEELS" --find-links "$OUT")
  fi
  local cuda headers bin
  cuda=$("$PYTHON" -c 'import torch; print(torch.version.cuda.split(".")[0])')
  "$PYTHON" -m pip install "${from[@]}" --no-deps "transformer-engine==$TE" "transformer-engine-cu$cuda==$TE"
  "$PYTHON" -m pip install "${from[@]}" setuptools wheel ninja pybind11 packaging # what compiles it
  # cuDNN's and NCCL's headers come with the packages that torch needs, and TE looks for them in the toolkit alone
  headers=$("$PYTHON" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/include")))')
  bin=$(dirname "$(command -v "$PYTHON")")
  # No prebuilt bindings are looked for without a network. No constraints.txt: the torch that is here stays, and its numpy.
  PATH="$(cd "$bin" && pwd):$PATH" CPATH="$headers${CPATH:+:$CPATH}" NVTE_PYTORCH_FORCE_BUILD=${TE_WHEELS:+TRUE} NVTE_WITH_NCCL_EP=0 \
    MAX_JOBS=$(nproc) NVTE_FRAMEWORK=pytorch "$PYTHON" -m pip install "${from[@]}" --no-build-isolation "transformer-engine-torch==$TE"
  "$PYTHON" -c 'import transformer_engine.pytorch as te; print("built, FP8:", te.is_fp8_available(return_reason=True))'
}
export -f tests build
export PYTHON OUT TE TE_WHEELS="${TE_WHEELS:-}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

bash_part() { # a part that is a function of this file
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" bash -euo pipefail -c "$*"
}

begin=$SECONDS
if [[ $parts == *" bf16 "* ]]; then
  bash_part tests_bf16 400 tests tests/gpu --deselect tests/gpu/test_fp8.py || true
  part model_bf16 150 "$PYTHON" benchmarks/throughput.py model --precision bf16 --device "$DEVICE" "${small[@]}" || true
  part layer_bf16 60 "$PYTHON" benchmarks/throughput.py layer --precision bf16 --device "$DEVICE" "${small[@]}" || true
fi
built=1 # if not by this call, then before it
if [[ $parts == *" build "* && $DEVICE != cpu ]]; then bash_part build 420 build || built=0; fi
if [[ $parts == *" fp8 "* ]] && ((built)); then
  part layer_fp8 120 "$PYTHON" benchmarks/throughput.py layer --device "$DEVICE" "${small[@]}" || true
  part model_fp8 150 "$PYTHON" benchmarks/throughput.py model --precision bf16 fp8_current fp8_block --device "$DEVICE" "${small[@]}" || true
  bash_part tests_fp8 180 tests tests/gpu/test_fp8.py || true
fi
te=$("$PYTHON" -c 'from importlib.metadata import version; print(version("transformer-engine-torch"))' 2>/dev/null) || te="not built"
{
  printf '%s, %s, torch %s, Transformer Engine %s, %d s\n' "$(date -u +%F)" \
    "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)" \
    "$("$PYTHON" -c 'import torch; print(torch.__version__)')" "$te" $((SECONDS - begin))
  printf '%s\n' "${rows[@]}"
  for log in model_bf16 layer_bf16 layer_fp8 model_fp8; do
    [[ ${rows[*]} != *"$log "* ]] || cat "$OUT/$log.log"
  done
} | tee -a "$OUT/table.txt"
exit "$failed"
