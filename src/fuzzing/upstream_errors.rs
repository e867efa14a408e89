use super::first_line;
use crate::llm::openai::error_message::{find, presentable};

/// The body of an upstream's error. The first line is the key that was sent, the second the prompt.
///
/// The logged message is one short line, without a word of the key or of the prompt.
pub fn upstream_errors(data: &[u8]) {
    let (key, rest) = first_line(data);
    let (prompt, body) = first_line(rest);
    let Some(message) = find(body) else {
        return;
    };
    let (key, prompt) = (
        String::from_utf8_lossy(key),
        String::from_utf8_lossy(prompt),
    );
    let shown = presentable(&message, &[&prompt], Some(&key));
    assert!(shown.chars().count() <= 200);
    assert!(!shown.chars().any(char::is_control));
    let (key, prompt) = (key.to_lowercase(), prompt.to_lowercase());
    let secrets = words(&key).chain(words(&prompt));
    let secrets: Vec<&str> = secrets.filter(|secret| secret.len() >= 4).collect();
    for word in words(&shown.to_lowercase()) {
        // The end of the line may cut a word.
        let is_secret = |secret: &&str| word.contains(*secret);
        assert!(!secrets.iter().any(is_secret), "{shown:?} shows a secret");
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_'))
}
