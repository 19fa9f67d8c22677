#!/usr/bin/env bash
# Collects, on a machine with internet, what run.sh needs on one without; benchmarks/gpu/prepare.sh --help says how.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root"
exec "${PYTHON:-python3}" -m benchmarks.gpu.bundle "$@"
