//! An answer while it arrives, and its readers.
//!
//! The text is kept once, however many readers it has. A reader keeps an offset into the text and
//! copies a small piece at a time, when its client can take it. So a slow reader costs no more
//! memory than a fast one, and misses nothing.

mod offset;
mod reader;

use std::sync::Arc;

use tokio::sync::watch;

use crate::domain::{Prompt, PromptId, UserId};
use crate::error::FailedPrompt;
use crate::memory_budget::Reservation;

pub use self::offset::{InvalidOffset, StreamOffset};
pub use self::reader::{StreamEvent, StreamReader};

/// How an answer ended.
#[derive(Clone, Debug)]
pub enum StreamEnd {
    /// The answer is whole and stored.
    Completed(Arc<Prompt>),
    /// There is no answer.
    Failed(FailedPrompt),
    /// Its prompt was deleted.
    Deleted(PromptId),
}

impl StreamEnd {
    fn text_bytes(&self) -> usize {
        match self {
            Self::Completed(prompt) => prompt.text_bytes(),
            Self::Failed(_) | Self::Deleted(_) => 0,
        }
    }
}

#[derive(Debug)]
struct Progress {
    text: String,
    end: Option<StreamEnd>,
    /// Accounts for the texts as long as anybody reads them.
    memory: Reservation,
    /// Whether the answer is from another process, so that its text may differ from `text`.
    is_replaced: bool,
}

impl Progress {
    fn is_deleted(&self) -> bool {
        matches!(self.end, Some(StreamEnd::Deleted(_)))
    }

    fn text(&self) -> &str {
        match &self.end {
            Some(StreamEnd::Completed(prompt)) => prompt.response.as_deref().unwrap_or_default(),
            Some(StreamEnd::Failed(_) | StreamEnd::Deleted(_)) | None => &self.text,
        }
    }
}

/// The answer to a prompt that this process is running.
#[derive(Debug)]
pub struct ResponseStream {
    /// The owner of the prompt.
    pub user_id: UserId,
    /// The prompt.
    pub id: PromptId,
    /// Dropped with this value, which ends the readers.
    progress: watch::Sender<Progress>,
    readers: Arc<watch::Sender<usize>>,
}

impl ResponseStream {
    /// Starts without text. `memory` accounts for the prompt's text, and grows with the answer's.
    pub fn new(user_id: UserId, id: PromptId, memory: Reservation) -> Arc<Self> {
        let progress = Progress {
            text: String::new(),
            end: None,
            is_replaced: false,
            memory,
        };
        Arc::new(Self {
            user_id,
            id,
            progress: watch::Sender::new(progress),
            readers: Arc::default(),
        })
    }

    /// Adds a piece of text.
    pub fn push(&self, piece: &str) {
        self.progress.send_modify(|progress| {
            progress.memory.grow(piece.len());
            progress.text.push_str(piece);
        });
    }

    /// Accounts for an answer that is not streamed.
    pub fn hold(&self, bytes: usize) {
        self.progress.send_if_modified(|progress| {
            progress.memory.grow(bytes);
            false
        });
    }

    /// Ends the answer. Later calls change nothing.
    pub fn end(&self, end: StreamEnd) {
        self.finish(end, false);
    }

    /// Ends with the answer that another process stored. A reader whose text is not the beginning
    /// of that answer starts again. Changes nothing if the answer has ended.
    pub fn end_replaced(&self, prompt: Arc<Prompt>) {
        self.finish(StreamEnd::Completed(prompt), true);
    }

    fn finish(&self, end: StreamEnd, is_replaced: bool) {
        self.progress.send_if_modified(|progress| {
            let first = progress.end.is_none();
            if first {
                if matches!(end, StreamEnd::Completed(_)) {
                    // The stored prompt has the whole text.
                    progress.text = String::new();
                }
                progress.end = Some(end);
                progress.is_replaced = is_replaced;
            }
            first
        });
    }

    /// Whether the prompt was deleted.
    pub fn is_deleted(&self) -> bool {
        self.progress.borrow().is_deleted()
    }

    /// A reader that starts at `from`, or at the beginning.
    pub fn read(&self, from: Option<StreamOffset>) -> StreamReader {
        self.readers.send_modify(|readers| *readers += 1);
        let count = ReaderCount(Arc::clone(&self.readers));
        StreamReader::live(self.id, from, self.progress.subscribe(), count)
    }

    /// Waits until there is no reader. Cancel safe.
    pub async fn abandoned(&self) {
        let mut readers = self.readers.subscribe();
        // The sender is this value's own, so it cannot be gone.
        let _ = readers.wait_for(|readers| *readers == 0).await;
    }

    /// Waits for text after `offset`. Returns all there is, and the offset after it; `None` once
    /// there will be no more, or the prompt is deleted. Cancel safe.
    pub async fn text_after(&self, offset: StreamOffset) -> Option<(String, StreamOffset)> {
        let mut progress = self.progress.subscribe();
        let has_more =
            |progress: &Progress| progress.end.is_some() || progress.text.len() > offset.bytes();
        progress.wait_for(has_more).await.ok()?;
        let text = self.text_from(offset)?;
        let after = offset.after(&text);
        Some((text, after))
    }

    /// The text after `offset`; `None` if there is none, or the prompt is deleted.
    pub fn text_from(&self, offset: StreamOffset) -> Option<String> {
        let progress = self.progress.borrow();
        let text = progress.text.get(offset.bytes()..)?;
        (!text.is_empty() && !progress.is_deleted()).then(|| text.to_owned())
    }
}

/// Counts a reader while it lives.
#[derive(Debug)]
struct ReaderCount(Arc<watch::Sender<usize>>);

impl Drop for ReaderCount {
    fn drop(&mut self) {
        self.0.send_modify(|readers| *readers -= 1);
    }
}

#[cfg(test)]
mod tests;
