//! Events of prompts, as WebSockets get them.

use std::sync::Arc;

use serde::Serialize;

use super::CreatedPromptResponse;
use crate::api::error::FailedPromptResponse;
use crate::error::FailedPrompt;
use crate::services::prompts::Event;

/// Writes an event of a prompt for WebSockets.
pub fn encode_event(event: &Event<'_>) -> Arc<str> {
    match event {
        Event::Completed(prompt) => match CreatedPromptResponse::of(prompt) {
            Some(answer) => message("prompt_completed", answer),
            None => message(
                "prompt_failed",
                FailedPromptResponse::from(&FailedPrompt::of(prompt)),
            ),
        },
        Event::Failed(failed) => message("prompt_failed", FailedPromptResponse::from(*failed)),
        Event::Deleted(id) => message("prompt_failed", FailedPromptResponse::deleted(*id)),
        Event::Delta { id, offset, text } => {
            #[derive(Serialize)]
            struct Delta<'a> {
                id: i64,
                offset: usize,
                text: &'a str,
            }
            let id = id.0;
            let (offset, text) = (*offset, *text);
            message("prompt.delta", Delta { id, offset, text })
        }
    }
}

fn message(name: &'static str, data: impl Serialize) -> Arc<str> {
    #[derive(Serialize)]
    struct Message<T> {
        r#type: &'static str,
        event: &'static str,
        data: T,
    }
    let message = Message {
        r#type: "prompt.message",
        event: name,
        data,
    };
    serde_json::to_string(&message)
        .expect("a struct of texts and numbers is JSON")
        .into()
}
