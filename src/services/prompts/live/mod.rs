//! An answer while it is being written, and those who read along.
//!
//! The text is kept once, however many read it. A reader keeps a place in it and copies a small piece at a time, when it is
//! ready to pass it on: a slow one costs no more memory than a fast one, and misses nothing.

mod place;
mod reader;

use std::sync::Arc;

use tokio::sync::watch;

use crate::domain::{Prompt, PromptId, UserId};
use crate::error::FailedPrompt;
use crate::memory_budget::Reservation;

pub use self::place::{NoPlace, Place};
pub use self::reader::{Event, Reader};

/// How an answer ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Answered and stored.
    Completed(Arc<Prompt>),
    /// Without an answer.
    Failed(FailedPrompt),
    /// Its prompt was deleted.
    Deleted,
}

impl End {
    fn text_bytes(&self) -> usize {
        match self {
            Self::Completed(prompt) => prompt.text_bytes(),
            Self::Failed(_) | Self::Deleted => 0,
        }
    }
}

#[derive(Debug)]
struct Progress {
    text: String,
    end: Option<End>,
    /// What the texts hold, for as long as anybody reads them.
    memory: Reservation,
    /// Whether the answer is another process's, so that its text may be another one.
    is_replaced: bool,
}

impl Progress {
    fn is_deleted(&self) -> bool {
        matches!(self.end, Some(End::Deleted))
    }

    fn text(&self) -> &str {
        match &self.end {
            Some(End::Completed(prompt)) => prompt.response.as_deref().unwrap_or_default(),
            Some(End::Failed(_) | End::Deleted) | None => &self.text,
        }
    }
}

/// An answer that this process is writing.
#[derive(Debug)]
pub struct Live {
    /// Whose it is.
    pub user_id: UserId,
    /// Whose answer it is.
    pub id: PromptId,
    /// Gone with this value, which ends those who read along.
    progress: watch::Sender<Progress>,
    readers: Arc<watch::Sender<usize>>,
}

impl Live {
    /// An empty one. `memory` holds the prompt's text, and will hold the answer's.
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

    /// Holds memory for an answer that came whole.
    pub fn hold(&self, bytes: usize) {
        self.progress.send_if_modified(|progress| {
            progress.memory.grow(bytes);
            false
        });
    }

    /// Ends it. The first end counts.
    pub fn end(&self, end: End) {
        self.finish(end, false);
    }

    /// Ends it with the answer that another process has stored. Readers to whom that answer is not
    /// the continuation of what they have read begin anew. The first end counts.
    pub fn end_replaced(&self, prompt: Arc<Prompt>) {
        self.finish(End::Completed(prompt), true);
    }

    fn finish(&self, end: End, is_replaced: bool) {
        self.progress.send_if_modified(|progress| {
            let first = progress.end.is_none();
            if first {
                if matches!(end, End::Completed(_)) {
                    // The stored prompt has the whole text.
                    progress.text = String::new();
                }
                progress.end = Some(end);
                progress.is_replaced = is_replaced;
            }
            first
        });
    }

    /// Whether its prompt was deleted.
    pub fn is_deleted(&self) -> bool {
        self.progress.borrow().is_deleted()
    }

    /// Reads along, from the beginning or from a place reached before.
    pub fn read(&self, from: Option<Place>) -> Reader {
        self.readers.send_modify(|readers| *readers += 1);
        let attendance = Attendance(Arc::clone(&self.readers));
        Reader::live(self.id, from, self.progress.subscribe(), attendance)
    }

    /// Waits until nobody reads along. Cancel safe.
    pub async fn deserted(&self) {
        let mut readers = self.readers.subscribe();
        // The sender is this value's own, so it cannot be gone.
        let _ = readers.wait_for(|readers| *readers == 0).await;
    }

    /// Waits for text after `place`, and answers all there is and the place after it; `None` once there will be no more, or the
    /// prompt is deleted.
    /// Cancel safe.
    pub async fn text_after(&self, place: Place) -> Option<(String, Place)> {
        let mut progress = self.progress.subscribe();
        let progress = progress
            .wait_for(|progress| progress.end.is_some() || progress.text.len() > place.bytes())
            .await
            .ok()
            .filter(|progress| !progress.is_deleted())?;
        let text = progress.text.get(place.bytes()..)?;
        (!text.is_empty()).then(|| (text.to_owned(), place.after(text)))
    }

    /// The text there is after `place`, if there is any and the prompt is not deleted.
    pub fn text_from(&self, place: Place) -> Option<String> {
        let progress = self.progress.borrow();
        let text = progress.text.get(place.bytes()..)?;
        (!text.is_empty() && !progress.is_deleted()).then(|| text.to_owned())
    }
}

/// Counts a reader while it lives.
#[derive(Debug)]
struct Attendance(Arc<watch::Sender<usize>>);

impl Drop for Attendance {
    fn drop(&mut self) {
        self.0.send_modify(|readers| *readers -= 1);
    }
}

#[cfg(test)]
mod tests;
