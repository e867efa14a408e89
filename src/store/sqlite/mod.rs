//! The embedded store: one SQLite file in write-ahead mode.
//!
//! One thread writes and lets the writes of many tasks share a commit (`writer`), a few threads
//! read (`reader`), so that readers and the writer never wait for each other and nothing of it runs
//! on the async threads. Other processes may use the same file at the same time. Some room on the
//! disk is held back (`reserve`) for the writes that must succeed when the disk is full (`worker`).

mod accounts;
mod backup;
mod bulk;
mod calls;
mod checkpoint;
mod connection;
mod error;
mod inspect;
mod migrate;
mod open;
mod prompts;
mod reader;
mod reserve;
mod vectors;
mod worker;
mod writer;

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use self::connection::Database;
use self::reader::Readers;
use self::reserve::Reserve;
use self::worker::Worker;
use self::writer::Writer;
use super::Stats;

pub use self::backup::{BackupError, Copied, backup, backup_bytes};
pub use self::inspect::{FileState, count_rows, inspect};
pub use self::open::OpenError;

/// How the store uses its file.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Threads that read, at least 1. Each keeps up to 1 MiB of pages.
    pub readers: usize,
    /// How long a write, or the opening, waits for another process's lock before it fails.
    pub busy_timeout: Duration,
    /// The most pages of 8 KiB the file may grow to; a write beyond it is `Unavailable`. `None`: as the disk has room.
    pub max_pages: Option<u32>,
}

impl Default for OpenOptions {
    /// 4 readers, 5 s, unbounded.
    fn default() -> Self {
        Self {
            readers: 4,
            busy_timeout: Duration::from_secs(5),
            max_pages: None,
        }
    }
}

/// [`AccountStore`](super::AccountStore), [`PromptStore`](super::PromptStore) and [`CallStore`](super::CallStore) over one SQLite file.
///
/// Dropping it without [`close`](Self::close) loses nothing that was answered: its threads end by themselves soon after.
pub struct SqliteStore {
    writer: Writer,
    readers: Readers,
    reading: Mutex<Vec<JoinHandle<()>>>,
    writing: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SqliteStore").field(&self.stats()).finish()
    }
}

impl SqliteStore {
    /// Opens the file, creates it (for its owner only, mode 0600) if it is missing, and applies the migrations it lacks.
    /// Blocks; safe when several processes open the same file at once.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, OpenError> {
        let database = Database {
            path: std::path::absolute(path)?,
            busy_timeout: options.busy_timeout,
            max_pages: options.max_pages,
        };
        let reserve = Reserve::of(&database.path);
        let connection = match open::open_writer(&database) {
            // Opening makes the log's files, which a stop has removed.
            Err(OpenError::NoRoom(_)) => {
                reserve.release();
                open::open_writer(&database)?
            }
            opened => opened?,
        };
        let connections = (0..options.readers.max(1))
            .map(|_| database.reader())
            .collect::<rusqlite::Result<_>>()?;
        let failed = |error| OpenError::Failed(Box::new(error));
        let (readers, reading) = Readers::start(&database, connections).map_err(failed)?;
        let worker = Worker::new(database, connection, reserve);
        let (writer, writing) = Writer::start(worker).map_err(failed)?;
        Ok(Self {
            writer,
            readers,
            reading: Mutex::new(reading),
            writing: Mutex::new(vec![writing]),
        })
    }

    /// Ends the store: what is queued is still done, later calls are `Unavailable`, the threads have ended when this returns,
    /// and no log is left beside the file unless another process uses it. Calling it again does nothing. Needs a Tokio
    /// runtime.
    pub async fn close(&self) {
        // The readers first, to the end: SQLite removes the log with the last connection, and two that close at the same
        // time each take the other for one that stays.
        self.readers.close();
        join(&self.reading).await;
        self.writer.close().await;
        join(&self.writing).await;
    }

    /// The counters as they are now.
    pub fn stats(&self) -> Stats {
        let status = self.writer.status();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            queued_writes: self.writer.queued(),
            queued_reads: self.readers.queued(),
            committed_batches: load(&status.committed_batches),
            committed_operations: load(&status.committed_operations),
            failed_batches: load(&status.failed_batches),
        }
    }
}

/// Waits for the threads off the async threads.
async fn join(threads: &Mutex<Vec<JoinHandle<()>>>) {
    let threads = std::mem::take(&mut *threads.lock().unwrap_or_else(PoisonError::into_inner));
    let joined = tokio::task::spawn_blocking(move || {
        for thread in threads {
            // A thread that panicked has ended too.
            let _ = thread.join();
        }
    });
    // Only a runtime that is going down itself cancels the wait.
    let _ = joined.await;
}

/// A count for a `LIMIT` clause.
fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
