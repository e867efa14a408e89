//! Writes a JSON value as YAML that readers of YAML 1.1 and 1.2 understand alike.
//!
//! YAML 1.1, which most parsers in use speak, takes an unquoted `2026-11-22` for a date and `no` for a boolean; so every text
//! is quoted, in JSON's form, which YAML shares.

use serde_json::Value;

/// The value as one YAML document, in block style, two spaces a level.
pub fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    write_block(&mut text, value, 0, false);
    text
}

/// Writes `value` at `level`; `is_begun` says that its first line has its indentation already.
fn write_block(text: &mut String, value: &Value, level: usize, is_begun: bool) {
    let mut is_begun = is_begun;
    let mut indent = |text: &mut String| {
        if !std::mem::take(&mut is_begun) {
            text.push_str(&"  ".repeat(level));
        }
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                indent(text);
                text.push_str(&key(name));
                text.push(':');
                if is_scalar(value) {
                    text.push(' ');
                    write_block(text, value, 0, true);
                } else {
                    text.push('\n');
                    write_block(text, value, level + 1, false);
                }
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                indent(text);
                text.push_str("- ");
                write_block(text, item, level + 1, true);
            }
        }
        // JSON's form of these is YAML too: texts in double quotes, `{}` and `[]`.
        Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_) => {
            indent(text);
            text.push_str(&value.to_string());
            text.push('\n');
        }
    }
}

/// Whether the value stands on its key's line.
fn is_scalar(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

/// A key, quoted unless it is a plain word that no reader takes for anything but a text.
fn key(name: &str) -> String {
    const WORDS: [&str; 10] = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~",
    ];
    let is_plain = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '$' || c == '/')
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "$/_-".contains(c))
        && !WORDS.contains(&name.to_ascii_lowercase().as_str());
    if is_plain {
        name.to_owned()
    } else {
        Value::from(name).to_string()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_written_in_block_style() {
        let value = json!({
            "list": ["a", { "b": 1, "c": [] }, [2, 3]],
            "none": null,
            "empty": {},
            "/a/path": { "200": true },
        });
        let text = "/a/path:\n  \"200\": true\nempty: {}\nlist:\n  - \"a\"\n  - b: 1\n    c: []\n  - - 2\n    - 3\nnone: null\n";
        assert_eq!(to_yaml(&value), text);
    }

    #[test]
    fn nothing_that_is_a_text_can_be_taken_for_something_else() {
        let value = json!({ "on": "no", "when": "2026-11-22", "lines": "a: b\n# \"c\"" });
        let text = "lines: \"a: b\\n# \\\"c\\\"\"\n\"on\": \"no\"\nwhen: \"2026-11-22\"\n";
        assert_eq!(to_yaml(&value), text);
    }
}
