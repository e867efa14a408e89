//! The one thread that writes, and how the writes of many tasks share a commit.
//!
//! A commit waits for the disk. While it does, further operations gather in the queue; the next transaction takes all of
//! them, so that the disk's delay bounds the latency of a write but not their number in a second. There is no artificial
//! delay: an operation that finds the writer idle is committed at once, alone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, ffi};
use tokio::sync::{mpsc, oneshot};

use super::checkpoint::Checkpointer;
use super::connection::Database;
use super::error::{Closed, Defect, Failure, NotCommitted};
use crate::store::Error;

/// Operations that may wait for the writer; further callers wait for a place.
const QUEUE: usize = 1024;

/// The most operations in one transaction: bounds how much is lost at once when a commit fails, and how long a first
/// operation waits for the others'.
pub(super) const MAX_BATCH: usize = 256;

/// One transaction of the writer, as told to the observer.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// How many operations shared it; from 1 to 256.
    pub operations: usize,
    /// From taking them off the queue to the end of the commit, waiting for other processes' locks included.
    pub duration: Duration,
    /// `false` if it was rolled back and every one of its operations answered `Unavailable`.
    pub committed: bool,
}

/// Called on the writer's thread after each transaction and before its callers are answered: it must be quick.
pub type BatchObserver = Arc<dyn Fn(&Batch) + Send + Sync>;

/// An operation that has yet to be written, and its caller.
trait Operation: Send {
    /// Does the work inside a savepoint of its own. `false`: the savepoint must be rolled back.
    fn run(&mut self, connection: &Connection) -> bool;

    /// Answers the caller, once the fate of the transaction is known.
    fn answer(self: Box<Self>, committed: Result<(), NotCommitted>);
}

struct Write<T, F> {
    work: Option<F>,
    result: Result<T, Error>,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<T, F> Operation for Write<T, F>
where
    T: Send,
    F: FnOnce(&Connection) -> Result<T, Failure> + Send,
{
    fn run(&mut self, connection: &Connection) -> bool {
        if let Some(work) = self.work.take() {
            // A defect in one operation must not end the thread that all writes need.
            self.result = catch_unwind(AssertUnwindSafe(|| work(connection)))
                .unwrap_or_else(|_| Err(Defect::Panicked.into()))
                .map_err(Error::from);
        }
        self.result.is_ok()
    }

    fn answer(self: Box<Self>, committed: Result<(), NotCommitted>) {
        let result = match committed {
            Ok(()) => self.result,
            // An operation that failed by itself keeps its own answer: it was to change nothing in any case.
            Err(error) if self.work.is_some() || self.result.is_ok() => Err(error.into()),
            Err(_) => self.result,
        };
        // Without a receiver the caller is gone; what was written stays.
        let _ = self.reply.send(result);
    }
}

enum Command {
    Run(Box<dyn Operation>),
    Close,
}

/// Totals of the writer since it was started.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub committed_batches: AtomicU64,
    pub committed_operations: AtomicU64,
    pub failed_batches: AtomicU64,
}

/// The sending end of the queue before the writer's thread.
pub(super) struct Writer {
    queue: mpsc::Sender<Command>,
    totals: Arc<Totals>,
}

impl Writer {
    /// Starts the thread on an open connection.
    pub fn start(
        database: Database,
        connection: Connection,
        observer: Option<BatchObserver>,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let totals = Arc::new(Totals::default());
        let worker = Worker {
            checkpointer: Checkpointer::new(database.busy_timeout),
            database,
            connection: Some(connection),
            observer,
            totals: Arc::clone(&totals),
        };
        let thread = thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || worker.work_off(receiver))?;
        let writer = Self {
            queue: sender,
            totals,
        };
        Ok((writer, thread))
    }

    /// Runs `work` in a transaction and answers after its commit.
    pub async fn write<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let operation = Write {
            work: Some(work),
            result: Err(Closed.into()),
            reply,
        };
        self.queue
            .send(Command::Run(Box::new(operation)))
            .await
            .map_err(|_| Closed)?;
        answer.await.unwrap_or_else(|_| Err(Closed.into()))
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

    pub fn totals(&self) -> &Totals {
        &self.totals
    }
}

/// What the writer's thread owns.
struct Worker {
    database: Database,
    /// `None` after a failure that may have left the connection in doubt; the next transaction opens another.
    connection: Option<Connection>,
    checkpointer: Checkpointer,
    observer: Option<BatchObserver>,
    totals: Arc<Totals>,
}

impl Worker {
    fn work_off(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut commands = Vec::with_capacity(MAX_BATCH);
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while queue.blocking_recv_many(&mut commands, MAX_BATCH) > 0 {
            for command in commands.drain(..) {
                match command {
                    Command::Run(operation) => batch.push(operation),
                    Command::Close => queue.close(),
                }
            }
            if !batch.is_empty() {
                self.write(&mut batch);
            }
        }
        if let Some(mut connection) = self.connection {
            self.checkpointer.finish(&mut connection);
        }
    }

    fn write(&mut self, batch: &mut Vec<Box<dyn Operation>>) {
        let began = Instant::now();
        let outcome = self.commit(batch).map_err(NotCommitted::new);
        let report = Batch {
            operations: batch.len(),
            duration: began.elapsed(),
            committed: outcome.is_ok(),
        };
        if report.committed {
            let operations = u64::try_from(report.operations).unwrap_or(u64::MAX);
            let totals = &self.totals;
            totals.committed_batches.fetch_add(1, Ordering::Relaxed);
            totals
                .committed_operations
                .fetch_add(operations, Ordering::Relaxed);
        } else {
            self.totals.failed_batches.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(observer) = &self.observer {
            observer(&report);
        }
        for operation in batch.drain(..) {
            operation.answer(outcome.clone());
        }
        if let Some(connection) = &mut self.connection {
            self.checkpointer.after_commit(connection);
        }
    }

    /// Writes the operations in one transaction. After an error none of them has happened.
    fn commit(&mut self, batch: &mut [Box<dyn Operation>]) -> rusqlite::Result<()> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.database.writer()?,
        };
        let outcome = transact(&connection, batch);
        let keep = match &outcome {
            Ok(()) => true,
            // Another process held the lock for longer than we wait. Nothing was begun.
            Err(error) => {
                error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && connection.is_autocommit()
            }
        };
        // Otherwise the connection is dropped, which rolls back. A new one begins with what the file says, whatever the
        // failure left in this one's caches.
        if keep {
            self.connection = Some(connection);
        }
        outcome
    }
}

fn transact(connection: &Connection, batch: &mut [Box<dyn Operation>]) -> rusqlite::Result<()> {
    let run = |sql| connection.prepare_cached(sql)?.execute([]);
    // IMMEDIATE takes the write lock first: the only place that waits for other processes.
    run("BEGIN IMMEDIATE")?;
    for operation in batch {
        run("SAVEPOINT operation")?;
        if !operation.run(connection) {
            if connection.is_autocommit() {
                // Some failures (no room, no memory) end the whole transaction, the earlier operations included.
                return Err(rusqlite::Error::SqliteFailure(
                    ffi::Error::new(ffi::SQLITE_ABORT_ROLLBACK),
                    None,
                ));
            }
            run("ROLLBACK TO operation")?;
        }
        run("RELEASE operation")?;
    }
    run("COMMIT")?;
    Ok(())
}
