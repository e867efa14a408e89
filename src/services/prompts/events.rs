//! Events of prompts for the user's open sockets.

use std::sync::Arc;
use std::time::Duration;

use super::Deps;
use super::stream::{ResponseStream, StreamOffset};
use crate::domain::{Prompt, PromptId, UserId};
use crate::error::FailedPrompt;

/// How long pieces of text gather before the sockets get them as one event: a socket's queue is
/// counted in events, and an upstream may send hundreds of pieces a second.
const GATHER: Duration = Duration::from_millis(50);

/// What the user's sockets learn of a prompt.
#[derive(Debug)]
pub enum Event<'a> {
    /// It is answered.
    Completed(&'a Prompt),
    /// It has no answer.
    Failed(&'a FailedPrompt),
    /// It was deleted while it was being answered: text sent before is void.
    Deleted(PromptId),
    /// The next piece of a streamed answer.
    Delta {
        /// The prompt.
        id: PromptId,
        /// Bytes of text before this piece.
        offset: usize,
        /// The piece.
        text: &'a str,
    },
}

/// Writes an event in the transport's form.
pub type Encode = fn(&Event<'_>) -> Arc<str>;

/// Sends an event to the user's sockets, on every replica.
pub(super) fn publish(deps: &Deps, user_id: UserId, event: &Event<'_>) {
    deps.broker.publish(user_id, (deps.encode)(event));
}

/// Passes a streamed answer's text on to the user's sockets, until `ended` says that it is whole,
/// or its prompt is deleted.
pub(super) async fn publish_deltas(
    deps: &Deps,
    stream: &ResponseStream,
    ended: impl Future<Output = ()>,
) {
    let publish_delta = |offset: StreamOffset, text: &str| {
        let (id, offset) = (stream.id, offset.bytes());
        publish(deps, stream.user_id, &Event::Delta { id, offset, text });
    };
    let mut offset = StreamOffset::default();
    let pass_on = async {
        while let Some((text, after)) = stream.text_after(offset).await {
            publish_delta(offset, &text);
            offset = after;
            tokio::time::sleep(GATHER).await;
        }
    };
    tokio::select! {
        () = pass_on => {}
        () = ended => {}
    }
    if let Some(text) = stream.text_from(offset) {
        publish_delta(offset, &text);
    }
}
