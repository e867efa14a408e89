//! Events about prompts, as WebSockets get them.

use std::sync::Arc;

use serde::Serialize;

use super::CreatedPromptResponse;
use crate::api::error::FailedPromptResponse;
use crate::domain::{Prompt, PromptId};
use crate::error::FailedPrompt;
use crate::services::prompts::Encoders;

/// Writes the events of prompts for WebSockets.
pub const EVENT_ENCODERS: Encoders = Encoders {
    completed,
    failed,
    deleted,
    delta,
};

fn completed(prompt: &Prompt) -> Arc<str> {
    match CreatedPromptResponse::of(prompt) {
        Some(answer) => event("prompt_completed", answer),
        None => failed(&FailedPrompt::of(prompt)),
    }
}

fn failed(failed: &FailedPrompt) -> Arc<str> {
    event("prompt_failed", FailedPromptResponse::from(failed))
}

fn deleted(id: PromptId) -> Arc<str> {
    event("prompt_failed", FailedPromptResponse::deleted(id))
}

fn delta(id: PromptId, offset: usize, text: &str) -> Arc<str> {
    #[derive(Serialize)]
    struct Delta<'a> {
        id: i64,
        offset: usize,
        text: &'a str,
    }
    event(
        "prompt.delta",
        Delta {
            id: id.0,
            offset,
            text,
        },
    )
}

fn event(name: &'static str, data: impl Serialize) -> Arc<str> {
    #[derive(Serialize)]
    struct Event<T> {
        r#type: &'static str,
        event: &'static str,
        data: T,
    }
    let event = Event {
        r#type: "prompt.message",
        event: name,
        data,
    };
    serde_json::to_string(&event)
        .expect("a struct of texts and numbers is JSON")
        .into()
}
