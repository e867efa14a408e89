//! Events of prompts, as WebSockets get them.

use std::sync::Arc;

use serde::Serialize;

use super::CreatedPromptResponse;
use crate::domain::PromptId;
use crate::error::FailedPrompt;
use crate::services::prompts::Event;

/// Writes an event of a prompt for WebSockets.
pub fn encode_event(event: &Event<'_>) -> Arc<str> {
    match event {
        Event::Completed(prompt) => match CreatedPromptResponse::of(prompt) {
            Some(answer) => message("prompt_completed", answer),
            None => message("prompt_failed", Failed::from(&FailedPrompt::of(prompt))),
        },
        Event::Failed(failed) => message("prompt_failed", Failed::from(*failed)),
        Event::Deleted(id) => message("prompt_failed", Failed::deleted(*id)),
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

/// The data of a failed prompt's event, and the body of its error.
#[derive(Serialize)]
pub(super) struct Failed {
    detail: &'static str,
    code: &'static str,
    id: i64,
}

impl Failed {
    /// Of a prompt that was deleted while it was being answered.
    pub fn deleted(id: PromptId) -> Self {
        Self {
            detail: "The prompt was deleted while it was being answered.",
            code: "prompt_deleted",
            id: id.0,
        }
    }
}

impl From<&FailedPrompt> for Failed {
    fn from(failed: &FailedPrompt) -> Self {
        Self {
            detail: failed.detail,
            code: failed.code.as_str(),
            id: failed.id.0,
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
