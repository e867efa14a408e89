//! The queue of the one thread that writes, and how the writes of many tasks share a commit.
//!
//! A commit waits for the disk. While it does, further operations gather in the queue; the next
//! transaction takes all of them. So the disk's delay bounds the latency of a write, but not the
//! number of writes in a second.
//!
//! On a fast disk little gathers, and then most of a write's cost is its commit. So there is a
//! commit delay: while many calls run, a transaction with fewer operations than the one before
//! waits for more, until two milliseconds after that one began. Otherwise an operation that finds
//! the writer idle is committed at once, alone. The thread is in `writer_thread`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicU64, Ordering};

use rusqlite::{Connection, ffi};
use tokio::sync::{mpsc, oneshot};

use super::error::{Closed, NotCommitted, write_failure};
use super::reserve::Reserve;
use super::writer_thread::WriterThread;
use crate::store::Error;
use crate::store::rows::Defect;
use crate::threads::ThreadGroup;

/// Operations that may wait in the queue; further callers wait for room in it.
const QUEUE: usize = 1024;

/// The most operations in one transaction. It bounds how much is lost at once when a commit fails,
/// and how long a first operation waits for the others.
pub(super) const MAX_BATCH: usize = 256;

/// How an operation left its savepoint.
pub(super) enum Ran {
    /// Its work is in the transaction.
    Done,
    /// It failed: its savepoint must be rolled back.
    Undone,
    /// SQLite cannot write: the whole transaction must be rolled back.
    CannotWrite(ffi::Error),
}

/// An operation in the queue, and its caller.
pub(super) trait Operation: Send {
    /// Does the work inside its savepoint. Only a vital operation is run again.
    fn run(&mut self, connection: &Connection) -> Ran;

    /// Whether it must succeed on a full disk: see [`Writer::write_vital`].
    fn is_vital(&self) -> bool;

    /// Sends the caller its result, once the outcome of the transaction is known.
    fn answer(self: Box<Self>, committed: Result<(), NotCommitted>);
}

struct Write<T, F> {
    work: F,
    is_vital: bool,
    result: Option<Result<T, Error>>,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<T, F> Operation for Write<T, F>
where
    T: Send,
    F: FnMut(&Connection) -> Result<T, Error> + Send,
{
    fn run(&mut self, connection: &Connection) -> Ran {
        let work = &mut self.work;
        // A panic in one operation must not end the thread that all writes need.
        let result = catch_unwind(AssertUnwindSafe(|| work(connection)))
            .unwrap_or_else(|_| Err(Defect::Panicked.into()));
        let ran = match &result {
            Ok(_) => Ran::Done,
            Err(error) => write_failure(error).map_or(Ran::Undone, Ran::CannotWrite),
        };
        self.result = Some(result);
        ran
    }

    fn is_vital(&self) -> bool {
        self.is_vital
    }

    fn answer(self: Box<Self>, committed: Result<(), NotCommitted>) {
        let result = match (self.result, committed) {
            // An operation that failed keeps its error: it changes nothing in any case.
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(error.into()),
            (Some(Ok(done)), Ok(())) => Ok(done),
            (None, Ok(())) => Err(Closed.into()),
        };
        // The caller may have left; what was written stays.
        let _ = self.reply.send(result);
    }
}

/// An operation, and the receiver of its result.
pub(super) fn operation<T, F>(
    is_vital: bool,
    work: F,
) -> (Box<dyn Operation>, oneshot::Receiver<Result<T, Error>>)
where
    T: Send + 'static,
    F: FnMut(&Connection) -> Result<T, Error> + Send + 'static,
{
    let (reply, answer) = oneshot::channel();
    let write = Write {
        work,
        is_vital,
        result: None,
        reply,
    };
    (Box::new(write), answer)
}

/// A request to the writer's thread.
pub(super) enum WriterCommand {
    /// Write.
    Run(Box<dyn Operation>),
    /// Find out whether a prompt could be stored now.
    Probe(oneshot::Sender<bool>),
    /// End once the queue is empty.
    Close,
}

/// What other threads may know of the writer's thread.
#[derive(Debug, Default)]
pub(super) struct WriterStatus {
    /// Transactions committed since the start.
    pub committed_batches: AtomicU64,
    /// Operations in them.
    pub committed_operations: AtomicU64,
    /// Calls that were begun here and are not settled.
    pub running_calls: AtomicIsize,
    /// Transactions that failed as a whole.
    pub failed_batches: AtomicU64,
    /// Whether a write failed for lack of room or another failure of the disk, and none has
    /// succeeded since.
    pub is_in_doubt: AtomicBool,
}

/// The sending end of the queue.
pub(super) struct Writer {
    queue: mpsc::Sender<WriterCommand>,
    pub status: Arc<WriterStatus>,
    reserve: Reserve,
    thread: ThreadGroup,
}

impl Writer {
    /// Starts the thread.
    pub fn start(thread: WriterThread) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writer = Self {
            queue: sender,
            status: Arc::clone(&thread.status),
            reserve: thread.reserve.clone(),
            thread: ThreadGroup::default(),
        };
        let work = move || thread.run_until_closed(receiver);
        writer.thread.spawn("store-writer".to_owned(), work)?;
        Ok(writer)
    }

    /// Runs `work` in a transaction and returns its result after the commit.
    pub async fn write<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    {
        let mut work = Some(work);
        let (operation, answer) = operation(false, move |connection: &Connection| {
            work.take().ok_or(Closed)?(connection)
        });
        self.send(WriterCommand::Run(operation), answer).await?
    }

    /// Does the same for work that must succeed on a full disk too, because it frees room or ends a
    /// credential. It may use the reserve. It is run again if its transaction failed.
    pub async fn write_vital<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnMut(&Connection) -> Result<T, Error> + Send + 'static,
    {
        let (operation, answer) = operation(true, work);
        self.send(WriterCommand::Run(operation), answer).await?
    }

    /// Whether a prompt could be stored now. Tries to write only if an earlier write or the free
    /// space on the disk puts that in doubt.
    pub async fn can_write(&self) -> Result<bool, Error> {
        let is_in_doubt = self.status.is_in_doubt.load(Ordering::Relaxed);
        if !is_in_doubt && !self.reserve.is_all_there_is() {
            return Ok(true);
        }
        let (reply, answer) = oneshot::channel();
        self.send(WriterCommand::Probe(reply), answer).await
    }

    async fn send<T>(
        &self,
        command: WriterCommand,
        answer: oneshot::Receiver<T>,
    ) -> Result<T, Error> {
        self.queue.send(command).await.map_err(|_| Closed)?;
        Ok(answer.await.map_err(|_| Closed)?)
    }

    /// Accepts no more operations, and returns when those in the queue are written and the thread
    /// has ended.
    pub async fn close(&self) {
        // This fails if the queue is closed already.
        let _ = self.queue.send(WriterCommand::Close).await;
        self.thread.joined().await;
    }

    /// Operations in the queue at the moment.
    pub fn queued(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }
}
