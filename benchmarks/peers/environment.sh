#!/usr/bin/env bash
# Makes the environment in which megatron-core and OLMo-core run beside ours (benchmarks/train_step.py).
# usage: benchmarks/peers/environment.sh [folder]     default: benchmarks/peers/.venv; PYTHON chooses the interpreter (3.11)
set -euo pipefail
folder=${1:-"$(dirname "$0")/.venv"}
"${PYTHON:-python3}" -m venv "$folder"
install=("$folder/bin/python" -m pip install --quiet --no-compile)
"${install[@]}" torch==2.13.0 # first and alone, and the version of ours: the comparison is about what is built on it
"${install[@]}" megatron-core==0.16.1 ai2-olmo-core==3.0.0 transformers einops google-cloud-storage boto3
"$folder/bin/python" -c 'import megatron.core, olmo_core.train' && echo "made $folder"
