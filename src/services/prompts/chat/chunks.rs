//! The chunks of a streamed answer on their way from the call to its one caller.
//!
//! A chunk is passed on as soon as it is here, and is forgotten when the caller has it. What a slow
//! caller has not taken yet is accounted for in the memory budget. If that is exhausted, the
//! caller's stream ends, and the call goes on.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::error::Error;
use crate::memory_budget::Reservation;

/// What a reader of a streamed answer gets.
#[derive(Debug)]
pub enum ChatEvent {
    /// The next JSON object, as the upstream sent it.
    Chunk(Bytes),
    /// The last event. `Ok`: the answer is whole and stored.
    Ended(Result<(), Error>),
}

#[derive(Debug)]
struct Queue {
    chunks: VecDeque<Bytes>,
    /// Bytes of the chunks, and their account.
    bytes: usize,
    memory: Reservation,
    end: Option<Result<(), Error>>,
    /// Nothing is put in any more: there is an end, or the reader has left.
    is_closed: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Wakes the reader.
    filled: Notify,
    /// Wakes who waits for the reader to leave.
    left: Notify,
}

/// Puts chunks in.
#[derive(Clone, Debug)]
pub struct ChunkSender(Arc<Shared>);

/// Takes chunks out.
#[derive(Debug)]
pub struct ChatReader(Arc<Shared>);

/// A queue of chunks. `memory` is empty at first.
pub fn chunk_queue(memory: Reservation) -> (ChunkSender, ChatReader) {
    let shared = Arc::new(Shared {
        queue: Mutex::new(Queue {
            chunks: VecDeque::new(),
            bytes: 0,
            memory,
            end: None,
            is_closed: false,
        }),
        filled: Notify::new(),
        left: Notify::new(),
    });
    (ChunkSender(Arc::clone(&shared)), ChatReader(shared))
}

impl ChunkSender {
    /// Passes a chunk on.
    pub fn push(&self, chunk: &[u8]) {
        let mut queue = self.0.queue.lock();
        if queue.is_closed {
            return;
        }
        match queue.memory.try_grow(chunk.len()) {
            Ok(()) => {
                queue.bytes += chunk.len();
                queue.chunks.push_back(Bytes::copy_from_slice(chunk));
            }
            Err(exhausted) => {
                queue.end = Some(Err(exhausted.into()));
                queue.is_closed = true;
            }
        }
        drop(queue);
        self.0.filled.notify_one();
    }

    /// Ends the stream. Later calls change nothing.
    pub fn end(&self, result: Result<(), Error>) {
        let mut queue = self.0.queue.lock();
        if !queue.is_closed {
            queue.end = Some(result);
            queue.is_closed = true;
        }
        drop(queue);
        self.0.filled.notify_one();
    }

    /// Waits until the reader has left. Cancel safe.
    pub async fn abandoned(&self) {
        self.0.left.notified().await;
    }
}

impl ChatReader {
    /// The next event; `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Option<ChatEvent> {
        loop {
            {
                let mut queue = self.0.queue.lock();
                if let Some(chunk) = queue.chunks.pop_front() {
                    queue.bytes -= chunk.len();
                    let left = queue.bytes;
                    queue.memory.resize(left);
                    return Some(ChatEvent::Chunk(chunk));
                }
                if let Some(end) = queue.end.take() {
                    return Some(ChatEvent::Ended(end));
                }
                if queue.is_closed {
                    return None;
                }
            }
            // A permit is kept if the queue was filled in between.
            self.0.filled.notified().await;
        }
    }
}

impl Drop for ChatReader {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock();
        queue.is_closed = true;
        queue.chunks.clear();
        queue.bytes = 0;
        queue.memory.resize(0);
        drop(queue);
        self.0.left.notify_one();
    }
}
