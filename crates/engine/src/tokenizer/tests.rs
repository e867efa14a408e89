use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

#[derive(serde::Deserialize)]
struct Case {
    text: String,
    input_ids: Vec<u32>,
}

/// The lines of a file of `tests/reference`.
fn cases(file: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/reference")
        .join(file);
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn assert_agrees(tokenizer: &Tokenizer, cases: &[Case]) {
    let wrong: Vec<&Case> = cases
        .iter()
        .filter(|case| tokenizer.encode(&case.text, 256) != case.input_ids)
        .collect();
    if let Some(case) = wrong.first() {
        panic!(
            "{} of {} texts differ; first {:?}: expected {:?}, got {:?}",
            wrong.len(),
            cases.len(),
            case.text,
            case.input_ids,
            tokenizer.encode(&case.text, 256)
        );
    }
}

/// The bundled tokenizer as a `tokenizer.json`.
fn bundled_json() -> Value {
    let vocab: serde_json::Map<String, Value> = BUNDLED
        .lines()
        .enumerate()
        .map(|(id, token)| (token.to_owned(), json!(id)))
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0",
        "truncation": {"max_length": 128, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 128}, "pad_token": "[PAD]"},
        "added_tokens": [special(0, "[PAD]"), special(100, "[UNK]"), special(101, "[CLS]"),
                         special(102, "[SEP]"), special(103, "[MASK]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {}
        },
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab}
    })
}

fn from_value(value: &Value) -> Result<Tokenizer, Error> {
    Tokenizer::from_json(&serde_json::to_vec(value).unwrap())
}

/// A `tokenizer.json` of a few tokens, for changes that do not need the large one.
fn small_json() -> Value {
    let mut value = bundled_json();
    value["model"]["vocab"] = json!({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4,
                                     "é": 5, "e": 6, "E": 7, "##e": 8, "中": 9, "##中": 10});
    for (id, token) in value["added_tokens"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .enumerate()
    {
        token["id"] = json!(id);
    }
    for (id, token) in [
        (0, "[PAD]"),
        (1, "[UNK]"),
        (2, "[CLS]"),
        (3, "[SEP]"),
        (4, "[MASK]"),
    ] {
        value["added_tokens"][id]["content"] = json!(token);
    }
    value
}

#[test]
fn ids_equal_those_the_reference_embeddings_were_made_from() {
    let cases = cases("all-MiniLM-L6-v2.jsonl");
    assert_eq!(cases.len(), 249);
    assert_agrees(&Tokenizer::bundled(), &cases);
}

#[test]
fn ids_equal_the_recorded_ones_of_the_reference_tokenizer() {
    let cases = cases("tokenizer_cases.jsonl");
    assert!(cases.len() > 2000);
    assert_agrees(&Tokenizer::bundled(), &cases);
}

#[test]
fn a_tokenizer_json_gives_the_same_ids_as_the_bundled_vocabulary() {
    let tokenizer = from_value(&bundled_json()).unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 30_522);
    assert_agrees(&tokenizer, &cases("tokenizer_cases.jsonl"));
}

#[test]
fn truncation_keeps_the_beginning_and_the_frame() {
    let tokenizer = Tokenizer::bundled();
    let whole = tokenizer.encode("one two antidisestablishmentarianism three", 256);
    for limit in 2..whole.len() + 2 {
        let ids = tokenizer.encode("one two antidisestablishmentarianism three", limit);
        let kept = limit.min(whole.len());
        assert_eq!(ids.len(), kept);
        assert_eq!(ids[..kept - 1], whole[..kept - 1]);
        assert_eq!(ids[kept - 1], 102);
    }
    assert_eq!(tokenizer.encode("one", 0), [101, 102]);
}

#[test]
fn a_word_that_ends_unknown_beyond_the_limit_is_unknown_before_it() {
    // All but the last character have pieces; a cut before that character must not let them
    // through.
    let word = format!("{}\u{13000}", "z".repeat(90));
    assert_eq!(Tokenizer::bundled().encode(&word, 8), [101, 100, 102]);
}

#[test]
fn a_megabyte_of_any_character_is_a_text() {
    let tokenizer = Tokenizer::bundled();
    for (unit, length) in [
        ("a", 3),
        ("word ", 256),
        ("中", 256),
        ("[", 256),
        ("\u{301}", 2),
        ("\u{302e}", 3),
        ("\u{200b}", 2),
        ("İ", 3),
        (" ", 2),
    ] {
        let text = unit.repeat((1 << 20) / unit.len());
        assert_eq!(tokenizer.encode(&text, 256).len(), length, "{unit:?}");
    }
}

#[test]
fn flags_of_a_tokenizer_json_are_followed() {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut value = small_json();
        change(&mut value);
        let ids = from_value(&value).unwrap().encode("é E e中", 256);
        ids[1..ids.len() - 1].to_vec()
    };
    assert_eq!(with(&|_| ()), [6, 6, 6, 9]);
    assert_eq!(
        with(&|v| v["normalizer"]["strip_accents"] = json!(false)),
        [5, 6, 6, 9]
    );
    assert_eq!(
        with(&|v| v["normalizer"]["lowercase"] = json!(false)),
        [5, 7, 6, 9]
    );
    assert_eq!(
        with(&|v| v["normalizer"]["handle_chinese_chars"] = json!(false)),
        [6, 6, 6, 10]
    );
    assert_eq!(
        with(&|v| v["model"]["max_input_chars_per_word"] = json!(0)),
        [1, 1, 1, 1]
    );
    let bert = json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]});
    assert_eq!(with(&|v| v["post_processor"] = bert.clone()), [6, 6, 6, 9]);
}

#[test]
fn a_tokenizer_json_of_another_kind_is_refused_with_the_difference() {
    type Change = (&'static str, fn(&mut Value));
    let changes: [Change; 14] = [
        ("model.type", |v| v["model"]["type"] = json!("BPE")),
        ("gaps", |v| {
            v["model"]["vocab"]["e"] = json!(4_000_000_000_u32)
        }),
        ("id twice", |v| v["model"]["vocab"]["e"] = json!(5)),
        ("empty", |v| v["model"]["vocab"] = json!({})),
        ("line feed", |v| v["model"]["vocab"]["\n"] = json!(11)),
        ("special token", |v| {
            v["model"]["unk_token"] = json!("<unk>")
        }),
        ("added_tokens", |v| {
            v["added_tokens"][4]["lstrip"] = json!(true)
        }),
        ("another id", |v| v["added_tokens"][4]["id"] = json!(3)),
        ("printable", |v| {
            v["added_tokens"][4] = json!({"id": 5, "content": "é"})
        }),
        ("BertNormalizer", |v| v["normalizer"] = Value::Null),
        ("clean_text", |v| {
            v["normalizer"]["clean_text"] = json!(false)
        }),
        ("BertPreTokenizer", |v| {
            v["pre_tokenizer"]["type"] = json!("Whitespace")
        }),
        ("post_processor", |v| v["post_processor"] = Value::Null),
        ("post_processor", |v| {
            v["post_processor"]["single"].as_array_mut().unwrap().pop();
        }),
    ];
    for (expected, change) in changes {
        let mut value = small_json();
        change(&mut value);
        match from_value(&value) {
            Err(Error::Unsupported(what)) => assert!(what.contains(expected), "{what}"),
            Err(error @ Error::Malformed(_)) => panic!("{expected}: {error:?}"),
            Ok(_) => panic!("{expected}: accepted"),
        }
    }
}

#[test]
fn a_token_written_twice_is_refused() {
    let text = serde_json::to_string(&small_json()).unwrap();
    let text = text.replace("\"e\":6", "\"e\":6,\"e\":11");
    let error = Tokenizer::from_json(text.as_bytes()).err().unwrap();
    assert!(matches!(error, Error::Unsupported(what) if what.contains("twice")));
}

fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        "[ -~]{0,20}",
        r"\PC{0,20}",
        "[\u{300}-\u{36f}\u{302e}\u{1b44}e]{0,10}",
        "\\[(CLS|SEP|MASK|UNK)\\]?",
        Just("x".repeat(99)),
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn ids_are_framed_bounded_and_in_the_vocabulary(text in any_text(), max in 0_usize..40) {
        let ids = bundled_once().encode(&text, max);
        prop_assert!(ids.len() >= 2 && ids.len() <= max.max(2));
        prop_assert_eq!((ids[0], ids[ids.len() - 1]), (101, 102));
        prop_assert!(ids.iter().all(|&id| (id as usize) < bundled_once().vocabulary_size()));
    }

    #[test]
    fn a_lower_limit_gives_a_prefix(text in any_text(), max in 2_usize..40) {
        let whole = bundled_once().encode(&text, usize::MAX);
        let cut = bundled_once().encode(&text, max);
        prop_assert_eq!(&cut[..cut.len() - 1], &whole[..cut.len() - 1]);
        prop_assert_eq!(cut.len(), whole.len().min(max));
    }

    #[test]
    fn texts_apart_by_a_space_are_encoded_one_after_the_other(a in any_text(), b in any_text()) {
        let tokenizer = bundled_once();
        let (first, second) = (tokenizer.encode(&a, usize::MAX), tokenizer.encode(&b, usize::MAX));
        let both = tokenizer.encode(&format!("{a} {b}"), usize::MAX);
        prop_assert_eq!(both, [&first[..first.len() - 1], &second[1..]].concat());
    }

    #[test]
    fn no_bytes_make_reading_a_tokenizer_json_panic(at in 0.0_f64..1.0, byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = serde_json::to_vec(&small_json_once()).unwrap();
        let at = (bytes.len() as f64 * at) as usize;
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        if let Ok(tokenizer) = Tokenizer::from_json(&bytes) {
            prop_assert!(tokenizer.encode("e é 中 [MASK] E", 8).len() <= 8);
        }
    }
}

/// WordPiece as its papers and the reference's slow tokenizer have it, for the characters of
/// [`plain_text`]: whole strings, one step after the other.
fn naive_encode(text: &str) -> Vec<u32> {
    use std::collections::HashMap;
    use std::sync::LazyLock;

    use unicode_normalization::UnicodeNormalization;
    use unicode_normalization::char::is_combining_mark;

    static IDS: LazyLock<HashMap<&str, u32>> = LazyLock::new(|| BUNDLED.lines().zip(0..).collect());
    let mut spaced = String::new();
    for c in text.chars() {
        match c {
            '\u{7}' => {}
            '\u{4e00}'..='\u{9fff}' => spaced.extend([' ', c, ' ']),
            _ => spaced.push(c),
        }
    }
    let stripped: String = spaced.nfd().filter(|c| !is_combining_mark(*c)).collect();
    let mut split = String::new();
    for c in stripped.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_punctuation() || "“”…—¿".contains(c) {
            split.extend([' ', c, ' ']);
        } else {
            split.push(c);
        }
    }
    let mut ids = vec![101];
    for word in split.split_whitespace() {
        let characters: Vec<char> = word.chars().collect();
        let (mut pieces, mut start) = (Vec::new(), 0);
        while start < characters.len() && characters.len() <= 100 {
            let found = (start + 1..=characters.len()).rev().find_map(|end| {
                let piece: String = characters[start..end].iter().collect();
                let piece = if start > 0 {
                    format!("##{piece}")
                } else {
                    piece
                };
                Some((*IDS.get(piece.as_str())?, end))
            });
            let Some((id, end)) = found else {
                break;
            };
            pieces.push(id);
            start = end;
        }
        ids.extend(if start == characters.len() {
            pieces
        } else {
            vec![100]
        });
    }
    ids.push(102);
    ids
}

/// Text of which the classes of all characters are beyond doubt.
fn plain_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z]{1,12}",
        2 => "[ -Z\\\\-~]{0,12}",
        2 => "[a-zéüñÅÖçßøαβΣжЯéが한글ひカ中国語😀“”…—¿\u{301}\t\n\u{a0}\u{7} ]{0,12}",
        1 => prop::sample::select(BUNDLED.lines().skip(1000).filter(|word| word.is_ascii()).collect::<Vec<_>>()).prop_map(str::to_owned),
        1 => (90_usize..110).prop_map(|n| "xy".repeat(n / 2) + &"z".repeat(n % 2)),
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn ids_equal_those_of_a_naive_tokenizer(text in plain_text()) {
        prop_assert_eq!(bundled_once().encode(&text, usize::MAX), naive_encode(&text));
    }
}

fn bundled_once() -> &'static Tokenizer {
    static TOKENIZER: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(Tokenizer::bundled);
    &TOKENIZER
}

fn small_json_once() -> &'static Value {
    static VALUE: std::sync::LazyLock<Value> = std::sync::LazyLock::new(small_json);
    &VALUE
}
