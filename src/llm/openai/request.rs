//! The JSON of a request in the chat-completions protocol.

use bytes::Bytes;
use serde::Serialize;

use crate::config::{Endpoint, UpstreamConfig};
use crate::llm::Content;

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    messages: Vec<ChatMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    // Always sent: some servers stream unless the request says no.
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The body of a request for the model.
pub fn request(
    config: &UpstreamConfig,
    endpoint: &Endpoint,
    model: &str,
    content: Content<'_>,
    is_streamed: bool,
) -> Bytes {
    let prompt = match content {
        Content::Prompt(prompt) => prompt,
        Content::Chat(request) => return request.body_for(model),
    };
    let system = config.system_prompt.as_deref().map(|content| ChatMessage {
        role: "system",
        content,
    });
    let user = ChatMessage {
        role: "user",
        content: prompt,
    };
    // OpenAI's newer models refuse the old name; most other servers know no other.
    let is_openai = endpoint.base_url.is_openai();
    let request = Request {
        model,
        messages: system.into_iter().chain([user]).collect(),
        max_tokens: config.max_tokens.filter(|_| !is_openai),
        max_completion_tokens: config.max_tokens.filter(|_| is_openai),
        temperature: config.temperature,
        top_p: config.top_p,
        stream: is_streamed,
        stream_options: is_streamed.then_some(StreamOptions {
            include_usage: true,
        }),
    };
    serde_json::to_vec(&request)
        .expect("strings and numbers can be written as JSON")
        .into()
}
