#!/usr/bin/env bash
# Measures edge-phi3 on this machine's NVIDIA GPU; benchmarks/gpu/run.sh --help says how. PYTHON names a Python 3.11 or newer.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root"
exec "${PYTHON:-python3}" -m benchmarks.gpu.bootstrap "$@"
