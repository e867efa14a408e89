//! The answer that is put together from a stream is the one that OpenAI's own library makes of it;
//! `tests/tools/accumulate_chat_streams.py` wrote down what that is.

use std::fs;
use std::path::{Path, PathBuf};

use prompt_service::llm::read_chat_answer;
use serde_json::Value;

const MOST_TEXT: usize = 1 << 20;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// Without members that are null, and without the index of tool calls, which only chunks have. The
/// library adds the former and keeps the latter.
fn plain(value: &Value) -> Value {
    match value {
        Value::Object(members) => members
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| match (name.as_str(), value) {
                ("tool_calls", Value::Array(calls)) => {
                    let mut calls = calls.clone();
                    for call in &mut calls {
                        call.as_object_mut().unwrap().remove("index");
                    }
                    (name.clone(), plain(&Value::Array(calls)))
                }
                _ => (name.clone(), plain(value)),
            })
            .collect(),
        Value::Array(items) => items.iter().map(plain).collect(),
        Value::Number(number) => number.as_f64().into(),
        Value::Null | Value::Bool(_) | Value::String(_) => value.clone(),
    }
}

#[test]
fn streams_are_put_together_as_by_openais_own_library() {
    let expected = fs::read_to_string(folder().join("chat_streams/expected.json")).unwrap();
    let expected: serde_json::Map<String, Value> = serde_json::from_str(&expected).unwrap();
    assert!(expected.len() >= 16);
    for (name, expected) in &expected {
        let body = fs::read(folder().join(name)).unwrap();
        for size in [body.len(), 1, 13] {
            let reading = read_chat_answer(body.chunks(size), MOST_TEXT, false, 1);
            let answer = reading
                .answer
                .unwrap_or_else(|kind| panic!("{name}: {kind}"));
            let whole: Value = serde_json::from_slice(&answer.answer.unwrap()).unwrap();
            let (whole, expected) = (plain(&whole), plain(expected));
            for member in ["id", "object", "created", "model", "choices", "usage"] {
                assert_eq!(whole.get(member), expected.get(member), "{name}: {member}");
            }
        }
    }
}

/// The answer that chunks give. Each of them is an event.
fn joined(chunks: &[&str], choices: u32) -> Value {
    let body: String = chunks
        .iter()
        .map(|chunk| format!("data: {chunk}\n\n"))
        .collect();
    let body = body + "data: [DONE]\n\n";
    let reading = read_chat_answer([body.as_bytes()], MOST_TEXT, false, choices);
    serde_json::from_slice(&reading.answer.unwrap().answer.unwrap()).unwrap()
}

#[test]
fn members_that_no_library_knows_are_kept_too() {
    let answer = joined(
        &[
            r#"{"id":"","model":"","choices":[],"prompt_filter_results":[{"prompt_index":0}]}"#,
            r#"{"id":"a","model":"m","citations":["x"],"choices":[{"index":0,"delta":{"role":"assistant","content":"O",
               "reasoning_details":[{"type":"reasoning.text","text":"Hm","format":"unknown","index":0}]},
               "content_filter_results":{"hate":{"severity":"safe"}}}]}"#,
            r#"{"id":"a","model":"m","citations":["x","y"],"choices":[{"index":0,"delta":{"role":"assistant","content":"K",
               "reasoning_details":[{"type":"reasoning.text","text":".","format":"unknown","index":0},
                                    {"type":"reasoning.encrypted","data":"AA==","index":1}],
               "annotations":[{"type":"url_citation","url_citation":{"url":"u"}}]},"stop_reason":7,
               "content_filter_results":{"hate":{"severity":"safe"}}}]}"#,
            r#"{"id":"a","model":"m","choices":[{"index":0,"delta":{"annotations":[{"type":"url_citation"}]},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}"#,
            r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2.50},"x_extra":{"a":null}}"#,
        ],
        1,
    );
    let expected = serde_json::json!({
        "id": "a", "object": "chat.completion", "model": "m",
        "prompt_filter_results": [{ "prompt_index": 0 }], "citations": ["x", "y"], "x_extra": { "a": null },
        "choices": [{
            "index": 0, "finish_reason": "stop", "stop_reason": 7,
            "content_filter_results": { "hate": { "severity": "safe" } },
            "message": {
                "role": "assistant", "content": "OK",
                "reasoning_details": [
                    { "type": "reasoning.text", "text": "Hm.", "format": "unknown", "index": 0 },
                    { "type": "reasoning.encrypted", "data": "AA==", "index": 1 },
                ],
                "annotations": [{ "type": "url_citation", "url_citation": { "url": "u" } }, { "type": "url_citation" }],
            },
        }],
        "usage": { "prompt_tokens": 1, "completion_tokens": 2.5 },
    });
    assert_eq!(answer, expected);
}

#[test]
fn thoughts_that_come_as_parts_stay_beside_the_text() {
    let answer = joined(
        &[
            r#"{"choices":[{"index":0,"delta":{"content":[{"type":"thinking","thinking":"Hm"}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"Yes"}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"."},"finish_reason":"stop"}]}"#,
        ],
        1,
    );
    assert_eq!(
        answer["choices"][0]["message"]["content"],
        serde_json::json!([{ "type": "thinking", "thinking": "Hm" }, { "type": "text", "text": "Yes." }])
    );
}

#[test]
fn what_is_no_valid_json_becomes_valid() {
    let answer = joined(
        &[
            "{\"created\":NaN,\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\tb\\x\"}}]}",
            r#"{"choices":[{"index":0,"delta":{"content":"\u00e9","odd":{"a":Infinity,"b":[1,x]}},"finish_reason":"stop"}]}"#,
        ],
        1,
    );
    assert_eq!(answer["created"], Value::Null);
    assert_eq!(answer["choices"][0]["message"]["content"], "a\tbxé");
    assert_eq!(
        answer["choices"][0]["message"]["odd"],
        serde_json::json!({ "a": null, "b": [1, null] })
    );
}

#[test]
fn an_answer_to_several_choices_ends_with_the_last_of_them() {
    let begun = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}\n\n\
                 data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"b\"}}]}\n\n";
    let reading = read_chat_answer([begun.as_bytes()], MOST_TEXT, true, 2);
    assert_eq!(reading.answer, Err("truncated"));
    let ended = "data: {\"choices\":[{\"index\":1,\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
    let reading = read_chat_answer([begun.as_bytes(), ended.as_bytes()], MOST_TEXT, true, 2);
    let answer: Value = serde_json::from_slice(&reading.answer.unwrap().answer.unwrap()).unwrap();
    assert_eq!(answer["choices"][1]["message"]["content"], "b");
    assert_eq!(answer["choices"][1]["finish_reason"], "length");
}

#[test]
fn an_answer_is_bounded_whatever_it_consists_of() {
    let part = "x".repeat(1000);
    for delta in [
        format!(r#"{{"tool_calls":[{{"index":0,"function":{{"arguments":"{part}"}}}}]}}"#),
        format!(r#"{{"reasoning":"{part}"}}"#),
        format!(r#"{{"annotations":[{{"a":"{part}"}}]}}"#),
        r#"{"list":[1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9]}"#.to_owned(),
    ] {
        let event = format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n");
        let events = std::iter::repeat_n(event.as_bytes(), 100_000);
        let reading = read_chat_answer(events, 1024, false, 1);
        assert_eq!(reading.answer, Err("too_long"), "{delta}");
        assert!(reading.objects.len() < 10_000);
    }
}

#[test]
fn figures_that_come_again_and_again_take_no_room() {
    let event = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":N}}\n\n";
    let events: Vec<String> = (0..3000)
        .map(|count| event.replace('N', &count.to_string()))
        .collect();
    let mut pieces: Vec<&[u8]> = events.iter().map(String::as_bytes).collect();
    pieces.push(b"data: [DONE]\n\n");
    let reading = read_chat_answer(pieces, 1024, false, 1);
    let usage = reading.answer.unwrap().usage.unwrap();
    assert_eq!((usage.input, usage.output), (7, 2999));
}
