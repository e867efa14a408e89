//! Whether what stands in the place of an error is one.

use super::json::JsonValue;

/// How deep an error object is searched for content.
const ERROR_DEPTH: u32 = 3;

/// Whether an error object reports an error. Some servers send one with every answer: without a
/// message, and with a code of success.
pub fn reports_error(error: JsonValue<'_>) -> bool {
    let [message] = error.object(["message"]).members;
    if message.is_none_or(|message| message.holds_anything(1)) {
        return error.holds_anything(ERROR_DEPTH);
    }
    let is_success = |value: JsonValue<'_>| {
        let number = value.number();
        number.is_some_and(|number| (200.0..300.0).contains(&number))
    };
    error
        .members()
        .any(|(_, value)| value.holds_anything(ERROR_DEPTH) && !is_success(value))
}
