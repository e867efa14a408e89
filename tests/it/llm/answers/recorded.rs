//! Answers that real servers gave, as others recorded them; `tests/data/upstream_answers/README.md`
//! says whose they are.

use std::fs;
use std::path::{Path, PathBuf};

use prompt_service::llm::read_answer;
use serde_json::Value;

const MOST_TEXT: usize = 1 << 20;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/upstream_answers")
}

fn count(value: &Value) -> Option<u32> {
    value.as_u64().map(|count| u32::try_from(count).unwrap())
}

#[test]
fn recorded_answers_of_servers_are_read() {
    let index = fs::read_to_string(folder().join("expected.json")).unwrap();
    let index: Vec<Value> = serde_json::from_str(&index).unwrap();
    assert!(index.len() >= 50);
    for expected in &index {
        let name = expected["file"].as_str().unwrap();
        let body = fs::read(folder().join(name)).unwrap();
        for size in [body.len(), 1, 7, 1024] {
            let reading = read_answer(body.chunks(size), MOST_TEXT, false);
            assert_eq!(reading.skipped, 0, "{name}");
            if expected.get("error").is_some() {
                assert_eq!(reading.answer, Err("error_object"), "{name}");
                continue;
            }
            let answer = reading
                .answer
                .unwrap_or_else(|kind| panic!("{name}: {kind}"));
            assert_eq!(answer.text, expected["text"].as_str().unwrap(), "{name}");
            assert_eq!(reading.deltas, answer.text, "{name}");
            assert_eq!(answer.model, expected["model"].as_str().unwrap(), "{name}");
            assert_eq!(
                answer.finish_reason.as_deref(),
                expected["finish_reason"].as_str(),
                "{name}"
            );
            assert_eq!(
                answer.prompt_tokens,
                count(&expected["prompt_tokens"]),
                "{name}"
            );
            assert_eq!(
                answer.completion_tokens,
                count(&expected["completion_tokens"]),
                "{name}"
            );
        }
    }
}
