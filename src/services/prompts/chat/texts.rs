//! What is kept of a chat call, as JSON: all that is text, as it is written. Of images, audio and
//! files inside it the media type, the size and the SHA-256 are kept.
//!
//! The JSON is read as bytes and never as a tree of values: `0,` would take sixteen times its
//! bytes, and `1e400` or half a surrogate pair, which upstreams accept, would not be read at all.

use std::collections::BTreeMap;

use base64::Engine;
use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::by_length;
use crate::domain::ChatTexts;
use crate::llm::{ChatRequest, JsonValue, Splice, json_text};

/// Labels of one call that are kept, and the longest name and value, in characters: the bounds of
/// OpenAI.
pub const MOST_LABELS: usize = 16;
const LABEL_NAME_CHARS: usize = 64;
const LABEL_VALUE_CHARS: usize = 512;
/// The most bytes of a character in JSON: two escapes of six bytes.
const WRITTEN_CHAR_BYTES: usize = 12;

/// The text of the last message of the user.
pub fn text_of(request: &ChatRequest) -> String {
    request.last_user_text()
}

/// The labels among a request's `metadata`: its members that are texts within OpenAI's bounds. The
/// first ones, by name, if there are too many.
pub fn labels(request: &ChatRequest) -> BTreeMap<String, String> {
    let metadata = request.member("metadata").unwrap_or_default();
    let mut labels = BTreeMap::new();
    for (name, value) in JsonValue::new(metadata.as_bytes()).members() {
        let name = label_text(name, LABEL_NAME_CHARS);
        let value = value.string();
        let value = value.and_then(|value| label_text(value, LABEL_VALUE_CHARS));
        if let (Some(name), Some(value)) = (name, value)
            && is_label(&name, &value)
        {
            labels.insert(name, value);
        }
        if labels.len() > MOST_LABELS {
            labels.pop_last();
        }
    }
    labels
}

/// The text of a JSON string, written between its quotes; `None` if it has more characters than
/// `most` for sure. Half a surrogate pair becomes a replacement character.
fn label_text(written: &[u8], most: usize) -> Option<String> {
    if written.len() > most * WRITTEN_CHAR_BYTES {
        return None;
    }
    // Only this reading shows NUL, for which a label is not kept.
    let strict = serde_json::from_slice(&[b"\"", written, b"\""].concat());
    Some(strict.unwrap_or_else(|_| json_text(written).into_owned()))
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
    let others = || request.members().filter(|(name, _)| *name != "messages");
    let mut object = String::with_capacity(request.body().len() - request.messages().len());
    for (name, value) in others() {
        object.push(if object.is_empty() { '{' } else { ',' });
        object.push_str(&json!(name).to_string());
        object.push(':');
        object.push_str(value);
    }
    object.push('}');
    ChatTexts {
        messages: without_media(request.messages()),
        request: object,
        metadata: json!(labels).to_string(),
        answer: None,
    }
}

/// What is kept of a whole answer.
pub async fn kept_answer(answer: Bytes) -> String {
    by_length(answer.len(), move || {
        without_media(&String::from_utf8_lossy(&answer))
    })
    .await
}

/// The members that hold a medium: an object, or its URL.
const MEDIA_MEMBERS: [&str; 6] = [
    "audio",
    "audio_url",
    "file",
    "image_url",
    "input_audio",
    "video_url",
];
/// The types of a part whose `source` is a medium, as in Anthropic's protocol.
const SOURCE_PARTS: [&[u8]; 2] = [b"\"document\"", b"\"image\""];
/// The members of a medium that hold bare base64: of a sound (`input_audio.data`, an answer's
/// `audio.data`), and of a file.
const BASE64_MEMBERS: [&str; 2] = ["data", "file_data"];
/// How deep a medium is looked for. The one of a message inside a tool's result is at level nine.
/// Each level passes over the bytes inside it once more.
const MOST_DEPTH: usize = 12;
/// A text up to this length, in bytes, takes no more room than its description. A short word may be
/// base64 by chance.
const SHORT_BYTES: usize = 64;
/// The longest name of a media type that is kept, in bytes: twice what RFC 6838 recommends.
const MEDIA_TYPE_BYTES: usize = 128;
/// The media type where none is known.
const ANY_TYPE: &str = "application/octet-stream";

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
    let mut splice = Splice::new(json);
    let whole = splice.value();
    replace_media(&mut splice, whole, false, MOST_DEPTH);
    splice.finish()
}

/// Replaces the media inside a value. `is_medium`: the value is the one of a medium's member, or a
/// part of such a value. Elsewhere `data` is no medium: a model's encrypted reasoning has it too,
/// and must come back to the model as it was.
fn replace_media<'a>(splice: &mut Splice<'a>, value: JsonValue<'a>, is_medium: bool, depth: usize) {
    if depth == 0 {
        return;
    }
    if let Some(url) = value.string().filter(|_| is_medium) {
        if let Some(medium) = described_url(&json_text(url)) {
            splice.replace(value, &medium);
        }
        return;
    }
    for item in value.items() {
        replace_media(splice, item, is_medium, depth - 1);
    }
    // What other members say is read once, not for each of a million members of the same name.
    let (mut has_source, mut media_type) = (None, None);
    for (key, member) in value.members() {
        let key = json_text(key);
        let bare = member.string().filter(|text| {
            is_medium && text.len() > SHORT_BYTES && BASE64_MEMBERS.contains(&&*key)
        });
        let Some(bare) = bare else {
            let begins = MEDIA_MEMBERS.contains(&&*key)
                || key == "source" && *has_source.get_or_insert_with(|| is_source_a_medium(value));
            replace_media(splice, member, is_medium || begins, depth - 1);
            continue;
        };
        let text = json_text(bare);
        let medium = described_url(&text).unwrap_or_else(|| {
            let media_type = media_type.get_or_insert_with(|| type_beside(value));
            described(media_type, &text)
        });
        splice.replace(member, &medium);
    }
}

/// Whether the `source` of an object is a medium, and no text.
fn is_source_a_medium(part: JsonValue<'_>) -> bool {
    let [kind, source] = part.object(["type", "source"]).members;
    let [kind_of_source] = source.map_or([None], |source| source.object(["type"]).members);
    let is_text = kind_of_source.is_some_and(|kind| kind.bytes() == b"\"text\"");
    kind.is_some_and(|kind| SOURCE_PARTS.contains(&kind.bytes())) && !is_text
}

/// The media type of bare base64, from the members beside it.
fn type_beside(medium: JsonValue<'_>) -> String {
    let [format, media_type] = medium.object(["format", "media_type"]).members;
    let text = |value: Option<JsonValue<'_>>| {
        let written = value?
            .string()
            .filter(|text| text.len() <= MEDIA_TYPE_BYTES);
        Some(json_text(written?).into_owned())
    };
    match (text(format), text(media_type)) {
        (Some(format), _) => format!("audio/{format}"),
        (None, Some(media_type)) => media_type,
        (None, None) => ANY_TYPE.to_owned(),
    }
}

/// What is kept of the medium in a `data:` URL; `None` for any other text, and for a short one.
fn described_url(text: &str) -> Option<String> {
    let (head, data) = text.strip_prefix("data:")?.split_once(',')?;
    if data.len() <= SHORT_BYTES {
        return None;
    }
    // A type is one word with a slash.
    let is_type = |name: &&str| {
        name.len() <= MEDIA_TYPE_BYTES && name.contains('/') && !name.contains(char::is_whitespace)
    };
    let media_type = head.split(';').next().filter(is_type).unwrap_or(ANY_TYPE);
    Some(match head.ends_with(";base64") {
        true => described(media_type, data),
        false => written(media_type, data.len(), &Sha256::digest(data)),
    })
}

/// The description of a medium. What is no base64 is described as the text that it is, so that it
/// is not kept whole.
fn described(media_type: &str, base64: &str) -> String {
    match digest_of_base64(base64) {
        Some((bytes, hash)) => written(media_type, bytes, &hash),
        None => written(media_type, base64.len(), &Sha256::digest(base64)),
    }
}

/// The size and the SHA-256 of the bytes behind base64; `None` if it is none. Both alphabets are
/// read, and blanks and line ends in between, as servers do.
fn digest_of_base64(base64: &str) -> Option<(usize, [u8; 32])> {
    const LETTERS: usize = 4096;
    const ENGINE: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        NO_PAD.with_decode_allow_trailing_bits(true),
    );
    let (mut hash, mut size) = (Sha256::new(), 0);
    // Piece by piece: the bytes are not needed together.
    let mut bytes = [0; LETTERS / 4 * 3];
    let mut add = |letters: &[u8]| {
        let length = ENGINE.decode_slice(letters, &mut bytes).ok()?;
        hash.update(&bytes[..length]);
        size += length;
        Some(())
    };
    let mut letters = Vec::with_capacity(LETTERS);
    for byte in base64.trim_ascii_end().trim_end_matches('=').bytes() {
        match byte {
            b'-' => letters.push(b'+'),
            b'_' => letters.push(b'/'),
            blank if blank.is_ascii_whitespace() => continue,
            letter => letters.push(letter),
        }
        if letters.len() == LETTERS {
            add(&letters)?;
            letters.clear();
        }
    }
    add(&letters)?;
    Some((size, hash.finalize().into()))
}

fn written(media_type: &str, size_bytes: usize, hash: &[u8]) -> String {
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "media_type": media_type, "size_bytes": size_bytes, "sha256": hex }).to_string()
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};
    use serde_json::Value;

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
            r#"[{"content": "data: \ud83d", "n": 1e400, "m": 0.10000000000000000000000001}]"#,
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
    fn media_beside_half_a_surrogate_pair_and_a_large_number_are_replaced() {
        let image = STANDARD.encode([7_u8; 100]);
        let before = r#"[{"content": [{"text": "\ud83d", "n": 1e400}, {"image_url": {"url": "#;
        let kept = without_media(&format!(
            "{before}\"data:image/png;base64,{image}\"}} }} ]}} ]"
        ));
        let rest = kept.strip_prefix(before).unwrap();
        assert!(rest.starts_with("{\"media_type\":\"image/png\""), "{kept}");
        assert!(rest.ends_with("}} } ]} ]"), "{kept}");
    }

    #[test]
    fn what_a_model_must_get_back_is_kept_whole() {
        let secret = STANDARD.encode([7_u8; 100]);
        let message = json!({ "role": "assistant", "content": [
            { "type": "redacted_thinking", "data": secret },
            { "type": "text", "text": format!("data:image/png;base64,{secret}") },
            { "type": "document", "source": { "type": "text", "media_type": "text/plain", "data": secret } },
        ], "reasoning_details": [{ "type": "reasoning.encrypted", "data": secret }] });
        let json = json!([message]).to_string();
        assert_eq!(without_media(&json), json);
    }

    #[test]
    fn many_members_of_one_name_are_read_in_one_pass() {
        let data = format!(r#""data":"{}","#, "A".repeat(65)).repeat(20_000);
        let source = r#""source":[],"#.repeat(100_000);
        let json = format!(r#"[{{"type":"image",{source}"audio":{{{data}"n":1}}}}]"#);
        // A pass for each of them would take minutes.
        assert!(without_media(&json).len() > json.len());
    }

    #[test]
    fn sources_of_images_are_media() {
        let image = STANDARD.encode([7_u8; 100]);
        let source = json!({ "type": "base64", "media_type": "image/gif", "data": image });
        let result = json!([{ "type": "image", "source": source }]);
        let part = json!({ "type": "tool_result", "content": result });
        let kept = without_media(&json!([{ "role": "user", "content": [part] }]).to_string());
        assert!(!kept.contains(&image), "{kept}");
        assert!(kept.contains("\"media_type\":\"image/gif\""), "{kept}");
    }

    #[test]
    fn base64_is_read_in_every_spelling_and_other_media_are_described_as_text() {
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let of = |bytes: &[u8]| written("image/png", bytes.len(), &Sha256::digest(bytes));
        let plain = STANDARD.encode(&bytes);
        let lines: Vec<_> = plain
            .as_bytes()
            .chunks(76)
            .map(String::from_utf8_lossy)
            .collect();
        for spelling in [
            plain.clone(),
            plain.trim_end_matches('=').to_owned(),
            URL_SAFE.encode(&bytes),
            lines.join("\r\n") + "\n",
        ] {
            assert_eq!(described("image/png", &spelling), of(&bytes));
        }
        let escaped = plain.replace('/', r"\/");
        let kept = without_media(&format!(
            r#"[{{"image_url":{{"url":"data:image\/png;base64,{escaped}"}}}}]"#
        ));
        assert_eq!(
            kept,
            format!(r#"[{{"image_url":{{"url":{}}}}}]"#, of(&bytes))
        );
        let broken = "no base64: %".repeat(20);
        assert_eq!(described("image/png", &broken), of(broken.as_bytes()));
        let kept = without_media(&json!([{ "file": { "file_data": broken } }]).to_string());
        assert!(!kept.contains(&broken), "{kept}");
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
        let odd = r#"{"model":"m","messages":[{}],"metadata":{"a":"b\ud83d","n":1e400,"c":"d"}}"#;
        let odd = super::labels(&ChatRequest::parse(odd.into()).unwrap());
        assert_eq!(json!(odd), json!({ "a": "b\u{fffd}", "c": "d" }));
        let many: BTreeMap<_, _> = (10..50).rev().map(|n| (n.to_string(), "")).collect();
        let body = json!({ "model": "m", "messages": [{}], "metadata": many });
        let kept = super::labels(&request(&body));
        assert!(kept.keys().eq(many.keys().take(16)), "{kept:?}");
        let none = request(&json!({ "model": "m", "messages": [{}], "metadata": [] }));
        assert!(super::labels(&none).is_empty());
    }
}
