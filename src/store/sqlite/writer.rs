//! The queue before the one thread that writes, and how the writes of many tasks share a commit.
//!
//! A commit waits for the disk. While it does, further operations gather in the queue; the next
//! transaction takes all of them, so that the disk's delay bounds the latency of a write but not
//! their number in a second. There is no artificial delay: an operation that finds the writer idle
//! is committed at once, alone. `worker` is the thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use rusqlite::{Connection, ffi};
use tokio::sync::{mpsc, oneshot};

use super::error::{Closed, Defect, Failure, NotCommitted};
use super::reserve::Reserve;
use super::worker::Worker;
use crate::store::Error;

/// Operations that may wait for the writer; further callers wait for a place.
const QUEUE: usize = 1024;

/// The most operations in one transaction: bounds how much is lost at once when a commit fails, and how long a first
/// operation waits for the others'.
pub(super) const MAX_BATCH: usize = 256;

/// How an operation left its savepoint.
pub(super) enum Ran {
    /// Its work is in the transaction.
    Done,
    /// It refused or failed by itself: its savepoint must be rolled back.
    Undone,
    /// SQLite cannot write: the whole transaction must be given up.
    CannotWrite(ffi::Error),
}

/// An operation that has yet to be written, and its caller.
pub(super) trait Operation: Send {
    /// Does the work inside a savepoint of its own. Only a vital operation is run again.
    fn run(&mut self, connection: &Connection) -> Ran;

    /// Whether it must succeed on a full disk: see [`Writer::write_vital`].
    fn is_vital(&self) -> bool;

    /// Sends the caller its result, once the fate of the transaction is known.
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
    F: FnMut(&Connection) -> Result<T, Failure> + Send,
{
    fn run(&mut self, connection: &Connection) -> Ran {
        let work = &mut self.work;
        // A defect in one operation must not end the thread that all writes need.
        let result = catch_unwind(AssertUnwindSafe(|| work(connection)))
            .unwrap_or_else(|_| Err(Defect::Panicked.into()));
        let ran = match &result {
            Ok(_) => Ran::Done,
            Err(failure) => failure.cannot_write().map_or(Ran::Undone, Ran::CannotWrite),
        };
        self.result = Some(result.map_err(Error::from));
        ran
    }

    fn is_vital(&self) -> bool {
        self.is_vital
    }

    fn answer(self: Box<Self>, committed: Result<(), NotCommitted>) {
        let result = match (self.result, committed) {
            // An operation that failed by itself keeps its own error: it was to change nothing in
            // any case.
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(error.into()),
            (Some(Ok(done)), Ok(())) => Ok(done),
            (None, Ok(())) => Err(Closed.into()),
        };
        // Without a receiver the caller is gone; what was written stays.
        let _ = self.reply.send(result);
    }
}

/// An operation, and where its result comes.
pub(super) fn operation<T, F>(
    is_vital: bool,
    work: F,
) -> (Box<dyn Operation>, oneshot::Receiver<Result<T, Error>>)
where
    T: Send + 'static,
    F: FnMut(&Connection) -> Result<T, Failure> + Send + 'static,
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

/// What the writer's thread is asked for.
pub(super) enum Command {
    /// To write.
    Run(Box<dyn Operation>),
    /// To find out whether a prompt could be stored now.
    Probe(oneshot::Sender<bool>),
    /// To end once the queue is empty.
    Close,
}

/// What the writer's thread lets others see.
#[derive(Debug, Default)]
pub(super) struct WriterStatus {
    /// Transactions committed since the start.
    pub committed_batches: AtomicU64,
    /// Operations in them.
    pub committed_operations: AtomicU64,
    /// Transactions that failed as a whole.
    pub failed_batches: AtomicU64,
    /// Whether a write failed for want of room or another reason of the disk, and none has shown
    /// since that it passed.
    pub is_in_doubt: AtomicBool,
}

/// The sending end of the queue before the writer's thread.
pub(super) struct Writer {
    queue: mpsc::Sender<Command>,
    status: Arc<WriterStatus>,
    reserve: Reserve,
}

impl Writer {
    /// Starts the thread.
    pub fn start(worker: Worker) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writer = Self {
            queue: sender,
            status: worker.status(),
            reserve: worker.reserve(),
        };
        let thread = thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || worker.work_off(receiver))?;
        Ok((writer, thread))
    }

    /// Runs `work` in a transaction and returns its result after the commit.
    pub async fn write<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    {
        let mut work = Some(work);
        let (operation, answer) = operation(false, move |connection: &Connection| {
            let work = work.take().ok_or(Error::from(Closed))?;
            work(connection)
        });
        self.send(Command::Run(operation), answer).await?
    }

    /// The same for work that must succeed on a full disk too, because it frees room or ends a
    /// credential. It may use the reserve. It is run again if the transaction failed that it was
    /// part of.
    pub async fn write_vital<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnMut(&Connection) -> Result<T, Failure> + Send + 'static,
    {
        let (operation, answer) = operation(true, work);
        self.send(Command::Run(operation), answer).await?
    }

    /// Whether a prompt could be stored now. Tries to write only if an earlier write or the room on
    /// the disk leaves that in doubt.
    pub async fn can_write(&self) -> Result<bool, Error> {
        let is_in_doubt = self.status.is_in_doubt.load(Ordering::Relaxed);
        if !is_in_doubt && !self.reserve.is_all_there_is() {
            return Ok(true);
        }
        let (reply, answer) = oneshot::channel();
        self.send(Command::Probe(reply), answer).await
    }

    async fn send<T>(&self, command: Command, answer: oneshot::Receiver<T>) -> Result<T, Error> {
        self.queue.send(command).await.map_err(|_| Closed)?;
        Ok(answer.await.map_err(|_| Closed)?)
    }

    /// Takes no more operations; those queued are still written. Then the thread ends.
    pub async fn close(&self) {
        // A queue that is closed already is what is wanted.
        let _ = self.queue.send(Command::Close).await;
    }

    /// Operations in the queue just now.
    pub fn queued(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    pub fn status(&self) -> &WriterStatus {
        &self.status
    }
}
