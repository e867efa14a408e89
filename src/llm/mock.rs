//! The built-in mock. It responds at once, with the same text for the same prompt, and costs
//! nothing.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde_json::{Value, json};

use super::attempts::COMPLETED;
use super::{AnswerSink, Attempt, Completion, Content, TokenUsage};

/// The name of the mock and of its model.
pub const NAME: &str = "mock";
/// The service puts its own id in place of it.
const ID: &str = "chatcmpl-mock";

/// Answers; with `sink`, a prompt's answer also in pieces of a word each. A chat request says
/// itself whether its answer is streamed.
pub fn complete(content: Content<'_>, sink: Option<&mut dyn AnswerSink>) -> Completion {
    let (prompt, request_text) = match content {
        Content::Prompt(prompt) => (prompt.to_owned(), prompt.to_owned()),
        Content::Chat(request) => (request.last_user_text(), request.text()),
    };
    let text = format!("[mock] You said: {prompt}");
    let choices = match content {
        Content::Prompt(_) => 1,
        Content::Chat(request) => request.choices(),
    };
    let usage = TokenUsage {
        input: words(&request_text),
        output: words(&text) * u64::from(choices),
        ..TokenUsage::default()
    };
    let (mut answer, mut prompt_tokens, mut completion_tokens) = (None, None, None);
    match content {
        Content::Prompt(_) => {
            if let Some(sink) = sink {
                text.split_inclusive(' ').for_each(|piece| sink.text(piece));
            }
        }
        Content::Chat(request) => {
            let (input, output) = (usage.input, usage.output);
            let reply = ChatReply {
                text: &text,
                choices,
                usage: json!({ "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output }),
                created: SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default()
                    .as_secs(),
            };
            if let Some(sink) = sink.filter(|_| request.is_streamed()) {
                reply.stream(sink);
            }
            answer = Some(Bytes::from(reply.whole().to_string()));
            prompt_tokens = Some(u32::try_from(input).unwrap_or(u32::MAX));
            completion_tokens = Some(u32::try_from(output).unwrap_or(u32::MAX));
        }
    }
    Completion {
        text,
        model: NAME.to_owned(),
        finish_reason: Some("stop".to_owned()),
        prompt_tokens,
        completion_tokens,
        usage: Some(usage),
        answer,
        attempts: vec![Attempt {
            upstream: NAME.to_owned(),
            model: NAME.to_owned(),
            answering_model: Some(NAME.to_owned()),
            usage: Some(usage),
            outcome: COMPLETED,
        }],
        upstream_duration: Duration::ZERO,
    }
}

/// The mock's tokens: words between white space.
fn words(text: &str) -> u64 {
    text.split_whitespace().count() as u64
}

/// The reply to a chat request.
struct ChatReply<'a> {
    text: &'a str,
    choices: u32,
    usage: Value,
    created: u64,
}

impl ChatReply<'_> {
    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({ "id": ID, "object": kind, "created": self.created, "model": NAME, "choices": choices })
    }

    fn whole(&self) -> Value {
        let choice = |index: u32| {
            json!({
                "index": index,
                "message": { "role": "assistant", "content": self.text, "refusal": null },
                "logprobs": null,
                "finish_reason": "stop",
            })
        };
        let mut object = self.object("chat.completion", (0..self.choices).map(choice).collect());
        object["usage"] = self.usage.clone();
        object
    }

    /// First the role, then the words, then the reason, each for all choices; the usage last.
    fn stream(&self, sink: &mut dyn AnswerSink) {
        let role = json!({ "role": "assistant", "content": "", "refusal": null });
        self.chunk_each(&role, &Value::Null, sink);
        for piece in self.text.split_inclusive(' ') {
            self.chunk_each(&json!({ "content": piece }), &Value::Null, sink);
            sink.text(piece);
        }
        self.chunk_each(&json!({}), &json!("stop"), sink);
        let mut object = self.object("chat.completion.chunk", json!([]));
        object["usage"] = self.usage.clone();
        sink.chunk(object.to_string().as_bytes());
    }

    fn chunk_each(&self, delta: &Value, reason: &Value, sink: &mut dyn AnswerSink) {
        for index in 0..self.choices {
            let choice = json!([{ "index": index, "delta": delta, "logprobs": null, "finish_reason": reason }]);
            let object = self.object("chat.completion.chunk", choice);
            sink.chunk(object.to_string().as_bytes());
        }
    }
}
