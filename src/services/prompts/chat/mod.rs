//! Calls of `/v1/chat/completions`: what is particular to them beside other posts.
//!
//! They take the same four phases as every post (`call`). Their request goes to the upstream as it
//! came, and the chunks of a streamed answer go to the caller as they came. What is kept of them
//! beside the prompt's texts is made in `texts`.

mod chunks;
mod history;
mod texts;

use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest, Sha256};

pub use self::chunks::{ChatEvent, ChatReader};
pub(super) use self::chunks::{ChunkSender, chunk_queue};
pub use self::texts::MOST_LABELS;
pub(super) use self::texts::kept_answer;
use self::texts::{kept_texts, text_of};
use crate::domain::ChatTexts;
use crate::llm::{ChatRequest, ChatRequestProblem};
pub use crate::llm::{JsonValue, ObjectWriter, is_usage_chunk, with_member};
pub use crate::store::{ChatCall, ChatFilter};

/// Longer JSON is read on a thread that may block: a megabyte takes a few milliseconds.
const LONG_JSON_BYTES: usize = 64 << 10;

/// Does work on JSON of so many bytes: on a thread that may block if they are many.
pub async fn by_length<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if bytes <= LONG_JSON_BYTES {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // A defect of the service, which its client must not take for one of the body.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// A chat call as it was posted.
#[derive(Clone, Debug)]
pub struct ChatPost {
    /// The request, as the upstream gets it.
    pub request: ChatRequest,
    /// The text of the last message of the user: what the prompt is.
    pub prompt: String,
    /// What is kept besides; `None` if the caller wants none of its texts kept.
    pub texts: Option<Arc<ChatTexts>>,
    /// Whether the outcome is announced to the user's sockets.
    pub announce: bool,
    /// SHA-256 of all that must be the same in a request that is repeated with its idempotency key.
    pub fingerprint: [u8; 32],
}

impl ChatPost {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub async fn read(body: Bytes) -> Result<Self, ChatRequestProblem> {
        by_length(body.len(), || Self::parse(body)).await
    }

    fn parse(body: Bytes) -> Result<Self, ChatRequestProblem> {
        let request = ChatRequest::parse(body)?;
        let is_kept = request.member("store") != Some("false");
        let labels = texts::labels(&request);
        let is_announced = labels.get("websocket").map(String::as_str) == Some("true");
        Ok(Self {
            prompt: text_of(&request),
            texts: is_kept.then(|| kept_texts(&request, &labels).into()),
            announce: is_announced,
            fingerprint: fingerprint(&request),
            request,
        })
    }
}

/// The members that say whether an answer is streamed. A client whose stream broke may repeat the
/// request to get the answer whole.
const IS_STREAMED: [&str; 2] = ["stream", "stream_options"];

/// SHA-256 of the members of a request, but for those that only say how the answer is sent.
fn fingerprint(request: &ChatRequest) -> [u8; 32] {
    let mut fingerprint = Sha256::new();
    let mut part = |text: &str| {
        fingerprint.update((text.len() as u64).to_le_bytes());
        fingerprint.update(text.as_bytes());
    };
    for (name, value) in request.members() {
        if !IS_STREAMED.contains(&name) {
            part(name);
            part(value);
        }
    }
    fingerprint.finalize().into()
}
