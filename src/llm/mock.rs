//! The built-in mock. It responds at once, with the same text for the same prompt, and costs
//! nothing.

use super::Completion;

/// The name of the mock and of its model.
pub const NAME: &str = "mock";

/// Answers a prompt; with `on_delta`, also in pieces of a word each.
pub fn complete(prompt: &str, on_delta: Option<&mut (dyn FnMut(&str) + Send)>) -> Completion {
    let text = format!("[mock] You said: {prompt}");
    if let Some(on_delta) = on_delta {
        text.split_inclusive(' ').for_each(on_delta);
    }
    Completion {
        text,
        model: NAME.to_owned(),
        finish_reason: Some("stop".to_owned()),
        prompt_tokens: None,
        completion_tokens: None,
        upstream_duration: std::time::Duration::ZERO,
    }
}
