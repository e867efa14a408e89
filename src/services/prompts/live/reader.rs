//! One who reads an answer: as it is written, or from the store once it is whole.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{Attendance, End, Place, Progress};
use crate::domain::{Prompt, PromptId, PromptStatus, UserId};
use crate::error::FailedPrompt;
use crate::memory_budget::Reservation;
use crate::store::PromptStore;

/// The most bytes of text in one piece.
pub(super) const PIECE_BYTES: usize = 4 << 10;
/// How long the store is left alone between two looks at a prompt that another process answers, at first and at most.
const POLL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// How long a reader waits for another process's answer. A call does not take as long, and a reader may come again.
const PATIENCE: Duration = Duration::from_secs(900);

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
    /// Reads an answer that this process is writing. `attendance` counts this reader.
    pub(super) fn live(
        id: PromptId,
        from: Option<Place>,
        progress: watch::Receiver<Progress>,
        attendance: Attendance,
    ) -> Self {
        Self {
            _attendance: Some(attendance),
            ..Self::new(id, from, Source::Live(progress))
        }
    }

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
