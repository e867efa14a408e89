//! Usual folders, and damaged and hostile ones.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::{Encode, Error, Model};
use super::Engine;
use crate::model_tests::Tiny;

/// A tokenizer of nine tokens that distinguishes upper and lower case.
fn tokenizer_json() -> Value {
    let special = |id: u32, content: &str| json!({"id": id, "content": content});
    json!({
        "added_tokens": [special(0, "[PAD]"), special(1, "[UNK]"), special(2, "[CLS]"), special(3, "[SEP]")],
        "normalizer": {"type": "BertNormalizer", "lowercase": false},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {"type": "WordPiece", "unk_token": "[UNK]",
                  "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "A": 6, "text": 7, "##b": 8}},
    })
}

/// A folder with a tiny model in `transformer`.
fn folder_at(transformer: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join(transformer);
    fs::create_dir_all(&inner).unwrap();
    Tiny::new().write(&inner, "F32");
    put(&inner, "tokenizer.json", &tokenizer_json());
    (dir, inner)
}

fn folder() -> TempDir {
    folder_at("").0
}

fn put(dir: &Path, file: &str, value: &Value) {
    let path = dir.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, value.to_string()).unwrap();
}

fn vector(engine: &Engine, text: &str) -> Vec<f32> {
    let ids = engine.tokenize(text);
    engine.embed(&[&ids], &mut engine.scratch())[0].0.to_vec()
}

/// The error of a folder that is refused.
fn refusal(dir: &Path) -> Error {
    match Engine::from_dir(dir) {
        Err(error) => error,
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn the_bundled_engine_has_the_id_of_its_model() {
    // Its tokenizer is part of the program, and vectors are stored under this name.
    let engine = Engine::bundled().unwrap();
    assert_eq!(engine.model_id(), Model::bundled().unwrap().id());
}

#[test]
fn the_id_changes_with_the_tokenizer() {
    let dir = folder();
    let id = || Engine::from_dir(dir.path()).unwrap().model_id().to_string();
    let before = id();
    assert_eq!(before, id(), "and with nothing else");
    let mut tokenizer = tokenizer_json();
    tokenizer["normalizer"]["lowercase"] = json!(true);
    put(dir.path(), "tokenizer.json", &tokenizer);
    let other_tokenizer = id();
    put(
        dir.path(),
        "sentence_bert_config.json",
        &json!({"do_lower_case": true}),
    );
    let lower_case = id();
    assert_ne!(before, other_tokenizer);
    assert_ne!(other_tokenizer, lower_case);
}

#[test]
fn the_parts_are_found_where_modules_json_says() {
    let modules = |transformer: &str, pooling: &str| {
        json!([
            {"idx": 0, "name": "0", "path": transformer, "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": pooling, "type": "sentence_transformers.models.Pooling"},
        ])
    };
    let plain = vector(&Engine::from_dir(folder().path()).unwrap(), "a text");
    let (dir, inner) = folder_at("0_Transformer");
    put(
        dir.path(),
        "modules.json",
        &modules("0_Transformer", "2_Pool"),
    );
    put(
        &inner,
        "sentence_bert_config.json",
        &json!({"max_seq_length": 9}),
    );
    let engine = Engine::from_dir(dir.path()).unwrap();
    assert_eq!(vector(&engine, "a text"), plain);
    assert_eq!(engine.tokenize(&"a ".repeat(50)).len(), 9);
    let cls = json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false});
    put(dir.path(), "2_Pool/config.json", &cls);
    let engine = Engine::from_dir(dir.path()).unwrap();
    assert_ne!(vector(&engine, "a text"), plain);
    for outside in ["..", "/", "0_Transformer/../.."] {
        put(dir.path(), "modules.json", &modules(outside, "2_Pool"));
        assert!(matches!(refusal(dir.path()), Error::Unsupported { .. }));
    }
}

#[test]
fn texts_are_lowercased_first_if_the_folder_says_so() {
    let dir = folder();
    let ids = || Engine::from_dir(dir.path()).unwrap().tokenize("A b");
    assert_eq!(ids(), [2, 6, 5, 3]);
    put(
        dir.path(),
        "sentence_bert_config.json",
        &json!({"do_lower_case": true}),
    );
    assert_eq!(ids(), [2, 4, 5, 3]);
}

#[test]
fn the_tokenizers_limit_counts_if_there_is_no_other() {
    let dir = folder();
    let most = || Model::from_dir(dir.path()).map(|model| model.max_tokens());
    assert_eq!(most().unwrap(), 24);
    for (limit, expected) in [(json!(12), 12), (json!(1e30), 24), (Value::Null, 24)] {
        let config = json!({ "model_max_length": limit });
        put(dir.path(), "tokenizer_config.json", &config);
        assert_eq!(most().unwrap(), expected);
    }
    for limit in [0.0, -5.0] {
        let config = json!({ "model_max_length": limit });
        put(dir.path(), "tokenizer_config.json", &config);
        assert!(matches!(most(), Err(Error::Unsupported { .. })));
    }
    put(
        dir.path(),
        "sentence_bert_config.json",
        &json!({"max_seq_length": 20}),
    );
    assert_eq!(most().unwrap(), 20);
}

#[test]
fn a_model_of_mixed_precision_is_refused() {
    let dir = folder();
    let tiny = Tiny::new();
    let half = |name: &str| name.contains("layer.1.attention.self.key.weight");
    let (mostly_whole, mostly_half) = (
        tiny.file_of(|name| if half(name) { "F16" } else { "F32" }, Tiny::number),
        tiny.file_of(|name| if half(name) { "F32" } else { "F16" }, Tiny::number),
    );
    for file in [mostly_whole, mostly_half] {
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        let refused = refusal(dir.path()).to_string();
        assert!(refused.contains("only some"), "{refused}");
    }
    // All tensors that are no matrix are computed in single precision in any case.
    let file = tiny.file_of(
        |name| {
            if name.contains("LayerNorm") {
                "F32"
            } else {
                "F16"
            }
        },
        Tiny::number,
    );
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    Engine::from_dir(dir.path()).unwrap();
}

#[test]
fn weights_that_give_no_vector_are_refused() {
    let dir = folder();
    for number in [0.0, 1e30, f32::NAN] {
        let file = Tiny::new().file_of(|_| "F32", |_, _| number);
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        let refused = refusal(dir.path()).to_string();
        assert!(refused.contains("model.safetensors"), "{refused}");
    }
}

#[test]
fn a_tokenizer_file_that_is_too_long_is_not_read() {
    let dir = folder();
    let file = fs::File::create(dir.path().join("tokenizer.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    let refused = refusal(dir.path()).to_string();
    assert!(refused.contains("longer than"), "{refused}");
}

/// Numbers that break arithmetic, among some that do not.
fn hostile_number() -> impl Strategy<Value = f32> {
    prop_oneof![
        3 => prop_oneof![Just(65_504.0_f32), Just(-65_504.0), Just(0.0), Just(-0.0), Just(1e-45), Just(1e-30), Just(6e-8)],
        3 => -100.0_f32..100.0,
        1 => prop_oneof![Just(f32::MAX), Just(f32::NAN), Just(f32::NEG_INFINITY), Just(65_536.0)],
    ]
}

/// Values of configuration, sensible and not.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0_u64..100).prop_map(Value::from),
        "\\PC{0,30}".prop_map(Value::from),
        Just(Value::from("\n\u{1}\u{e000}".repeat(500))),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let key = prop_oneof![
            Just("path".to_owned()),
            Just("type".to_owned()),
            "\\PC{0,40}"
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

const FILES: [(&str, &[&str]); 6] = [
    (
        "config.json",
        &[
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "hidden_act",
            "layer_norm_eps",
            "max_position_embeddings",
            "position_embedding_type",
        ],
    ),
    ("modules.json", &[]),
    ("1_Pooling/config.json", &["pooling_mode_mean_tokens"]),
    (
        "sentence_bert_config.json",
        &["max_seq_length", "do_lower_case"],
    ),
    ("tokenizer_config.json", &["model_max_length"]),
    (
        "tokenizer.json",
        &["model", "normalizer", "added_tokens", "post_processor"],
    ),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn hostile_numbers_are_refused_or_give_unit_vectors(
        dtype in prop_oneof![Just("F32"), Just("F16"), Just("BF16")],
        palette in prop::collection::vec(hostile_number(), 1..6),
        share in 1_usize..200,
    ) {
        let dir = folder();
        let file = Tiny::new().file_of(|_| dtype, |tensor, at| {
            let mixed = (tensor * 7919 + at).wrapping_mul(2_654_435_761) >> 7;
            if mixed % share == 0 { palette[mixed / share % palette.len()] } else { Tiny::number(tensor, at) }
        });
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        match Engine::from_dir(dir.path()) {
            Ok(engine) => for text in ["", "a", "a text b A ab", "unknown", &"ab text ".repeat(30)] {
                let vector = vector(&engine, text);
                let length: f32 = vector.iter().map(|x| x * x).sum();
                prop_assert!((length - 1.0).abs() < 1e-3, "{text}: {length}");
            }
            Err(error) => prop_assert!(error.to_string().contains("model.safetensors"), "{error}"),
        }
    }

    #[test]
    fn any_files_give_an_engine_or_an_error_of_one_short_line(
        which in 0_usize..FILES.len(),
        key in any::<prop::sample::Index>(),
        value in any_json(),
        whole in any::<bool>(),
        splice in prop::option::of((any::<prop::sample::Index>(), any::<[u8; 3]>())),
    ) {
        let dir = folder();
        let (file, keys) = FILES[which];
        let path = dir.path().join(file);
        let present = fs::read(&path).ok().map(|text| serde_json::from_slice(&text).unwrap());
        let mut content = present.unwrap_or_else(|| json!({}));
        if whole || keys.is_empty() {
            content = value;
        } else {
            content[*key.get(keys)] = value;
        }
        let mut bytes = content.to_string().into_bytes();
        if let Some((at, with)) = splice {
            let at = at.index(bytes.len());
            bytes.splice(at..at, with);
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        if let Err(error) = Engine::from_dir(dir.path()) {
            let line = error.to_string();
            prop_assert!(line.chars().count() < 500 && !line.contains(char::is_control), "{line:?}");
        }
    }
}
