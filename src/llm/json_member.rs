//! Changes single members of JSON and leaves all its other bytes as they are.

use std::borrow::Cow;

use super::openai::{JsonValue, decoded};

/// The object with one member set to `value`, which is JSON. All other bytes stay as they are. If
/// the object does not have the member, it becomes the first; if it has it twice, both are set.
/// Anything but an object is returned unchanged.
pub fn with_member(json: &[u8], name: &str, value: &[u8]) -> Vec<u8> {
    let start = json.iter().position(|byte| !byte.is_ascii_whitespace());
    let Some(start) = start.filter(|start| json[*start] == b'{') else {
        return json.to_vec();
    };
    let (mut changed, mut copied) = (Vec::with_capacity(json.len() + value.len()), 0);
    let mut members = JsonValue::new(&json[start..]).members().peekable();
    let is_empty = members.peek().is_none();
    let mut is_set = false;
    for (key, old) in members {
        if !is_named(key, name) {
            continue;
        }
        is_set = true;
        let at = offset(json, old.bytes());
        changed.extend_from_slice(&json[copied..at]);
        changed.extend_from_slice(value);
        copied = at + old.bytes().len();
    }
    if !is_set {
        changed.extend_from_slice(&json[..=start]);
        let key = serde_json::to_string(name).expect("a string can be written as JSON");
        changed.extend_from_slice(key.as_bytes());
        changed.push(b':');
        changed.extend_from_slice(value);
        changed.extend_from_slice(if is_empty { b"" } else { b"," });
        copied = start + 1;
    }
    changed.extend_from_slice(&json[copied..]);
    changed
}

/// Whether a chunk of a stream has the usage and no choice: the one that comes only if a request
/// asks for it.
pub fn is_usage_chunk(json: &[u8]) -> bool {
    let [choices, usage] = JsonValue::new(json.trim_ascii())
        .object(["choices", "usage"])
        .members;
    let is_empty = choices.is_some_and(|list| list.is_array() && list.items().next().is_none());
    is_empty && usage.is_some_and(JsonValue::is_object)
}

/// The text of a JSON string: of what is between its quotes, as it is written. Half a surrogate
/// pair and an escaped NUL become replacement characters.
pub fn json_text(written: &[u8]) -> Cow<'_, str> {
    match written.contains(&b'\\') {
        true => Cow::Owned(decoded(written)),
        false => String::from_utf8_lossy(written),
    }
}

/// Whether a key, as it is written between its quotes, is the name.
fn is_named(key: &[u8], name: &str) -> bool {
    json_text(key) == name
}

/// Writes a JSON object member by member. What is given as JSON is written as it is.
#[derive(Clone, Debug)]
pub struct ObjectWriter {
    json: Vec<u8>,
    is_empty: bool,
}

impl Default for ObjectWriter {
    fn default() -> Self {
        Self::after(Vec::new())
    }
}

impl ObjectWriter {
    /// Begins an object after other bytes.
    pub fn after(mut json: Vec<u8>) -> Self {
        json.push(b'{');
        let is_empty = true;
        Self { json, is_empty }
    }

    /// Adds a member whose value is JSON.
    pub fn member(&mut self, name: &str, value: &[u8]) {
        let key = serde_json::to_vec(name).expect("a string can be written as JSON");
        self.push(&key[1..key.len() - 1], value);
    }

    /// Adds the members of `object`, but for those of these names.
    pub fn members_without(&mut self, object: JsonValue<'_>, names: &[&str]) {
        for (key, value) in object.members() {
            if !names.iter().any(|name| is_named(key, name)) {
                self.push(key, value.bytes());
            }
        }
    }

    /// `key`: as it is written between its quotes.
    fn push(&mut self, key: &[u8], value: &[u8]) {
        let is_first = std::mem::take(&mut self.is_empty);
        let json = &mut self.json;
        json.extend_from_slice(if is_first { b"\"" } else { b",\"" });
        json.extend_from_slice(key);
        json.extend_from_slice(b"\":");
        json.extend_from_slice(value);
    }

    /// All bytes, with the object at their end.
    pub fn finish(mut self) -> Vec<u8> {
        self.json.push(b'}');
        self.json
    }
}

/// Copies JSON and replaces values in it on the way.
#[derive(Debug)]
pub struct Splice<'a> {
    whole: &'a str,
    changed: String,
    /// Bytes of `whole` that are copied or replaced.
    copied: usize,
}

impl<'a> Splice<'a> {
    /// Copies `whole`, which is valid JSON.
    pub fn new(whole: &'a str) -> Self {
        Self {
            whole,
            changed: String::new(),
            copied: 0,
        }
    }

    /// The JSON that is copied, without blanks around it.
    pub fn value(&self) -> JsonValue<'a> {
        JsonValue::new(self.whole.as_bytes().trim_ascii())
    }

    /// Replaces a value inside [`Self::value`] by other JSON. It comes after all that were replaced
    /// before.
    pub fn replace(&mut self, value: JsonValue<'a>, new: &str) {
        let at = offset(self.whole.as_bytes(), value.bytes());
        self.changed.push_str(&self.whole[self.copied..at]);
        self.changed.push_str(new);
        self.copied = at + value.bytes().len();
    }

    /// The copy.
    pub fn finish(mut self) -> String {
        self.changed.push_str(&self.whole[self.copied..]);
        self.changed.shrink_to_fit();
        self.changed
    }
}

/// Where `part`, which is a part of `whole`, begins in it.
pub(super) fn offset(whole: &[u8], part: &[u8]) -> usize {
    part.as_ptr().addr() - whole.as_ptr().addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(json: &str, name: &str, value: &str) -> String {
        String::from_utf8(with_member(json.as_bytes(), name, value.as_bytes())).unwrap()
    }

    #[test]
    fn one_member_is_changed_and_all_other_bytes_stay() {
        for (before, after) in [
            (r#"{"id":"a","x":1.0}"#, r#"{"id":7,"x":1.0}"#),
            (
                "{ \"x\" : 1e3 ,\n\"id\" : null , \"y\": [1, 2 ] }",
                "{ \"x\" : 1e3 ,\n\"id\" : 7 , \"y\": [1, 2 ] }",
            ),
            (r#"{"x":{"id":1}}"#, r#"{"id":7,"x":{"id":1}}"#),
            (r#"{"id":1,"id":2}"#, r#"{"id":7,"id":7}"#),
            (r#"{"\u0069d":1}"#, r#"{"\u0069d":7}"#),
            (r#"{"x":NaN,"id":1}"#, r#"{"x":NaN,"id":7}"#),
            (" { } ", r#" {"id":7 } "#),
            ("[]", "[]"),
            ("", ""),
        ] {
            assert_eq!(changed(before, "id", "7"), after, "{before}");
        }
        assert_eq!(changed("{}", "a\"b", "7"), r#"{"a\"b":7}"#);
    }

    #[test]
    fn an_object_is_written_with_the_bytes_of_another() {
        let old = br#"{"a": 1e400, "i\u0064":2,"b":"\ud83d","object": {}}"#;
        let mut object = ObjectWriter::default();
        object.members_without(JsonValue::new(old), &["id", "object"]);
        object.member("q\"", b"[]");
        let written = String::from_utf8(object.finish()).unwrap();
        assert_eq!(written, r#"{"a":1e400,"b":"\ud83d","q\"":[]}"#);
        assert_eq!(ObjectWriter::default().finish(), b"{}");
    }

    #[test]
    fn values_are_replaced_in_a_copy() {
        let mut splice = Splice::new(" [\"é\", 2 ,[3]] ");
        let items: Vec<_> = splice.value().items().collect();
        splice.replace(items[0], "null");
        splice.replace(items[2], "{}");
        assert_eq!(splice.finish(), " [null, 2 ,{}] ");
        assert_eq!(Splice::new("[1]").finish(), "[1]");
    }

    #[test]
    fn only_a_chunk_with_usage_and_without_a_choice_is_a_usage_chunk() {
        assert!(is_usage_chunk(br#"{"choices":[],"usage":{"x":1}}"#));
        assert!(is_usage_chunk(br#" {"usage":{},"choices":[ ]} "#));
        for json in [
            r#"{"choices":[{"delta":{}}],"usage":{"x":1}}"#,
            r#"{"choices":[],"usage":null}"#,
            r#"{"choices":[],"prompt_filter_results":[]}"#,
            r#"{"usage":{"x":1}}"#,
            "[]",
        ] {
            assert!(!is_usage_chunk(json.as_bytes()), "{json}");
        }
    }
}
