//! Reads one answer: as it arrives, or from the store once it is whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{Progress, ReaderCount, StreamEnd, StreamOffset};
use crate::domain::{Prompt, PromptId, PromptStatus, UserId};
use crate::error::FailedPrompt;
use crate::memory_budget::Reservation;
use crate::store::PromptStore;

/// The most bytes of text in one event.
pub(super) const PIECE_BYTES: usize = 4 << 10;
/// The pause between two reads of a prompt that another process runs, at first and at most.
const POLL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// How long a reader waits for another process's answer. A call takes less, and a client may
/// connect again.
const POLL_FOR: Duration = Duration::from_secs(900);

/// What a reader returns.
#[derive(Clone, Debug)]
pub enum StreamEvent {
    /// The text starts here. Text that was read before is void.
    Started(PromptId),
    /// The next piece of the text.
    Delta(String),
    /// The last event.
    Ended(StreamEnd),
}

/// Where a reader takes the text from.
enum Source {
    /// This process.
    Live(watch::Receiver<Progress>),
    /// The store, which has the text once it is whole.
    Stored(Poll),
}

/// Waits for the end of a prompt that another process runs.
struct Poll {
    store: Arc<dyn PromptStore>,
    user_id: UserId,
    id: PromptId,
    pause: Duration,
    /// An instant rather than a length, because `wait` may be cancelled and called again.
    next_look: Instant,
    until: Instant,
    /// Accounts for the prompt's texts; `None` once it has been passed on.
    memory: Option<Reservation>,
}

/// What a reader has read.
struct Cursor {
    id: PromptId,
    offset: StreamOffset,
    /// An offset that the client reached before, not yet compared with the text.
    resume_from: Option<StreamOffset>,
    is_started: bool,
    is_ended: bool,
    /// Whether the text was compared with what was read after another process replaced it.
    is_replaced: bool,
}

/// Reads one answer.
pub struct StreamReader {
    cursor: Cursor,
    source: Source,
    /// Keeps the answer from counting as abandoned.
    _count: Option<ReaderCount>,
}

impl StreamReader {
    /// Reads the answer to a prompt that this process runs. `count` counts this reader.
    pub(super) fn live(
        id: PromptId,
        from: Option<StreamOffset>,
        progress: watch::Receiver<Progress>,
        count: ReaderCount,
    ) -> Self {
        Self {
            cursor: Cursor::new(id, from),
            source: Source::Live(progress),
            _count: Some(count),
        }
    }

    /// Reads a stored prompt: at once if it has ended, else when another process has ended it.
    /// `memory` accounts for the prompt's texts.
    pub fn stored(
        prompt: Prompt,
        from: Option<StreamOffset>,
        store: Arc<dyn PromptStore>,
        memory: Reservation,
    ) -> Self {
        let (id, user_id) = (prompt.id, prompt.user_id);
        let source = match end_of(prompt) {
            Some(end) => Source::ended(end, memory),
            None => Source::Stored(Poll {
                store,
                user_id,
                id,
                pause: POLL.0,
                next_look: Instant::now() + POLL.0,
                until: Instant::now() + POLL_FOR,
                memory: Some(memory),
            }),
        };
        Self {
            cursor: Cursor::new(id, from),
            source,
            _count: None,
        }
    }

    /// Whether another process runs the prompt, so that waiting here does not bring its end nearer.
    pub fn is_of_another(&self) -> bool {
        matches!(self.source, Source::Stored(_))
    }

    /// The offset after the latest event.
    pub fn offset(&self) -> StreamOffset {
        self.cursor.offset
    }

    /// The next event; `None` after the last, or when another process's answer has taken too long.
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<StreamEvent> {
        loop {
            if let Some(event) = self.cursor.start() {
                return Some(event);
            }
            if self.cursor.is_ended {
                return None;
            }
            match &mut self.source {
                Source::Live(progress) => {
                    let event = self.cursor.advance(&progress.borrow_and_update());
                    if event.is_some() {
                        return event;
                    }
                    // An error means that the call's task panicked: no more text will come.
                    self.cursor.is_ended = progress.changed().await.is_err();
                }
                Source::Stored(poll) => match poll.wait().await {
                    Some(source) => self.source = source,
                    None => self.cursor.is_ended = true,
                },
            }
        }
    }
}

impl Source {
    /// An answer that has ended, read like one that arrives.
    fn ended(end: StreamEnd, memory: Reservation) -> Self {
        let progress = Progress {
            text: String::new(),
            end: Some(end),
            is_replaced: false,
            memory,
        };
        Self::Live(watch::channel(progress).1)
    }
}

impl Poll {
    /// Waits for the prompt's end; `None` if that takes too long. Cancel safe.
    async fn wait(&mut self) -> Option<Source> {
        while Instant::now() < self.until {
            tokio::time::sleep_until(self.next_look.into()).await;
            let prompt = self.store.prompt(self.user_id, self.id).await;
            self.pause = (self.pause * 3 / 2).min(POLL.1);
            self.next_look = Instant::now() + self.pause;
            let end = match prompt {
                Ok(Some(prompt)) => end_of(prompt),
                Ok(None) => Some(StreamEnd::Deleted(self.id)),
                // A store that is unavailable is read again, like one that has nothing new.
                Err(error) => {
                    tracing::debug!(%error, "a running prompt could not be read");
                    None
                }
            };
            if let Some(end) = end {
                let mut memory = self.memory.take()?;
                memory.resize(end.text_bytes());
                return Some(Source::ended(end, memory));
            }
        }
        None
    }
}

/// How a stored prompt ended; `None` while it runs.
fn end_of(prompt: Prompt) -> Option<StreamEnd> {
    match prompt.status {
        PromptStatus::Running => None,
        PromptStatus::Completed => Some(StreamEnd::Completed(Arc::new(prompt))),
        PromptStatus::Failed => Some(StreamEnd::Failed(FailedPrompt::of(&prompt))),
    }
}

impl Cursor {
    fn new(id: PromptId, from: Option<StreamOffset>) -> Self {
        Self {
            id,
            offset: StreamOffset::default(),
            resume_from: from.filter(|from| *from != StreamOffset::default()),
            // A client that has reached the beginning knows the id.
            is_started: from == Some(StreamOffset::default()),
            is_ended: false,
            is_replaced: false,
        }
    }

    /// `Started`, if it is due before any text is known.
    fn start(&mut self) -> Option<StreamEvent> {
        if self.is_started || self.resume_from.is_some() {
            return None;
        }
        self.is_started = true;
        Some(StreamEvent::Started(self.id))
    }

    /// The next event, if `progress` has one.
    fn advance(&mut self, progress: &Progress) -> Option<StreamEvent> {
        let text = progress.text();
        let has_answer = !matches!(
            progress.end,
            Some(StreamEnd::Failed(_) | StreamEnd::Deleted(_))
        );
        if progress.is_replaced && !self.is_replaced {
            self.is_replaced = true;
            let read = std::mem::take(&mut self.offset);
            self.resume_from.get_or_insert(read);
        }
        if let Some(from) = self.resume_from.take() {
            self.is_started = true;
            if from.is_in(text) {
                self.offset = from;
            } else if has_answer {
                return Some(StreamEvent::Started(self.id));
            }
        }
        let rest = text.get(self.offset.bytes()..).unwrap_or_default();
        if !rest.is_empty() {
            let piece = &rest[..rest.floor_char_boundary(PIECE_BYTES)];
            self.offset = self.offset.after(piece);
            return Some(StreamEvent::Delta(piece.to_owned()));
        }
        let end = progress.end.clone()?;
        self.is_ended = true;
        Some(StreamEvent::Ended(end))
    }
}
