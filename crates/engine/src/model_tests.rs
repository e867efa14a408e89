//! The whole model: batches, unusual inputs, and hostile files.

use std::path::Path;

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::safetensors::{Header, PREFIX_BYTES, header_bytes};
use super::{Error, Kernel, Model, Scratch};

const BUNDLED: &[u8] = include_bytes!("../../../assets/model/all-MiniLM-L6-v2.int8.safetensors");

fn ids(length: usize, seed: usize) -> Vec<u32> {
    (0..length)
        .map(|at| (1000 + (at * 7919 + seed * 104_729) % 29_000) as u32)
        .collect()
}

#[test]
fn a_text_in_a_batch_has_the_same_vector_as_alone() {
    let texts: Vec<Vec<u32>> = [8, 1, 40, 3, 17, 256, 9, 16, 90, 2]
        .iter()
        .enumerate()
        .map(|(seed, length)| ids(*length, seed))
        .collect();
    let batch: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    for kernel in Kernel::available() {
        let model = Model::bundled().unwrap().with_kernel(kernel);
        let mut scratch = Scratch::default();
        let together = model.embed(&batch, &mut scratch);
        for (text, vector) in batch.iter().zip(&together) {
            assert_eq!(
                model.embed(&[text], &mut scratch)[0],
                *vector,
                "{} {} tokens",
                kernel.name(),
                text.len()
            );
        }
    }
}

#[test]
fn kernels_agree_on_finished_vectors() {
    let text = ids(30, 1);
    let vectors: Vec<_> = Kernel::available()
        .into_iter()
        .map(|kernel| {
            (
                kernel.name(),
                Model::bundled()
                    .unwrap()
                    .with_kernel(kernel)
                    .embed(&[&text], &mut Scratch::default())
                    .remove(0),
            )
        })
        .collect();
    for (name, vector) in &vectors {
        let cosine: f32 = vector
            .0
            .iter()
            .zip(vectors[0].1.0.iter())
            .map(|(a, b)| a * b)
            .sum();
        // Without a fused multiply-add numbers near a rounding boundary are quantised to their
        // neighbours, and the vectors are as far apart as quantisation takes either from the exact
        // one.
        assert!(cosine > 0.9995, "{name}: {cosine}");
        assert!(
            *name == "portable" || *vector == vectors[0].1,
            "{name} has other bits than {}",
            vectors[0].0
        );
    }
}

#[test]
fn unusual_inputs_give_vectors_and_no_panic() {
    let model = Model::bundled().unwrap();
    let mut scratch = Scratch::default();
    assert!(model.embed(&[], &mut scratch).is_empty());
    let long = ids(1000, 1);
    let out = model.embed(
        &[
            &[],
            &long,
            &long[..256],
            &[101, u32::MAX, 102],
            &[101, 0, 102],
            &[30_522],
            &[0],
        ],
        &mut scratch,
    );
    assert!(out[0].0.iter().all(|x| *x == 0.0));
    assert_eq!(out[1], out[2], "ids past the limit count");
    assert_eq!(out[3], out[4], "an unknown id is not id 0");
    assert_eq!(
        out[5], out[6],
        "the first id outside the vocabulary is not id 0"
    );
    for vector in &out[1..] {
        let length: f32 = vector.0.iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-5 && vector.0.len() == model.dimension());
    }
}

#[test]
fn the_bundled_file_has_its_stated_content() {
    let (prefix, rest) = BUNDLED.split_first_chunk::<PREFIX_BYTES>().unwrap();
    let (json, data) = rest.split_at(header_bytes(*prefix, BUNDLED.len() as u64).unwrap());
    let header = Header::parse(json, data.len() as u64).unwrap();
    let digest: String = Sha256::digest(data)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(header.metadata["fingerprint"], digest);
    let model = Model::bundled().unwrap();
    assert_eq!(
        model.id().to_string(),
        format!("all-MiniLM-L6-v2/int8-1-{}", &digest[..8])
    );
    assert_eq!((model.dimension(), model.max_tokens()), (384, 256));
    for (name, tensor) in &header.tensors {
        assert!(
            tensor.range.0.is_multiple_of(64),
            "{name} is not on a cache line"
        );
        let Some(base) = name.strip_suffix(".weight_sum") else {
            continue;
        };
        let bytes = |name: &str| &data[header.tensors[name].range.0..header.tensors[name].range.1];
        let weights = bytes(&format!("{base}.weight"));
        let outputs = tensor.shape[0];
        for (channel, sum) in bytes(name).as_chunks().0.iter().enumerate() {
            let panel = &weights[channel / 16 * 16 * (weights.len() / outputs)..]
                [..16 * (weights.len() / outputs)];
            let found: i32 = panel
                .as_chunks::<64>()
                .0
                .iter()
                .flat_map(|quad| &quad[channel % 16 * 4..][..4])
                .map(|w| i32::from(*w as i8))
                .sum();
            assert_eq!(i32::from_le_bytes(*sum), found, "{name} {channel}");
        }
    }
}

/// A BERT of hidden size 32 with two heads and layers, as a folder.
pub(super) struct Tiny {
    tensors: Vec<(String, Vec<usize>)>,
    config: serde_json::Value,
}

impl Tiny {
    pub(super) fn new() -> Self {
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        let mut add = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
        add("embeddings.word_embeddings.weight", &[50, 32]);
        add("embeddings.position_embeddings.weight", &[24, 32]);
        add("embeddings.token_type_embeddings.weight", &[2, 32]);
        add("embeddings.LayerNorm.weight", &[32]);
        add("embeddings.LayerNorm.bias", &[32]);
        for layer in 0..2 {
            for (part, outputs, inputs) in [
                ("attention.self.query", 32, 32),
                ("attention.self.key", 32, 32),
                ("attention.self.value", 32, 32),
                ("attention.output.dense", 32, 32),
                ("intermediate.dense", 64, 32),
                ("output.dense", 32, 64),
            ] {
                add(
                    &format!("encoder.layer.{layer}.{part}.weight"),
                    &[outputs, inputs],
                );
                add(&format!("encoder.layer.{layer}.{part}.bias"), &[outputs]);
            }
            for part in ["attention.output", "output"] {
                add(
                    &format!("encoder.layer.{layer}.{part}.LayerNorm.weight"),
                    &[32],
                );
                add(
                    &format!("encoder.layer.{layer}.{part}.LayerNorm.bias"),
                    &[32],
                );
            }
        }
        let config = serde_json::json!({
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "vocab_size": 50, "max_position_embeddings": 24, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
        });
        Self { tensors, config }
    }

    pub(super) fn number(tensor: usize, at: usize) -> f32 {
        let mixed = ((tensor * 131 + at) as u32).wrapping_mul(2_654_435_761) ^ 0x5bd1_e995;
        (mixed.wrapping_mul(2_246_822_519) >> 16) as f32 / 65_536.0 - 0.45
    }

    fn file(&self, dtype: &str) -> Vec<u8> {
        self.file_of(|_| dtype, Self::number)
    }

    /// A weights file of types that depend on the tensor's name and numbers that depend on its
    /// place and theirs.
    pub(super) fn file_of<'a>(
        &self,
        dtype: impl Fn(&str) -> &'a str,
        number: impl Fn(usize, usize) -> f32,
    ) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        for (index, (name, shape)) in self.tensors.iter().enumerate() {
            let (start, dtype) = (data.len(), dtype(name));
            for at in 0..shape.iter().product() {
                let x = number(index, at);
                match dtype {
                    "F32" => data.extend(x.to_le_bytes()),
                    "F16" => data.extend(half::f16::from_f32(x).to_le_bytes()),
                    _ => data.extend(half::bf16::from_f32(x).to_le_bytes()),
                }
            }
            header.insert(name.clone(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
        }
        let json = serde_json::to_vec(&header).unwrap();
        [(json.len() as u64).to_le_bytes().to_vec(), json, data].concat()
    }

    pub(super) fn write(&self, dir: &Path, dtype: &str) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), self.file(dtype)).unwrap();
    }

    /// The vector of `ids` by plain double-precision arithmetic.
    fn exact(&self, ids: &[u32], cls: bool) -> Vec<f64> {
        let tensor = |name: &str| -> Vec<f64> {
            let index = self
                .tensors
                .iter()
                .position(|tensor| tensor.0 == name)
                .unwrap();
            (0..self.tensors[index].1.iter().product())
                .map(|at| f64::from(Self::number(index, at)))
                .collect()
        };
        let norm = |x: &mut Vec<f64>, name: &str| {
            let (gain, bias) = (
                tensor(&format!("{name}.LayerNorm.weight")),
                tensor(&format!("{name}.LayerNorm.bias")),
            );
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let deviation =
                (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
            x.iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = (*x - mean) / deviation * gain[i] + bias[i]);
        };
        let linear = |x: &[f64], name: &str| -> Vec<f64> {
            let (weight, bias) = (
                tensor(&format!("{name}.weight")),
                tensor(&format!("{name}.bias")),
            );
            weight
                .chunks(x.len())
                .zip(bias)
                .map(|(row, bias)| bias + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>())
                .collect()
        };
        let (words, positions) = (
            tensor("embeddings.word_embeddings.weight"),
            tensor("embeddings.position_embeddings.weight"),
        );
        let segment = tensor("embeddings.token_type_embeddings.weight");
        let mut rows: Vec<Vec<f64>> = Vec::new();
        for (at, id) in ids.iter().enumerate() {
            let mut row = (0..32)
                .map(|i| words[*id as usize * 32 + i] + positions[at * 32 + i] + segment[i])
                .collect();
            norm(&mut row, "embeddings");
            rows.push(row);
        }
        for layer in 0..2 {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            let [q, k, v] = ["query", "key", "value"].map(|part| {
                rows.iter()
                    .map(|row| linear(row, &name(&format!("attention.self.{part}"))))
                    .collect::<Vec<_>>()
            });
            for (t, row) in rows.iter_mut().enumerate() {
                let mut context = vec![0.0; 32];
                for head in [0..16, 16..32] {
                    let score = |other: &Vec<f64>| {
                        (q[t][head.clone()]
                            .iter()
                            .zip(&other[head.clone()])
                            .map(|(a, b)| a * b)
                            .sum::<f64>()
                            / 4.0)
                            .exp()
                    };
                    let weights: Vec<f64> = k.iter().map(score).collect();
                    for d in head {
                        context[d] = weights.iter().zip(&v).map(|(w, v)| w * v[d]).sum::<f64>()
                            / weights.iter().sum::<f64>();
                    }
                }
                let attended = linear(&context, &name("attention.output.dense"));
                row.iter_mut().zip(attended).for_each(|(x, y)| *x += y);
                norm(row, &name("attention.output"));
                let mut inner = linear(row, &name("intermediate.dense"));
                inner
                    .iter_mut()
                    .for_each(|x| *x *= 0.5 * (1.0 + erf(*x / 2.0_f64.sqrt())));
                let outer = linear(&inner, &name("output.dense"));
                row.iter_mut().zip(outer).for_each(|(x, y)| *x += y);
                norm(row, &name("output"));
            }
        }
        let pooled: Vec<f64> = (0..32)
            .map(|i| {
                rows[..if cls { 1 } else { rows.len() }]
                    .iter()
                    .map(|row| row[i])
                    .sum()
            })
            .collect();
        let length = pooled.iter().map(|x| x * x).sum::<f64>().sqrt();
        pooled.iter().map(|x| x / length).collect()
    }
}

/// By its Taylor series, which keeps ten digits on the range that the tiny model reaches.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for k in 1..300 {
        term *= 2.0 * x * x / f64::from(2 * k + 1);
        sum += term;
    }
    sum * (-x * x).exp() * 2.0 / std::f64::consts::PI.sqrt()
}

fn cosine(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum()
}

#[test]
fn folders_run_in_all_precisions_and_both_poolings_on_every_kernel() {
    let tiny = Tiny::new();
    let ids: Vec<u32> = (0..19).map(|at| at * 7 % 50).collect();
    for cls in [false, true] {
        let exact = tiny.exact(&ids, cls);
        for (dtype, least) in [("F32", 0.998), ("F16", 0.99999), ("BF16", 0.998)] {
            let dir = tempfile::tempdir().unwrap();
            tiny.write(dir.path(), dtype);
            std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
            let pooling = serde_json::json!({"pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": !cls});
            std::fs::write(
                dir.path().join("1_Pooling/config.json"),
                pooling.to_string(),
            )
            .unwrap();
            std::fs::write(
                dir.path().join("sentence_bert_config.json"),
                r#"{"max_seq_length": 20}"#,
            )
            .unwrap();
            for kernel in Kernel::available() {
                let model = Model::from_dir(dir.path()).unwrap().with_kernel(kernel);
                assert_eq!((model.dimension(), model.max_tokens()), (32, 20));
                let cosine = cosine(&model.embed(&[&ids], &mut Scratch::default())[0].0, &exact);
                assert!(
                    cosine > least,
                    "{dtype} {} cls {cls}: {cosine}",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn id_of_a_folder_changes_with_its_weights_precision_and_pooling() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new();
    let mut seen = Vec::new();
    let mut note = || seen.push(Model::from_dir(dir.path()).unwrap().id().clone());
    tiny.write(dir.path(), "F32");
    note();
    tiny.write(dir.path(), "F16");
    note();
    let mut file = tiny.file("F32");
    *file.last_mut().unwrap() ^= 1;
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    note();
    std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    std::fs::write(
        dir.path().join("1_Pooling/config.json"),
        r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#,
    )
    .unwrap();
    note();
    for (at, id) in seen.iter().enumerate() {
        assert!(!seen[..at].contains(id), "{id} names two models");
    }
}

#[test]
fn other_kinds_of_models_are_refused_with_the_reason() {
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let dir = tempfile::tempdir().unwrap();
        let mut tiny = Tiny::new();
        change(&mut tiny.config);
        tiny.write(dir.path(), "F32");
        match Model::from_dir(dir.path()) {
            Err(Error::Unsupported { reason }) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(&|config| config["model_type"] = "xlm-roberta".into()).contains("xlm-roberta"));
    assert!(refused(&|config| config["hidden_act"] = "relu".into()).contains("relu"));
    assert!(
        refused(&|config| config["position_embedding_type"] = "relative_key".into())
            .contains("positions")
    );
    for (key, value) in [
        ("hidden_size", 33),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 1_i64 << 40),
        ("intermediate_size", 1 << 40),
        ("vocab_size", 0),
    ] {
        refused(&|config| config[key] = value.into());
    }
}

#[test]
fn damaged_folders_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(
        matches!(Model::from_dir(dir.path()), Err(Error::Read { path, .. }) if path.ends_with("config.json"))
    );
    let mut tiny = Tiny::new();
    tiny.write(dir.path(), "F32");
    let sound = tiny.file("F32");
    let path = dir.path().join("model.safetensors");
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Model::from_dir(dir.path()).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    };
    for length in [0, 7, 8, 100, sound.len() - 1] {
        refused(&sound[..length]);
    }
    refused(&[u64::MAX.to_le_bytes().as_slice(), &sound[8..]].concat());
    refused(&[sound.as_slice(), b"more"].concat());
    let mut infinite = sound.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    refused(&infinite);
    tiny.tensors.pop();
    refused(&tiny.file("F32"));
    tiny.tensors
        .push(("encoder.layer.1.output.LayerNorm.bias".to_owned(), vec![31]));
    refused(&tiny.file("F32"));
}

fn parse(bytes: &[u8]) -> Result<Header, String> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX_BYTES>().ok_or("short")?;
    let length = header_bytes(*prefix, bytes.len() as u64)?;
    let (json, data) = rest.split_at(length);
    Header::parse(json, data.len() as u64)
}

proptest! {
    #[test]
    fn any_bytes_are_a_header_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn accepted_headers_have_ranges_inside_the_file(
        tensors in proptest::collection::vec((0_usize..40, 0_usize..40, 0_usize..4, any::<u16>()), 0..4), length in 0_usize..64,
    ) {
        let shape = |kind, size| match kind { 0 => vec![size], 1 => vec![size, 2], 2 => vec![usize::MAX, size], _ => vec![] };
        let mut header = serde_json::Map::new();
        for (at, (start, end, kind, size)) in tensors.iter().enumerate() {
            let tensor = serde_json::json!({"dtype": "I8", "shape": shape(*kind, usize::from(size % 40)), "data_offsets": [start, end]});
            header.insert(at.to_string(), tensor);
        }
        let json = serde_json::to_vec(&header).unwrap();
        let bytes = [&(json.len() as u64).to_le_bytes(), json.as_slice(), &vec![0; length]].concat();
        if let Ok(header) = parse(&bytes) {
            for tensor in header.tensors.values() {
                prop_assert!(tensor.range.0 <= tensor.range.1 && tensor.range.1 <= length);
            }
        }
    }

    #[test]
    fn a_damaged_weights_file_never_panics(at in 0_usize..6000, byte in any::<u8>(), cut in 0_usize..20_000) {
        let tiny = Tiny::new();
        let mut bytes = tiny.file("F16");
        bytes[at] = byte;
        bytes.truncate(bytes.len().saturating_sub(cut * usize::from(byte % 2)));
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path(), "F16");
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        if let Ok(model) = Model::from_dir(dir.path()) {
            model.embed(&[&[1, 2, 3]], &mut Scratch::default());
        }
    }

    #[test]
    fn a_damaged_bundled_header_never_panics(at in 0_usize..9000, byte in any::<u8>()) {
        // The model borrows its file for ever, so each case leaks a small one: the header without
        // its data, which must be refused.
        let mut bytes = BUNDLED[..20_000].to_vec();
        bytes[at] = byte;
        prop_assert!(Model::packed(bytes.leak()).is_err());
    }
}
