#!/bin/bash
# All measurements of one GPU, in one command and within 9 minutes: benchmarks/gpu.sh [OUT] [PYTHON]
# Run it in the repository's root. Where PYTHON's JAX sees no GPU, the first run installs one into .venv-gpu, which
# takes minutes more. Each section writes its figures as soon as it is done; what comes last is lost first.
set -u
out=${1:-results/gpu}
python=${2:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
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
if ! "$python" -c 'import importlib.metadata as m; m.version("kd-jax")' 2>/dev/null; then
    # kd_jax tells its own version in every result. Where nothing can be installed, this says it.
    about=$(mktemp -d)
    mkdir "$about/kd_jax.dist-info"
    { echo 'Metadata-Version: 2.1'; echo 'Name: kd-jax'; sed -n 's/^version = "\(.*\)"/Version: \1/p' pyproject.toml; } \
        >"$about/kd_jax.dist-info/METADATA"
    export PYTHONPATH=.:$about
fi
measure() {
    local limit=$1 folder=$2
    shift 2
    timeout "$limit" "$python" -m benchmarks.throughput "$@" --out "$out/$folder" || echo "$folder ended with $?" >&2
}
measure 330 main --rounds 9 --whole-rounds 1 --only steps end-to-end seeds evaluation
measure 110 xla --rounds 2 --only xla
measure 90 more --rounds 6 --only memory batches
