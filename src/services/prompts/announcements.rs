//! What a user's open sockets are told.

use std::sync::Arc;
use std::time::Duration;

use super::Parts;
use super::live::{Live, Place};
use crate::domain::{Prompt, PromptId, UserId};
use crate::error::FailedPrompt;

/// How long pieces of text gather before the sockets get them as one: a socket's queue is counted in events, and an upstream
/// may send hundreds of pieces a second.
const GATHER: Duration = Duration::from_millis(50);

/// Writes events. The wire form is the transport's to choose.
#[derive(Clone, Copy)]
pub struct Encoders {
    /// A completed prompt.
    pub completed: fn(&Prompt) -> Arc<str>,
    /// A failed one.
    pub failed: fn(&FailedPrompt) -> Arc<str>,
    /// One that was deleted while it was being answered.
    pub deleted: fn(PromptId) -> Arc<str>,
    /// A piece of a streamed answer: whose, the bytes of text before it, and the piece.
    pub delta: fn(PromptId, usize, &str) -> Arc<str>,
}

/// Tells the user's sockets of a completed prompt.
pub(super) fn completed(parts: &Parts, prompt: &Prompt) {
    parts
        .broker
        .publish(prompt.user_id, (parts.encoders.completed)(prompt));
}

/// Tells the user's sockets of a failed prompt.
pub(super) fn failed(parts: &Parts, user_id: UserId, failed: &FailedPrompt) {
    parts
        .broker
        .publish(user_id, (parts.encoders.failed)(failed));
}

/// Tells the user's sockets of a prompt that was deleted while it was being answered: what they have of its text is void.
pub(super) fn deleted(parts: &Parts, user_id: UserId, id: PromptId) {
    parts.broker.publish(user_id, (parts.encoders.deleted)(id));
}

/// Passes an answer's text on to the user's sockets while it is being written, until `written` says that it is whole, or its prompt
/// is deleted.
pub(super) async fn deltas(parts: &Parts, live: &Live, written: impl Future<Output = ()>) {
    let mut place = Place::default();
    let pass_on = async {
        while let Some((text, after)) = live.text_after(place).await {
            let event = (parts.encoders.delta)(live.id, place.bytes(), &text);
            parts.broker.publish(live.user_id, event);
            place = after;
            tokio::time::sleep(GATHER).await;
        }
    };
    tokio::select! {
        () = pass_on => {}
        () = written => {}
    }
    if let Some(text) = live.text_from(place) {
        let event = (parts.encoders.delta)(live.id, place.bytes(), &text);
        parts.broker.publish(live.user_id, event);
    }
}
