#!/bin/bash
# All measurements of one GPU, in one command and within 9 minutes: benchmarks/gpu.sh [OUT] [PYTHON]
# Hinton's whole table on it, within 10 minutes, or as far as it comes: benchmarks/gpu.sh OUT PYTHON hinton2015
# The loss of a large vocabulary, within 4 minutes: benchmarks/gpu.sh OUT PYTHON linear-divergence
# Steps of convolutional networks, within 5 minutes: benchmarks/gpu.sh OUT PYTHON networks
# Steps of a language model, and sampling, within 5 minutes: benchmarks/gpu.sh OUT PYTHON language
# Run it in the repository's root. Where PYTHON's JAX sees no GPU, the first run installs one into .venv-gpu, which
# takes minutes more. Each section writes its figures as soon as it is done; what comes last is lost first.
set -u
out=${1:-results/gpu}
python=${2:-python3}
# Packages may have been put where PYTHONPATH names them.
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
sees_gpu() { "$1" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; }
if ! sees_gpu "$python"; then
    if ! nvidia-smi >/dev/null 2>&1; then
        echo "nvidia-smi finds no GPU: run this on a machine with an NVIDIA GPU and its driver" >&2
        exit 2
    fi
    [ -x .venv-gpu/bin/python ] || "$python" -m venv .venv-gpu
    python=.venv-gpu/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check --editable '.[cuda,parity,peers]'
    if ! sees_gpu "$python"; then
        echo "JAX of $python sees no GPU: see what '$python -c \"import jax; jax.devices()\"' says of the driver" >&2
        exit 1
    fi
fi
mkdir -p "$out"
if [ "${3:-}" = hinton2015 ]; then
    time timeout 600 "$python" -m kd_jax.reproduce hinton2015 --out "$out/hinton2015" --resume
    exit
fi
if [ "${3:-}" = linear-divergence ]; then
    timeout 240 "$python" -m benchmarks.linear_divergence --gpu --chunk 0 1024 2048 4096 --rounds 15 --out "$out"
    exit
fi
measure() {
    local limit=$1 folder=$2
    shift 2
    timeout "$limit" "$python" -m benchmarks.throughput "$@" --out "$out/$folder" || echo "$folder ended with $?" >&2
}
if [ "${3:-}" = networks ] || [ "${3:-}" = language ]; then
    measure 300 "$3" --rounds 15 --only "$3"
    exit
fi
measure 330 main --rounds 9 --whole-rounds 1 --only steps end-to-end seeds evaluation
measure 110 xla --rounds 2 --only xla
measure 90 more --rounds 6 --only memory batches
