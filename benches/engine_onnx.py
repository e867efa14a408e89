#!/usr/bin/env python3
"""The engine against ONNX Runtime's int8 on the same token ids, one thread each, in turns on the
same machine.

Needs numpy, onnx, onnxruntime, and the published float32 weights:
    python benches/engine_onnx.py --weights model.safetensors --engine path/to/bench/program
The ONNX graph is built here from the weights, then quantised by onnxruntime's own `quantize_dynamic`, per channel. Prints milliseconds and ratios. The engines run in turn for a tenth of a second each, and the medians over the turns are compared.
"""

import argparse
import json
import pathlib
import statistics
import struct
import subprocess
import tempfile
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

LAYERS, HIDDEN, HEADS = 6, 384, 12
TURNS = 9
SHAPES = [(1, 8), (1, 32), (1, 128), (1, 256), (32, 8), (32, 32), (32, 128), (32, 256)]


def read_safetensors(path):
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, info in header.items():
        if name != "__metadata__" and info["dtype"] == "F32":
            start, end = info["data_offsets"]
            tensors[name] = np.frombuffer(data, np.float32, (end - start) // 4, 8 + length + start).reshape(info["shape"])
    return tensors


class Graph:
    """Collects nodes and constants; every method returns the name of its result."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind, *inputs, **attributes):
        self.count += 1
        name = f"t{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def linear(self, x, weight, bias):
        return self.add("Add", self.add("MatMul", x, self.constant(weight.T)), self.constant(bias))

    def norm(self, x, gain, bias):
        return self.add("LayerNormalization", x, self.constant(gain), self.constant(bias), axis=-1, epsilon=1e-12)


def build(weights, path):
    graph = Graph()
    positions = graph.constant(weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0])
    x = graph.add("Gather", graph.constant(weights["embeddings.word_embeddings.weight"]), "ids")
    x = graph.add("Add", x, graph.add("Gather", positions, "steps"))
    x = graph.norm(x, weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
    split = graph.constant(np.array([0, 0, HEADS, HIDDEN // HEADS], np.int64))
    joined = graph.constant(np.array([0, 0, HIDDEN], np.int64))
    for layer in range(LAYERS):
        def part(name):
            return [weights[f"encoder.layer.{layer}.{name}.{kind}"] for kind in ("weight", "bias")]

        q, k, v = (graph.add("Reshape", graph.linear(x, *part(f"attention.self.{name}")), split) for name in ("query", "key", "value"))
        q = graph.add("Transpose", q, perm=[0, 2, 1, 3])
        k = graph.add("Transpose", k, perm=[0, 2, 3, 1])
        v = graph.add("Transpose", v, perm=[0, 2, 1, 3])
        scores = graph.add("Mul", graph.add("MatMul", q, k), graph.constant(np.float32(1 / np.sqrt(HIDDEN // HEADS))))
        context = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
        context = graph.add("Reshape", graph.add("Transpose", context, perm=[0, 2, 1, 3]), joined)
        x = graph.norm(graph.add("Add", graph.linear(context, *part("attention.output.dense")), x), *part("attention.output.LayerNorm"))
        inner = graph.add("Gelu", graph.linear(x, *part("intermediate.dense")))
        x = graph.norm(graph.add("Add", graph.linear(inner, *part("output.dense")), x), *part("output.LayerNorm"))
    mean = graph.add("ReduceMean", x, graph.constant(np.array([1], np.int64)), keepdims=0)
    size = graph.add("ReduceL2", mean, graph.constant(np.array([1], np.int64)), keepdims=1)
    graph.nodes.append(helper.make_node("Div", [mean, size], ["embedding"]))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    steps = helper.make_tensor_value_info("steps", TensorProto.INT64, ["length"])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", HIDDEN])
    model = helper.make_model(helper.make_graph(graph.nodes, "bert", [ids, steps], [out], graph.constants), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    onnx.save(model, path)


def median_time(call):
    call()
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < 0.1 or len(times) < 3:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True, help="the published model.safetensors")
    parser.add_argument("--engine", required=True, help="the program that `cargo bench --bench engine --no-run` builds")
    parser.add_argument("--turns", type=int, default=TURNS)
    arguments = parser.parse_args()
    engine = subprocess.Popen([arguments.engine, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        exact, int8 = f"{folder}/f32.onnx", f"{folder}/int8.onnx"
        build(read_safetensors(arguments.weights), exact)
        quantize_dynamic(exact, int8, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gather"])
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    print(f"onnxruntime {ort.__version__}, int8 dynamic per channel, one thread; milliseconds, medians of {arguments.turns} turns")
    print(f"{'texts':>9} {'onnx':>9} {'engine':>9} {'ratio':>7}")
    behind = []
    for count, length in SHAPES:
        random = np.random.default_rng(length)
        ids = random.integers(1000, 30000, (count, length), dtype=np.int64)
        ids[:, 0], ids[:, -1] = 101, 102
        feed = {"ids": ids, "steps": np.arange(length)}
        request = json.dumps(ids.tolist()) + "\n"
        theirs, ours = [], []
        for _ in range(arguments.turns):
            theirs.append(median_time(lambda: session.run(None, feed)))
            engine.stdin.write(request)
            engine.stdin.flush()
            ours.append(float(engine.stdout.readline()))
        ratio = statistics.median(a / b for a, b in zip(theirs, ours))
        bar = 3.0 if (count, length) == (1, 8) else 1.0
        if ratio < bar:
            behind.append(f"{count}x{length} (bar {bar:g})")
        print(f"{f'{count}x{length}':>9} {1e3 * statistics.median(theirs):9.3f} {1e3 * statistics.median(ours):9.3f} {ratio:6.2f}x")
    engine.stdin.close()
    engine.wait()
    # Printed and not raised, so that the measurements after this one still run.
    print("behind the bar: " + (", ".join(behind) or "none"))


if __name__ == "__main__":
    main()
