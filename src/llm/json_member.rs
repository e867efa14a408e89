//! Changes single members of a JSON object and leaves all its other bytes as they are.

use super::openai::JsonValue;

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

/// Whether a key, as it is written between its quotes, is the name.
fn is_named(key: &[u8], name: &str) -> bool {
    match key.contains(&b'\\') {
        true => super::openai::decoded(key) == name,
        false => key == name.as_bytes(),
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
