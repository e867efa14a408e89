//! An upstream's error message, made safe for the log: one short line without words of the prompt
//! or the key.

use std::collections::HashSet;

use super::line::{is_unseen, one_line};
use super::reader::JsonValue;
use crate::llm::UpstreamError;

/// Longest message that is logged, in characters.
const MESSAGE_CHARS: usize = 200;
/// Longest message of a refusal that is passed on, in characters. Those about a schema name each
/// place in it.
const REFUSAL_CHARS: usize = 2000;
/// Shorter words of a prompt, such as *the* and *not*, are not secret, unless they have a digit.
const SHORTEST_WORD: usize = 4;
/// In a prompt that is not longer than this, every word is secret.
const SHORT_PROMPT: usize = 24;
/// A word with more bytes is left out unread: comparing its parts takes time that grows with the
/// cube of its length. No word that helps an operator is that long.
const LONGEST_WORD: usize = 64;
/// Stands for a word that is left out.
const OMITTED: &str = "…";

/// Finds the message in the body of an error: in an error object, or the first line of a plain
/// text.
pub fn find(body: &[u8]) -> Option<String> {
    let body = body.trim_ascii();
    if let Some(start) = body.iter().position(|byte| *byte == b'{')
        && body[..start].iter().all(|byte| b"[ \t\r\n".contains(byte))
    {
        return of_object(JsonValue::new(&body[start..]));
    }
    // The first line of a page has no message, and neither has JSON that is not an object.
    if body.first().is_none_or(|byte| b"<[\"".contains(byte)) {
        return None;
    }
    let line = body.split(|byte| *byte == b'\n').next()?;
    Some(String::from_utf8_lossy(line).into_owned())
}

fn of_object(object: JsonValue<'_>) -> Option<String> {
    // Gateways put the error that they received into another error.
    let mut object = object;
    for _ in 0..4 {
        let names = [
            "error",
            "message",
            "detail",
            "msg",
            "error_description",
            "errors",
        ];
        let [error, texts @ ..] = object.object(names).members;
        if let Some(error) = error.filter(|error| error.is_object()) {
            object = error;
            continue;
        }
        // An `error` beside another text is a code.
        let mut texts = texts.into_iter().flatten().chain(error);
        if let Some(text) = texts.clone().find_map(JsonValue::text) {
            return Some(text);
        }
        // A list of what is wrong with each field.
        object = texts.find_map(|list| list.items().next())?;
    }
    None
}

/// A refusal of a chat request, for its caller: what the body of the error says, as short lines and
/// without the `key`.
pub fn refusal(status: u16, body: &[u8], key: Option<&str>) -> UpstreamError {
    let message = find(body).map(|text| without_key(&text, key, REFUSAL_CHARS));
    let mut error = JsonValue::new(body.trim_ascii());
    // As in `of_object`.
    for _ in 0..4 {
        let [inner] = error.object(["error"]).members;
        match inner.filter(|inner| inner.is_object()) {
            Some(inner) => error = inner,
            None => break,
        }
    }
    let names = error.object(["type", "param", "code"]).members;
    let [error_type, param, code] = names.map(|value| {
        let value = value?;
        // A code can be a number.
        let number = || String::from_utf8(value.bytes().to_vec()).ok();
        let text = value
            .text()
            .or_else(|| number().filter(|_| value.is_number()))?;
        Some(without_key(&text, key, MESSAGE_CHARS))
    });
    UpstreamError {
        status,
        message: message
            .filter(|text| !text.is_empty())
            .unwrap_or_else(|| "The upstream refused the request.".to_owned()),
        error_type,
        param,
        code,
    }
}

/// One line of at most `most` characters, in which words are left out that are a part of the key,
/// or have one of its words.
fn without_key(text: &str, key: Option<&str>, most: usize) -> String {
    let key = key.map(str::to_lowercase);
    let key = key
        .as_deref()
        .map(|key| SecretText::new(key, SHORTEST_WORD));
    shown(text, most, |word| {
        word.len() >= SHORTEST_WORD && key.as_ref().is_some_and(|key| key.has_part_of(word))
    })
}

/// The message as it may be logged. Words that are in one of the `prompts` or in the `key` are left
/// out, because an upstream may repeat a part of what it received.
pub fn presentable(message: &str, prompts: &[&str], key: Option<&str>) -> String {
    let texts: Vec<String> = prompts
        .iter()
        .chain(&key)
        .map(|text| text.to_lowercase())
        .collect();
    let (prompts, key) = texts.split_at(prompts.len());
    let prompts = prompts
        .iter()
        .map(|prompt| SecretText::new(prompt, shortest_word(prompt)));
    // OpenAI shows the beginning and the end of a refused key.
    let key = key.iter().map(|key| SecretText::new(key, 2));
    let secrets: Vec<SecretText<'_>> = prompts.chain(key).collect();

    shown(message, MESSAGE_CHARS, |word| {
        secrets.iter().any(|secret| secret.has_part_of(word))
    })
}

/// One line of at most `most` characters, in which secret words are left out.
fn shown(message: &str, most: usize, is_secret: impl Fn(&str) -> bool) -> String {
    // Characters that are not shown must not part a word either.
    let line = message.replace(['\n', '\r', '\t'], " ");
    let line = line.replace(is_unseen, "");
    let mut rest = line.as_str();
    let (mut shown, mut characters) = (String::new(), 0);
    while !rest.is_empty() && characters < most {
        let end = rest.find(|c| !is_of_word(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let next = after.find(is_of_word).unwrap_or(after.len());
        let part = match word.len() > LONGEST_WORD || is_secret(word) {
            true => OMITTED,
            false => word,
        };
        characters += part.chars().count() + next;
        shown.push_str(part);
        shown.push_str(&after[..next]);
        rest = &after[next..];
    }
    one_line(&shown, most)
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The length of the shortest word of a prompt that is left out.
fn shortest_word(prompt: &str) -> usize {
    match prompt.chars().nth(SHORT_PROMPT) {
        None => 1,
        Some(_) => SHORTEST_WORD,
    }
}

/// Something that may not be logged, in lower case.
struct SecretText<'a> {
    text: &'a str,
    words: HashSet<&'a str>,
    /// Words that are shorter, and have no digit, may be shown.
    shortest_word: usize,
}

impl<'a> SecretText<'a> {
    fn new(text: &'a str, shortest_word: usize) -> Self {
        let words = text.split(|c| !is_of_word(c));
        Self {
            text,
            words: words.filter(|word| word.len() >= SHORTEST_WORD).collect(),
            shortest_word,
        }
    }

    /// Whether a word is a part of it, or has a word of it as a part.
    fn has_part_of(&self, word: &str) -> bool {
        let word = word.to_lowercase();
        // In a script without blanks, a single character can be a word.
        let tells = word.len() >= self.shortest_word
            || !word.is_ascii()
            || word.bytes().any(|byte| byte.is_ascii_digit());
        if word.is_empty() || !tells {
            return false;
        }
        let starts = || word.char_indices().map(|(at, _)| at);
        self.text.contains(&word)
            || starts().any(|start| {
                let ends = starts().skip(1).chain([word.len()]);
                ends.filter(|end| *end >= start + SHORTEST_WORD)
                    .any(|end| self.words.contains(&word[start..end]))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_found_in_errors_of_every_kind() {
        for (body, message) in [
            (
                r#"{"error":{"message":"no such model","type":"x"}}"#,
                Some("no such model"),
            ),
            (
                r#" [{"error":{"code":400,"message":"bad key"}}]"#,
                Some("bad key"),
            ),
            (r#"{"error":"no"}"#, Some("no")),
            (
                r#"{"error":{"error":{"message":"nested"}}}"#,
                Some("nested"),
            ),
            (
                r#"{"object":"error","message":"no","code":404}"#,
                Some("no"),
            ),
            (r#"{"detail":"Not Found"}"#, Some("Not Found")),
            (
                r#"{"error":"invalid_request","error_description":"no such scope"}"#,
                Some("no such scope"),
            ),
            (r#"{"errors":[{"message":"too long"}]}"#, Some("too long")),
            (
                r#"{"detail":[{"loc":["body"],"msg":"field required"}]}"#,
                Some("field required"),
            ),
            (r#"{"choices":[],"error":{"message":"gone"}}"#, Some("gone")),
            (
                r#"{"error":{"message":"cut off"},"param":"#,
                Some("cut off"),
            ),
            ("404 page not found\n", Some("404 page not found")),
            ("<html><body>no</body></html>", None),
            (r#"{"error":{}}"#, None),
            (
                r#"{"error":{"error":{"error":{"error":{"error":{}}}}}}"#,
                None,
            ),
            (r#"["no"]"#, None),
            ("", None),
        ] {
            assert_eq!(find(body.as_bytes()).as_deref(), message, "{body}");
        }
    }

    fn shown(message: &str, prompt: &str) -> String {
        presentable(message, &[prompt], Some("sk-proj-A1b2C3d4E5f6"))
    }

    #[test]
    fn a_message_is_one_short_line() {
        let message = format!("first\nsecond\u{1b}[31m\u{202e} {}", "xx,".repeat(1000));
        let shown = shown(&message, "Why is the sky blue on Tuesdays?");
        assert!(shown.starts_with("first second[31m xx,xx"), "{shown}");
        assert_eq!(shown.chars().count(), MESSAGE_CHARS);
    }

    /// With parts compared it would take years.
    #[test]
    fn a_word_of_a_mebibyte_is_left_out_at_once() {
        let message = format!("bad input: {} (400)", "x1".repeat(1 << 19));
        let prompt = "Why is the sky blue on Tuesdays?";
        assert_eq!(shown(&message, prompt), "bad input: … (400)");
    }

    #[test]
    fn words_that_are_not_secret_are_shown() {
        let message = "The model `gpt-9` does not exist or you do not have access to it.";
        assert_eq!(shown(message, "Why is the sky blue on Tuesdays?"), message);
        assert_eq!(shown(message, "hello"), message);
    }

    #[test]
    fn nothing_of_the_prompt_is_shown() {
        let prompt = "My password is hunter2, and the Café is 'closed'\nsince 1984.";
        for echo in [
            prompt,
            &prompt.to_uppercase(),
            &prompt[12..22],
            &format!("{:?}", &prompt),
            &prompt.replace(' ', "%20"),
            "pas\u{1}swo\u{7f}rd, hun\0ter2",
            "hunter2",
            "xhunter2x",
            "(hunt",
            "1984",
        ] {
            let shown = shown(&format!("Invalid input: {echo}"), prompt);
            let shown = shown.to_lowercase();
            for word in ["password", "hunt", "caf", "closed", "since", "1984"] {
                assert!(!shown.contains(word), "{echo}: {shown}");
            }
            assert!(shown.starts_with("invalid input: "), "{shown}");
        }
        assert_eq!(shown("bad: ab", "ab"), "bad: …");
        assert_eq!(
            shown(
                "bad: 天気",
                "今日の天気はどうですか。教えてください、お願いします。"
            ),
            "bad: …"
        );
    }

    #[test]
    fn a_refusal_says_what_is_wrong_without_the_key() {
        let body = r#"{"error":{"message":"Bad 'tools[2]' with sk-proj-A1b2C3d4E5f6,\nsee 4 docs",
            "type":"invalid_request_error","param":"tools[2].name","code":42}}"#;
        let told = refusal(400, body.as_bytes(), Some("sk-proj-A1b2C3d4E5f6"));
        assert_eq!(told.message, "Bad 'tools[2]' with sk-…-…, see 4 docs");
        assert_eq!(told.error_type.as_deref(), Some("invalid_request_error"));
        assert_eq!(told.param.as_deref(), Some("tools[2].name"));
        assert_eq!(told.code.as_deref(), Some("42"));

        let page = refusal(404, b"<html>nginx</html>", None);
        assert_eq!(page.message, "The upstream refused the request.");
        assert_eq!((page.error_type, page.param, page.code), (None, None, None));

        let long = format!(r#"{{"detail":"{}"}}"#, "xx ".repeat(5000));
        assert!(refusal(422, long.as_bytes(), None).message.chars().count() <= REFUSAL_CHARS);
    }

    #[test]
    fn nothing_of_the_key_is_shown() {
        for echo in [
            "sk-proj-A1b2C3d4E5f6",
            "sk-proj-A1b2********E5f6",
            "Bearer SK-PROJ-a1b2c3d4e5f6",
            "C3d4",
        ] {
            let shown =
                shown(&format!("Incorrect API key provided: {echo}."), "hello").to_lowercase();
            for part in ["proj", "a1b2", "c3d4", "e5f6"] {
                assert!(!shown.contains(part), "{echo}: {shown}");
            }
            assert!(shown.starts_with("incorrect api key provided: "), "{shown}");
        }
    }
}
