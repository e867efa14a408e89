//! One choice of an answer: its text and why it ended, as they come in.

use super::error_object::reports_error;
use super::json::{JsonValue, is_nothing};
use super::text::{Text, decoded};
use crate::llm::openai::line::one_line;

/// Longest `finish_reason` that is kept, in characters.
const REASON_CHARS: usize = 64;
/// OpenRouter's word for a model that broke down in mid-answer.
const BROKEN_DOWN: &str = "error";

/// What has come of a choice so far.
#[derive(Debug, Default)]
pub struct Choice {
    /// Its text.
    pub text: Text,
    /// Whether a text has come, even an empty one.
    pub has_content: bool,
    /// Why the choice ended. Later text removes the reason again.
    pub reason: Option<String>,
    /// Whether the text came as deltas, piece by piece.
    pub came_as_deltas: bool,
    /// Whether anything has come that the model made.
    pub has_work: bool,
}

/// What one object brought to a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Brought {
    /// Text, a thought, a tool call: anything that the model made.
    pub work: bool,
    /// The model, or the server before it, broke down.
    pub breakdown: bool,
    /// A reason that was not there before.
    pub reason: bool,
}

/// The members of a choice that [`Choice::take`] looks at.
pub const MEMBERS: [&str; 5] = ["delta", "message", "text", "finish_reason", "error"];

impl Choice {
    /// Takes what an object says of this choice: its [`MEMBERS`].
    pub fn take(&mut self, members: [Option<JsonValue<'_>>; MEMBERS.len()]) -> Brought {
        let [delta, message, text, reason, error] = members;
        let before = self.text.len();
        let has_delta = delta.is_some_and(|delta| self.take_part(delta));
        self.came_as_deltas |= has_delta;
        // A delta without text may stand beside a message that has it.
        if self.text.len() == before
            && !message.is_some_and(|message| self.take_message(message))
            && let Some(text) = text.filter(|text| text.string().is_some())
        {
            match has_delta {
                true => self.take_message(text),
                false => self.take_content(text),
            };
        }
        let has_grown = self.text.len() > before;
        let reason = reason.and_then(read_reason);
        let is_broken = reason.as_deref() == Some(BROKEN_DOWN) || error.is_some_and(reports_error);
        let had_reason = self.reason.is_some();
        if has_grown {
            self.reason = None;
        }
        let breakdown = is_broken && self.reason.is_none();
        if let Some(reason) = reason.filter(|reason| reason != BROKEN_DOWN) {
            self.reason = Some(reason);
        }
        let mut parts = [delta, message].into_iter().flatten();
        let work = has_grown || parts.any(has_work);
        self.has_work |= work;
        Brought {
            work,
            breakdown: breakdown && self.reason.is_none(),
            reason: !had_reason && self.reason.is_some(),
        }
    }

    /// Takes a message. Returns whether it has a text. After deltas a message repeats the whole
    /// text, so only its rest is new.
    fn take_message(&mut self, message: JsonValue<'_>) -> bool {
        if !self.came_as_deltas {
            return self.take_part(message);
        }
        let mut repeated = Self::default();
        let has_text = repeated.take_part(message);
        let repeated = repeated.text.finish();
        if let Some(rest) = repeated.strip_prefix(self.text.as_str())
            && !rest.is_empty()
        {
            self.text.push_str(rest);
        }
        has_text
    }

    /// Takes a delta or a message. Returns whether it has a text.
    fn take_part(&mut self, part: JsonValue<'_>) -> bool {
        if part.string().is_some() {
            return self.take_content(part);
        }
        let [content, refusal] = part.object(["content", "refusal"]).members;
        let has_content = content.is_some_and(|content| self.take_content(content));
        // A model that refuses says so here, and it is as much its answer.
        let refusal =
            refusal.filter(|refusal| refusal.string().is_some_and(|text| !text.is_empty()));
        has_content | refusal.is_some_and(|refusal| self.take_content(refusal))
    }

    /// Takes a content: a text, a list of parts, a single part, or a value in place of a text.
    /// Returns whether it has a text.
    fn take_content(&mut self, content: JsonValue<'_>) -> bool {
        let has_text = if let Some(text) = content.string() {
            self.text.push_json(text);
            true
        } else if content.is_array() {
            let mut has_text = false;
            for part in content.items() {
                has_text |= self.take_listed(part);
            }
            has_text
        } else if self.take_listed(content) {
            true
        } else if content.is_number() || is_untyped(content) {
            self.text
                .push_str(&String::from_utf8_lossy(content.bytes()));
            true
        } else {
            false
        };
        self.has_content |= has_text;
        has_text
    }

    /// Takes a part of a list. Returns whether it has a text: other parts are thoughts, images or
    /// tool calls.
    fn take_listed(&mut self, part: JsonValue<'_>) -> bool {
        if let Some(text) = part.string() {
            self.text.push_json(text);
            return true;
        }
        let names = ["type", "text", "refusal", "content"];
        let [kind, texts @ ..] = part.object(names).members;
        let kind = kind.and_then(JsonValue::string).unwrap_or_default();
        if !matches!(kind, b"" | b"text" | b"output_text" | b"refusal") {
            return false;
        }
        let written = texts.into_iter().flatten().find_map(|text| {
            // Some servers put the text beside its annotations.
            let [value] = text.object(["value"]).members;
            text.string().or_else(|| value?.string())
        });
        if let Some(written) = written {
            self.text.push_json(written);
        }
        written.is_some()
    }
}

/// Reads a reason as one line. `None` if it is not a text, or a word for nothing.
pub fn read_reason(reason: JsonValue<'_>) -> Option<String> {
    let written = reason.string().filter(|text| !is_nothing(text))?;
    let reason = one_line(&decoded(written), REASON_CHARS);
    (!reason.is_empty()).then_some(reason)
}

/// Whether a delta or message has anything beside its role.
fn has_work(part: JsonValue<'_>) -> bool {
    part.members()
        .any(|(name, value)| name != b"role" && value.holds_anything(1))
}

/// Whether it is an object without a type. Some gateways parse an answer that was requested as
/// JSON.
fn is_untyped(content: JsonValue<'_>) -> bool {
    let [kind] = content.object(["type"]).members;
    kind.is_none() && content.members().next().is_some()
}
