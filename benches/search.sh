#!/bin/sh
# Measures similarity search beside FAISS. Arguments are passed on: --short (about 20 seconds),
# --vectors FILE. The Python packages go into a virtual environment under target/. PYTHON can name
# another interpreter that has faiss and numpy.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    environment="${CARGO_TARGET_DIR:-target}/venv-search"
    [ -x "$environment/bin/python" ] || python3 -m venv "$environment"
    PYTHON="$environment/bin/python"
    "$PYTHON" -c 'import faiss, numpy' 2>/dev/null || "$PYTHON" -m pip install --quiet faiss-cpu numpy
fi
exec cargo bench --bench search -- --faiss "$PYTHON" "$@"
