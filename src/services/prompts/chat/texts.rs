//! What is kept of a chat call, as JSON: all that is text. Of images, audio and files inside it the
//! media type, the size and the SHA-256 are kept.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::domain::ChatTexts;
use crate::llm::ChatRequest;

/// Labels of one call that are kept, and the longest name and value, in characters: the bounds of
/// OpenAI.
const MOST_LABELS: usize = 16;
const LABEL_NAME_CHARS: usize = 64;
const LABEL_VALUE_CHARS: usize = 512;

/// The text of the last message of the user.
pub fn text_of(request: &ChatRequest) -> String {
    request.last_user_text()
}

/// The labels among a request's `metadata`: its members that are texts within OpenAI's bounds. The
/// first ones, by name, if there are too many.
pub fn labels(request: &ChatRequest) -> BTreeMap<String, String> {
    let metadata: Option<Value> = request
        .member("metadata")
        .and_then(|metadata| serde_json::from_str(metadata).ok());
    let Some(Value::Object(metadata)) = metadata else {
        return BTreeMap::new();
    };
    let labels = metadata
        .into_iter()
        .filter_map(|(name, value)| match value {
            Value::String(value) if is_label(&name, &value) => Some((name, value)),
            Value::String(_)
            | Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::Array(_)
            | Value::Object(_) => None,
        });
    let labels: BTreeMap<_, _> = labels.collect();
    labels.into_iter().take(MOST_LABELS).collect()
}

/// Whether a label is within the bounds, and can be kept by every store.
pub fn is_label(name: &str, value: &str) -> bool {
    let is_within = |text: &str, most| text.chars().count() <= most && !text.contains('\0');
    is_within(name, LABEL_NAME_CHARS) && is_within(value, LABEL_VALUE_CHARS)
}

/// Whether there may be so many labels.
pub fn may_have_labels(number: usize) -> bool {
    number <= MOST_LABELS
}

/// What is kept of a request, as long as there is no answer.
pub fn kept_texts(request: &ChatRequest, labels: &BTreeMap<String, String>) -> ChatTexts {
    let others: Vec<String> = request
        .members()
        .filter(|(name, _)| *name != "messages")
        .map(|(name, value)| format!("{}:{value}", Value::from(name)))
        .collect();
    ChatTexts {
        messages: without_media(request.messages()),
        request: format!("{{{}}}", others.join(",")),
        metadata: json!(labels).to_string(),
        answer: None,
    }
}

/// What is kept of a whole answer.
pub fn kept_answer(answer: &[u8]) -> String {
    without_media(&String::from_utf8_lossy(answer))
}

/// The JSON with each image, sound and file in it replaced by its media type, size and SHA-256.
/// Without any, it is returned as it came.
fn without_media(json: &str) -> String {
    // Reading it all costs more than this look. An escape might hide a word.
    let may_have_media = ["data:", "\"data\"", "\"file_data\"", "\\u"]
        .iter()
        .any(|word| json.contains(word));
    if !may_have_media {
        return json.to_owned();
    }
    let Ok(mut value) = serde_json::from_str::<Value>(json) else {
        return json.to_owned();
    };
    match replace_media(&mut value) {
        true => value.to_string(),
        false => json.to_owned(),
    }
}

/// Replaces the media inside a value; returns whether there was any.
fn replace_media(value: &mut Value) -> bool {
    match value {
        Value::String(text) => match data_url(text) {
            Some(media) => {
                *value = media;
                true
            }
            None => false,
        },
        Value::Array(items) => items
            .iter_mut()
            .fold(false, |has, item| replace_media(item) | has),
        Value::Object(members) => replace_in_object(members),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The members that hold media as bare base64: of a sound (`input_audio.data`, an answer's
/// `audio.data`), and of a file.
const BASE64_MEMBERS: [&str; 2] = ["data", "file_data"];

fn replace_in_object(members: &mut Map<String, Value>) -> bool {
    let format = members.get("format").and_then(Value::as_str);
    let media_type = match format {
        Some(format) => format!("audio/{format}"),
        None => "application/octet-stream".to_owned(),
    };
    let mut has_media = false;
    for (name, value) in members.iter_mut() {
        let bare = value
            .as_str()
            .filter(|text| BASE64_MEMBERS.contains(&name.as_str()) && !text.starts_with("data:"))
            .and_then(decode);
        has_media |= match bare {
            Some(bytes) => {
                *value = described(&media_type, &bytes);
                true
            }
            None => replace_media(value),
        };
    }
    has_media
}

/// What is kept of the medium in a `data:` URL; `None` for any other text.
fn data_url(text: &str) -> Option<Value> {
    let (head, data) = text.strip_prefix("data:")?.split_once(',')?;
    let media_type = head.split(';').next().unwrap_or_default();
    let bytes = match head.ends_with(";base64") {
        true => decode(data)?,
        false => data.as_bytes().to_vec(),
    };
    // A text may begin like such a URL. A type is one word with a slash.
    let is_type = media_type.contains('/') && !media_type.contains(char::is_whitespace);
    is_type.then(|| described(media_type, &bytes))
}

fn decode(base64: &str) -> Option<Vec<u8>> {
    // A short word may be base64 by chance, and takes no more room than its description.
    let is_long = base64.len() > 64;
    let bytes = || {
        STANDARD
            .decode(base64)
            .or_else(|_| STANDARD_NO_PAD.decode(base64))
    };
    is_long.then(bytes)?.ok()
}

fn described(media_type: &str, bytes: &[u8]) -> Value {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "media_type": media_type, "size_bytes": bytes.len(), "sha256": hex })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: &Value) -> ChatRequest {
        ChatRequest::parse(body.to_string().into()).unwrap()
    }

    #[test]
    fn texts_without_media_are_kept_byte_for_byte() {
        for json in [
            r#"[ {"role":"user",  "content": "a\u00e9\ud83e\udd80 1.50"} ]"#,
            r#"[{"content": "data: what is it?", "n": 1e400}]"#,
            r#"[{"content": "see data:text, or data:image/png", "data": "c2hvcnQ="}]"#,
        ] {
            assert_eq!(without_media(json), json);
        }
    }

    #[test]
    fn of_media_the_type_the_size_and_the_hash_are_kept() {
        let image = STANDARD.encode([7_u8; 100]);
        let hash = "\"sha256\":\"";
        for (part, media_type) in [
            (
                json!({ "image_url": { "url": format!("data:image/png;base64,{image}"), "detail": "low" } }),
                "image/png",
            ),
            (
                json!({ "input_audio": { "data": image, "format": "wav" } }),
                "audio/wav",
            ),
            (
                json!({ "file": { "file_data": image, "filename": "a.pdf" } }),
                "application/octet-stream",
            ),
            (
                json!({ "file": { "file_data": format!("data:application/pdf;base64,{image}") } }),
                "application/pdf",
            ),
        ] {
            let kept = without_media(&json!([{ "role": "user", "content": [part] }]).to_string());
            assert!(!kept.contains(&image), "{kept}");
            assert!(kept.contains(media_type), "{kept}");
            assert!(kept.contains("\"size_bytes\":100"), "{kept}");
            assert!(kept.contains(hash), "{kept}");
        }
    }

    #[test]
    fn the_request_is_kept_without_its_messages_and_with_its_spelling() {
        let body = r#"{"model":"m","messages":[{"role":"user","content":"Why?"}],"temperature":0.70,"metadata":{"a":"b"}}"#;
        let request = ChatRequest::parse(body.into()).unwrap();
        let texts = kept_texts(&request, &labels(&request));
        assert_eq!(texts.messages, r#"[{"role":"user","content":"Why?"}]"#);
        assert_eq!(
            texts.request,
            r#"{"model":"m","temperature":0.70,"metadata":{"a":"b"}}"#
        );
        assert_eq!(texts.metadata, r#"{"a":"b"}"#);
    }

    #[test]
    fn labels_are_texts_within_bounds() {
        let long = "x".repeat(513);
        let labels = labels(&request(&json!({
            "model": "m", "messages": [{}],
            "metadata": { "a": "b", "n": 1, "o": {}, "nul": "\0", "long": long, "": "" },
        })));
        let names: Vec<_> = labels.keys().map(String::as_str).collect();
        assert_eq!(names, ["", "a"]);
        let none = request(&json!({ "model": "m", "messages": [{}], "metadata": [] }));
        assert!(super::labels(&none).is_empty());
    }
}
