//! An answer while it is being written, and those who read along.
//!
//! The text is kept once, however many read it. A reader keeps a place in it and copies a small piece at a time, when it is
//! ready to pass it on: a slow one costs no more memory than a fast one, and misses nothing.

mod place;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::domain::{Prompt, PromptId, PromptStatus, UserId};
use crate::error::FailedPrompt;
use crate::memory_budget::Reservation;
use crate::store::PromptStore;

pub use self::place::{NoPlace, Place};

/// The most bytes of text in one piece.
const PIECE_BYTES: usize = 4 << 10;
/// How long the store is left alone between two looks at a prompt that another process answers, at first and at most.
const POLL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// How long a reader waits for another process's answer. A call does not take as long, and a reader may come again.
const PATIENCE: Duration = Duration::from_secs(900);

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
        Reader {
            _attendance: Some(Attendance(Arc::clone(&self.readers))),
            ..Reader::new(self.id, from, Source::Live(self.progress.subscribe()))
        }
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

/// What a reader learns.
#[derive(Clone, Debug)]
pub enum Event {
    /// The text begins here: what was read before, if anything, is void.
    Started(PromptId),
    /// The next piece of the text.
    Delta(String),
    /// The text was all of the answer. The last event.
    Completed(Arc<Prompt>),
    /// There is no answer. The last event.
    Failed(FailedPrompt),
    /// The prompt was deleted. The last event.
    Deleted(PromptId),
}

/// Where a reader reads.
enum Source {
    /// In this process.
    Live(watch::Receiver<Progress>),
    /// In the store, which has the text once it is whole.
    Stored(Stored),
}

struct Stored {
    store: Arc<dyn PromptStore>,
    user_id: UserId,
    pause: Duration,
    /// An instant rather than a length: who reads may give up waiting and come back, again and again.
    next_look: Instant,
    until: Instant,
    /// What the prompt's texts hold; none once they are elsewhere.
    memory: Option<Reservation>,
}

/// Reads one answer.
pub struct Reader {
    id: PromptId,
    place: Place,
    /// A place reached before that was not yet found in the text.
    from: Option<Place>,
    is_started: bool,
    is_ended: bool,
    /// Whether it knows that the text may be another one than it has read so far.
    is_replaced: bool,
    source: Source,
    /// Lets the answer know that somebody reads it.
    _attendance: Option<Attendance>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("id", &self.id)
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Reader {
    fn new(id: PromptId, from: Option<Place>, source: Source) -> Self {
        Self {
            id,
            place: Place::default(),
            from: from.filter(|from| *from != Place::default()),
            // Who has been at the beginning knows the id.
            is_started: from == Some(Place::default()),
            is_ended: false,
            is_replaced: false,
            source,
            _attendance: None,
        }
    }

    /// Reads a stored prompt: at once if it has ended, else when another process has ended it.
    /// `memory` holds the prompt's texts.
    pub fn stored(
        prompt: Prompt,
        from: Option<Place>,
        store: Arc<dyn PromptStore>,
        memory: Reservation,
    ) -> Self {
        let (id, user_id) = (prompt.id, prompt.user_id);
        let source = match ended(prompt) {
            Some(end) => known(end, memory),
            None => Source::Stored(Stored {
                store,
                user_id,
                pause: POLL.0,
                next_look: Instant::now() + POLL.0,
                until: Instant::now() + PATIENCE,
                memory: Some(memory),
            }),
        };
        Self::new(id, from, source)
    }

    /// Whether the answer is another process's, so that nothing here brings its end nearer.
    pub fn is_of_another(&self) -> bool {
        matches!(self.source, Source::Stored(_))
    }

    /// The place after the latest event.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The next event; `None` after the last, or when waiting for another process has taken too long. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if self.is_ended {
                return None;
            }
            if !self.is_started && self.from.is_none() {
                self.is_started = true;
                return Some(Event::Started(self.id));
            }
            let next = match &mut self.source {
                Source::Live(progress) => {
                    // Looked at in a block of its own: what is borrowed may not be held while waiting.
                    let event = {
                        let progress = progress.borrow_and_update();
                        let step = Step {
                            id: self.id,
                            place: &mut self.place,
                            from: &mut self.from,
                            is_started: &mut self.is_started,
                            is_ended: &mut self.is_ended,
                            is_replaced: &mut self.is_replaced,
                        };
                        step.take(&progress)
                    };
                    if event.is_some() {
                        return event;
                    }
                    if progress.changed().await.is_err() {
                        // Its task died without a word; nothing more will come from here.
                        self.is_ended = true;
                    }
                    continue;
                }
                Source::Stored(stored) => stored.wait(self.id).await,
            };
            match next {
                Some(source) => self.source = source,
                None => self.is_ended = true,
            }
        }
    }
}

impl Stored {
    /// Waits for the prompt's end; `None` if that takes too long.
    async fn wait(&mut self, id: PromptId) -> Option<Source> {
        while Instant::now() < self.until {
            tokio::time::sleep_until(self.next_look.into()).await;
            let looked = self.store.prompt(self.user_id, id).await;
            self.pause = (self.pause * 3 / 2).min(POLL.1);
            self.next_look = Instant::now() + self.pause;
            let end = match looked {
                Ok(Some(prompt)) => ended(prompt),
                Ok(None) => Some(End::Deleted),
                // A store that is away for a while is asked again like one that has nothing new.
                Err(error) => {
                    tracing::debug!(%error, "a running prompt could not be looked at");
                    None
                }
            };
            if let Some(end) = end {
                let mut memory = self.memory.take()?;
                memory.resize(end.text_bytes());
                return Some(known(end, memory));
            }
        }
        None
    }
}

/// The end of a stored prompt; `None` while it runs.
fn ended(prompt: Prompt) -> Option<End> {
    match prompt.status {
        PromptStatus::Running => None,
        PromptStatus::Completed => Some(End::Completed(Arc::new(prompt))),
        PromptStatus::Failed => Some(End::Failed(FailedPrompt::of(&prompt))),
    }
}

/// An answer that has ended, to be read like one that is being written.
fn known(end: End, memory: Reservation) -> Source {
    let progress = Progress {
        text: String::new(),
        end: Some(end),
        is_replaced: false,
        memory,
    };
    Source::Live(watch::channel(progress).1)
}

/// One look at an answer: the parts of a reader that it moves.
struct Step<'a> {
    id: PromptId,
    place: &'a mut Place,
    from: &'a mut Option<Place>,
    is_started: &'a mut bool,
    is_ended: &'a mut bool,
    is_replaced: &'a mut bool,
}

impl Step<'_> {
    /// The next event, if there is one yet.
    fn take(self, progress: &Progress) -> Option<Event> {
        let text = progress.text();
        let failed = matches!(progress.end, Some(End::Failed(_) | End::Deleted));
        if progress.is_replaced && !*self.is_replaced {
            *self.is_replaced = true;
            let read = std::mem::take(self.place);
            self.from.get_or_insert(read);
        }
        if let Some(from) = self.from.take() {
            *self.is_started = true;
            if from.is_in(text) {
                *self.place = from;
            } else if !failed {
                return Some(Event::Started(self.id));
            }
        }
        let rest = text.get(self.place.bytes()..).unwrap_or_default();
        if !rest.is_empty() {
            let piece = &rest[..rest.floor_char_boundary(PIECE_BYTES)];
            *self.place = self.place.after(piece);
            return Some(Event::Delta(piece.to_owned()));
        }
        let end = progress.end.as_ref()?;
        *self.is_ended = true;
        Some(match end {
            End::Completed(prompt) => Event::Completed(Arc::clone(prompt)),
            End::Failed(failed) => Event::Failed(*failed),
            End::Deleted => Event::Deleted(self.id),
        })
    }
}

#[cfg(test)]
mod tests;
