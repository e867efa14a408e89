//! The chunks of a streamed answer on their way from the call to its one caller.
//!
//! A chunk is passed on as soon as it is here, and is forgotten when the caller has it. What a slow
//! caller has not taken yet is accounted for in the memory budget. If that is exhausted, the
//! caller's stream ends, and the call goes on. The chunks that wait are dropped then: they are a
//! part of an answer that will not become whole, and other requests of the user need their memory.

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

impl Queue {
    fn clear(&mut self) {
        self.chunks.clear();
        self.bytes = 0;
        self.memory.resize(0);
    }
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
                queue.clear();
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
        queue.clear();
        drop(queue);
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::memory_budget::{MemoryBudget, Owner};

    /// A queue in a budget of that many bytes.
    fn queue(budget: usize) -> (ChunkSender, ChatReader, Arc<MemoryBudget>) {
        let budget = MemoryBudget::new(budget);
        let (sender, reader) = chunk_queue(budget.hold(Owner::default(), 0));
        (sender, reader, budget)
    }

    /// What is there now: `Ok` of a chunk, `Err` of the end's success.
    fn ready(reader: &mut ChatReader) -> Option<Option<Result<Bytes, bool>>> {
        let next = reader.next().now_or_never()?;
        Some(next.map(|event| match event {
            ChatEvent::Chunk(chunk) => Ok(chunk),
            ChatEvent::Ended(end) => Err(end.is_ok()),
        }))
    }

    #[test]
    fn chunks_come_in_their_order_and_then_the_first_end_and_then_nothing() {
        let (sender, mut reader, budget) = queue(1 << 20);
        assert_eq!(ready(&mut reader), None);
        sender.push(b"one");
        assert_eq!(ready(&mut reader), Some(Some(Ok("one".into()))));
        assert_eq!(ready(&mut reader), None);
        sender.push(b"two");
        sender.push(b"three");
        assert_eq!(budget.held(), 8);
        sender.end(Ok(()));
        sender.end(Err(Error::internal("later")));
        sender.push(b"later");
        assert_eq!(ready(&mut reader), Some(Some(Ok("two".into()))));
        assert_eq!(budget.held(), 5);
        assert_eq!(ready(&mut reader), Some(Some(Ok("three".into()))));
        assert_eq!(ready(&mut reader), Some(Some(Err(true))));
        assert_eq!(ready(&mut reader), Some(None));
        assert_eq!(ready(&mut reader), Some(None));
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_woken_by_a_chunk_and_by_the_end() {
        let (sender, mut reader, _budget) = queue(1 << 20);
        let (chunk, ()) = tokio::join!(reader.next(), async { sender.push(b"one") });
        assert!(matches!(chunk, Some(ChatEvent::Chunk(chunk)) if chunk == "one"));
        let (end, ()) = tokio::join!(reader.next(), async { sender.end(Ok(())) });
        assert!(matches!(end, Some(ChatEvent::Ended(Ok(())))));
    }

    #[test]
    fn a_reader_too_far_behind_gets_an_error_and_holds_nothing() {
        let (sender, mut reader, budget) = queue(1 << 20);
        let chunk = vec![b'x'; 100 << 10];
        let mut most = 0;
        for _ in 0..100 {
            sender.push(&chunk);
            most = budget.held().max(most);
        }
        assert!((chunk.len()..=1 << 20).contains(&most), "{most}");
        assert_eq!(budget.held(), 0);
        // The call ends well, which this reader must not be told: it lacks chunks.
        sender.end(Ok(()));
        let end = reader.next().now_or_never().unwrap();
        assert!(matches!(
            end,
            Some(ChatEvent::Ended(Err(Error::Overloaded(_))))
        ));
        assert_eq!(ready(&mut reader), Some(None));
    }

    #[test]
    fn a_reader_that_leaves_is_noticed_once_and_frees_its_memory() {
        let (sender, reader, budget) = queue(1 << 20);
        sender.push(b"one");
        assert_eq!(sender.abandoned().now_or_never(), None);
        drop(reader);
        assert_eq!(budget.held(), 0);
        sender.push(b"two");
        assert_eq!(budget.held(), 0);
        assert_eq!(sender.abandoned().now_or_never(), Some(()));
        sender.end(Ok(()));
    }
}
