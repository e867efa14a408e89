//! The upstream that answers prompts: for now the built-in mock alone.

/// What the upstream answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The answer's text.
    pub text: String,
    /// The model that answered, as the upstream names it.
    pub model: String,
    /// Tokens of the question, if the upstream counts them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer, if the upstream counts them.
    pub completion_tokens: Option<u32>,
}

/// A client of the built-in mock, which answers at once, the same text for the same prompt.
#[derive(Debug, Default)]
pub struct Client;

impl Client {
    /// The upstream's name, under which durations are counted.
    pub fn provider(&self) -> &'static str {
        "mock"
    }

    /// The model that is asked.
    pub fn model(&self) -> &'static str {
        "mock"
    }

    /// Answers a prompt.
    #[expect(
        clippy::unused_async,
        reason = "every upstream but the mock waits for the network"
    )]
    pub async fn complete(&self, prompt: &str) -> Completion {
        Completion {
            text: format!("[mock] You said: {prompt}"),
            model: self.model().to_owned(),
            prompt_tokens: None,
            completion_tokens: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_mock_repeats_what_it_was_told() {
        let completion = Client.complete("hello world").await;
        assert_eq!(completion.text, "[mock] You said: hello world");
        assert_eq!(completion.model, "mock");
    }
}
