use serde_json::Value;

use super::pieces;
use crate::domain::without_nul;
use crate::llm::{AnswerReading, read_answer};

/// The longest body, in bytes: below the bounds that depend on where a body is cut.
const MOST_BODY: usize = 32 << 10;

/// The body of an upstream's answer. The first byte cuts it, the second says how it ends and how
/// long its text may be.
///
/// The pieces of a body make no difference. A JSON object alone is the same as an event of a
/// stream. A usual answer is read as a JSON parser reads it.
pub fn upstream_answers(data: &[u8]) {
    let [cuts, kind, body @ ..] = data else {
        return;
    };
    if body.len() > MOST_BODY {
        return;
    }
    let is_cut = kind & 1 != 0;
    let most_text = if kind & 2 == 0 { 4096 } else { 64 };
    let whole = read_answer([body], most_text, is_cut);
    let in_pieces = read_answer(pieces(body, *cuts), most_text, is_cut);
    assert_eq!(whole, in_pieces, "cut and whole");
    check(&whole, most_text);
    if !is_cut && let Ok(json) = serde_json::from_slice::<Value>(body) {
        compare_with_parser(&whole, &json, most_text);
        compare_with_event(&whole, body, &json, most_text);
    }
}

/// Checks what stores and clients may expect of an answer.
fn check(reading: &AnswerReading, most_text: usize) {
    assert!(!reading.deltas.contains('\0'));
    let Ok(answer) = &reading.answer else {
        return;
    };
    assert_eq!(answer.text, reading.deltas);
    assert!(answer.text.len() <= most_text);
    let is_line = |text: &str, most: usize| {
        text.chars().count() <= most && !text.chars().any(char::is_control)
    };
    assert!(is_line(&answer.model, 200));
    let reason = answer.finish_reason.as_deref();
    assert!(reason.is_none_or(|reason| is_line(reason, 64)));
}

/// An answer of the usual form has the text that a JSON parser finds in it.
fn compare_with_parser(reading: &AnswerReading, json: &Value, most_text: usize) {
    let Some(text) = usual_text(json) else {
        return;
    };
    let text = without_nul(text.to_owned());
    match &reading.answer {
        Ok(answer) => assert_eq!(answer.text, text),
        Err(kind) => assert!(text.len() > most_text, "{kind}: refused"),
    }
}

/// The text of an answer that has only the members of OpenAI's documentation.
fn usual_text(json: &Value) -> Option<&str> {
    let usual = ["id", "object", "created", "model", "choices", "usage"];
    let of = |value: &Value, names: &[&str]| {
        let members = value.as_object()?;
        let is_known = |name: &String| names.contains(&name.as_str());
        members.keys().all(is_known).then_some(())
    };
    of(json, &usual)?;
    let object = json.get("object").is_none_or(|object| object != "error");
    let [choice] = json.get("choices")?.as_array()?.as_slice() else {
        return None;
    };
    of(choice, &["index", "message", "finish_reason"])?;
    let index = choice.get("index")?.as_i64()?;
    let message = choice.get("message")?;
    of(message, &["role", "content"])?;
    let reason = choice.get("finish_reason")?;
    (object && index == 0 && reason == "stop").then_some(())?;
    message.get("content")?.as_str()
}

/// An object that is an answer by itself is the same answer as the one event of a stream.
fn compare_with_event(reading: &AnswerReading, body: &[u8], json: &Value, most_text: usize) {
    let is_one_line = !body.iter().any(|byte| matches!(byte, b'\n' | b'\r'));
    if !json.is_object() || !is_one_line || reading.answer.is_err() {
        return;
    }
    let event = [b"data: ", body, b"\n\ndata: [DONE]\n\n"];
    let as_event = read_answer(event, most_text, false);
    assert_eq!(reading, &as_event, "alone and as an event");
}
