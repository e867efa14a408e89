//! The packed weight file, correct and with any content in its header.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{Error, Model, Scratch};

const HIDDEN: usize = 32;
const INNER: usize = 64;
const WORDS: usize = 48;
const POSITIONS: usize = 16;

/// A sound file of a model with one layer: its header, and its data.
fn parts() -> (Map<String, Value>, Vec<u8>) {
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    let mut add = |name: &str, dtype: &str, shape: &[usize]| {
        let items = shape.iter().product::<usize>();
        let start = data.len();
        for at in 0..items {
            let mixed = ((start + at) as u32).wrapping_mul(2_654_435_761) >> 20;
            match dtype {
                "I8" => data.push((mixed % 255) as u8),
                "I32" => data.extend((mixed as i32 % 500 - 250).to_le_bytes()),
                _ => data.extend((mixed as f32 / 40_960.0 + 0.01).to_le_bytes()),
            }
        }
        // A cache line each, so that they are all aligned without gaps.
        assert_eq!(data.len() % 64, 0, "{name}");
        header.insert(
            name.to_owned(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}),
        );
    };
    add("embeddings.word.weight", "I8", &[WORDS, HIDDEN]);
    add("embeddings.word.scale", "F32", &[WORDS]);
    add("embeddings.position.weight", "F32", &[POSITIONS, HIDDEN]);
    for norm in [
        "embeddings.norm",
        "layers.0.attention.norm",
        "layers.0.feed_forward.norm",
    ] {
        add(&format!("{norm}.weight"), "F32", &[HIDDEN]);
        add(&format!("{norm}.bias"), "F32", &[HIDDEN]);
    }
    for (name, inputs, outputs) in [
        ("attention.qkv", HIDDEN, 3 * HIDDEN),
        ("attention.output", HIDDEN, HIDDEN),
        ("feed_forward.up", HIDDEN, INNER),
        ("feed_forward.down", INNER, HIDDEN),
    ] {
        let part = |part: &str| format!("layers.0.{name}.{part}");
        add(&part("weight"), "I8", &[outputs / 16, inputs / 4, 16, 4]);
        add(&part("scale"), "F32", &[outputs]);
        add(&part("weight_sum"), "I32", &[outputs]);
        add(&part("bias"), "F32", &[outputs]);
        add(&part("centre"), "F32", &[inputs]);
    }
    header.insert(
        "__metadata__".to_owned(),
        json!({
            "format": "bert-int8-packed-1", "name": "tiny", "fingerprint": "0123456789",
            "hidden_size": "32", "layers": "1", "heads": "2", "intermediate_size": "64", "vocab_size": "48",
            "max_tokens": "16", "layer_norm_eps": "1e-12", "pooling": "mean",
        }),
    );
    (header, data)
}

/// The file on a cache line, for ever: the model borrows it. Each is a few tens of kilobytes.
fn leaked(json: &[u8], data: &[u8]) -> &'static [u8] {
    // The header is padded with spaces, as the format has it, until the data begin on a line.
    let length = (8 + json.len()).next_multiple_of(64) - 8;
    let mut file = (length as u64).to_le_bytes().to_vec();
    file.extend(json);
    file.resize(8 + length, b' ');
    file.extend(data);
    let mut buffer = vec![0; file.len() + 64].leak();
    let start = buffer.as_ptr().align_offset(64);
    buffer = &mut buffer[start..][..file.len()];
    buffer.copy_from_slice(&file);
    buffer
}

fn load(header: &Map<String, Value>, data: &[u8]) -> Result<Model, Error> {
    Model::packed(leaked(&serde_json::to_vec(header).unwrap(), data))
}

/// Runs a model, if it was taken.
fn run(model: Result<Model, Error>) {
    match model {
        Ok(model) => {
            let ids: [&[u32]; 3] = [&[0, 1, 2, 47], &[5], &[u32::MAX; 40]];
            let vectors = model.embed(&ids, &mut Scratch::default());
            assert!(
                vectors
                    .iter()
                    .all(|vector| vector.0.len() == model.dimension())
            );
        }
        Err(error) => {
            let line = error.to_string();
            assert!(
                line.chars().count() < 500 && !line.contains(char::is_control),
                "{line:?}"
            );
        }
    }
}

#[test]
fn the_correct_file_is_accepted() {
    let (header, data) = parts();
    let model = load(&header, &data).unwrap();
    assert_eq!((model.dimension(), model.max_tokens()), (HIDDEN, POSITIONS));
    assert_eq!(model.id().to_string(), "tiny/int8-1-01234567");
    run(Ok(model));
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        0_usize..200,
        Just(usize::MAX),
        Just(1 << 32),
        (0_usize..400).prop_map(|n| n * 64)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_metadata_beside_full_data_is_refused_or_runs(
        key in any::<prop::sample::Index>(),
        value in prop_oneof![
            size().prop_map(|n| n.to_string()), "\\PC{0,20}", Just("-1".to_owned()), Just("NaN".to_owned()),
            Just("cls".to_owned()), Just("1".repeat(5000)),
        ],
    ) {
        let (mut header, data) = parts();
        let metadata = header["__metadata__"].as_object_mut().unwrap();
        let keys: Vec<String> = metadata.keys().cloned().collect();
        metadata[key.get(&keys)] = value.into();
        run(load(&header, &data));
    }

    #[test]
    fn any_header_beside_full_data_is_refused_or_runs(
        which in any::<prop::sample::Index>(),
        other in any::<prop::sample::Index>(),
        shape in prop::option::of(prop::collection::vec(size(), 0..5)),
        range in prop::option::of((size(), size())),
        dtype in prop::option::of(prop::sample::select(vec!["I8", "F32", "I32", "F16", "U8", "no such"])),
        swap in any::<bool>(),
        remove in any::<bool>(),
    ) {
        let (mut header, data) = parts();
        let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
        let (name, other) = (which.get(&names), other.get(&names));
        if let Some(shape) = shape {
            header[name]["shape"] = json!(shape);
        }
        if let Some((start, end)) = range {
            header[name]["data_offsets"] = json!([start, end]);
        }
        if let Some(dtype) = dtype {
            header[name]["dtype"] = json!(dtype);
        }
        if swap {
            // Both are sound, and each other's.
            let (a, b) = (header[name]["data_offsets"].clone(), header[other]["data_offsets"].clone());
            header[name]["data_offsets"] = b;
            header[other]["data_offsets"] = a;
        }
        if remove {
            header.remove(other);
        }
        run(load(&header, &data));
    }

    #[test]
    fn any_bytes_in_the_header_or_the_data_are_refused_or_run(
        at in any::<prop::sample::Index>(),
        bytes in any::<[u8; 4]>(),
        in_header in any::<bool>(),
    ) {
        let (header, mut data) = parts();
        let mut json = serde_json::to_vec(&header).unwrap();
        let target = if in_header { &mut json } else { &mut data };
        let at = at.index(target.len() - 4);
        target[at..at + 4].copy_from_slice(&bytes);
        run(Model::packed(leaked(&json, &data)));
    }
}
