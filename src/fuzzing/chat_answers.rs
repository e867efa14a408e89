use serde_json::Value;

use super::pieces;
use crate::llm::{AnswerReading, read_chat_answer};

/// The longest body, in bytes: below the bounds that depend on where a body is cut.
const MOST_BODY: usize = 32 << 10;
const MOST_TEXT: usize = 4096;

/// The body of an upstream's answer to a chat request. The first byte cuts it, the second says how
/// it ends and how many choices are wanted.
///
/// The pieces of a body make no difference. The whole answer is valid JSON, and has the text that
/// was handed over. Merged with nothing, it stays as it is.
pub fn chat_answers(data: &[u8]) {
    let [cuts, kind, body @ ..] = data else {
        return;
    };
    if body.len() > MOST_BODY {
        return;
    }
    let (is_cut, choices) = (kind & 1 != 0, 1 + u32::from(kind >> 1) % 3);
    let reading = read_chat_answer([body], MOST_TEXT, is_cut, choices);
    let in_pieces = read_chat_answer(pieces(body, *cuts), MOST_TEXT, is_cut, choices);
    assert_eq!(reading, in_pieces, "cut and whole");
    let AnswerReading {
        answer: Ok(answer), ..
    } = reading
    else {
        return;
    };
    let whole = answer.answer.expect("of each answer to a chat request");
    let json: serde_json::Result<Value> = serde_json::from_slice(&whole);
    let Ok(json) = json else {
        // The parser refuses deep nesting, large numbers and halves of surrogate pairs. What it
        // needs no value of, it only checks.
        serde_json::from_slice::<&serde_json::value::RawValue>(&whole).expect("valid JSON");
        return;
    };
    assert!(json.is_object());
    // One choice is all that is certain to be left of an answer that came in several ways.
    let again = read_chat_answer([&whole[..]], usize::MAX >> 16, false, 1);
    if let Ok(again) = again.answer {
        let again = again.answer.expect("of each answer to a chat request");
        assert_eq!(again, whole, "an answer that stands alone stays as it is");
    }
}
