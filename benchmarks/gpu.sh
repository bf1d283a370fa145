#!/usr/bin/env bash
# All that wants a GPU, in one call of a few minutes: OUT=FOLDER benchmarks/gpu.sh. Needs an environment with dicer and a
# torch for CUDA (PYTHON), and 30 GB in SCRATCH. What is done first is worth most, as the machine may be taken away.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-docs/results/gpu}"
PYTHON="${PYTHON:-.venv/bin/python}"
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$OUT/machine.txt"
"$PYTHON" benchmarks/gpu.py --scratch "${SCRATCH:-/dev/shm}" --output "$OUT/gpu.json" 2>&1 | tee "$OUT/gpu.txt"
"$PYTHON" benchmarks/wide_layer.py --device cuda 2>&1 | tee "$OUT/wide-layer.txt"
"$PYTHON" -m pytest -q tests -k "cuda or gpu" 2>&1 | tee "$OUT/tests.txt"
