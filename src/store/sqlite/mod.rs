//! The embedded store: one SQLite file in write-ahead mode.
//!
//! One thread writes, and the writes of many tasks share a commit (`writer`). A few threads read
//! (`reader`), so that readers and the writer never wait for each other and none of this runs on
//! the async threads. Other processes may use the same file at the same time. Some room on the disk
//! is kept in reserve (`reserve`) for the writes that must succeed when the disk is full
//! (`writer_thread`).

mod accounts;
mod api_keys;
mod backup;
mod bulk;
mod calls;
mod chats;
mod checkpoint;
mod connection;
mod error;
mod inspect;
mod migrate;
mod open;
mod prompts;
mod reader;
mod reserve;
mod statements;
mod usage;
mod vectors;
mod writer;
mod writer_thread;

use std::fmt;
use std::path::Path;
use std::time::Duration;

use self::connection::Database;
use self::reader::Readers;
use self::reserve::Reserve;
use self::writer::Writer;
use self::writer_thread::WriterThread;
use super::{PromptStore, sql_limit};

pub use self::backup::{BackupError, Copied, backup, backup_bytes};
pub use self::inspect::{FileState, count_rows, inspect};
pub use self::open::OpenError;

/// How the store uses its file.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Threads that read, at least 1. Each caches up to 1 MiB of pages.
    pub readers: usize,
    /// How long a write, or the opening, waits for another process's lock before it fails.
    pub busy_timeout: Duration,
    /// The most pages of 8 KiB that the file may have; a write beyond it is `Unavailable`. `None`:
    /// as many as the disk has room for.
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

/// [`AccountStore`](super::AccountStore), [`PromptStore`] and
/// [`CallStore`](super::CallStore) over one SQLite file.
///
/// Dropping it without [`close`](Self::close) loses nothing that was acknowledged: its threads end
/// by themselves soon after.
pub struct SqliteStore {
    writer: Writer,
    readers: Readers,
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SqliteStore")
            .field(&PromptStore::stats(self))
            .finish()
    }
}

impl SqliteStore {
    /// Opens the file, creates it (with mode 0600) if it is missing, and applies the migrations it
    /// lacks. Blocks; safe when several processes open the same file at once.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, OpenError> {
        let database = Database::at(path, options)?;
        let reserve = Reserve::of(&database.path);
        let connection = match open::open_writer(&database) {
            // Opening creates the files of the log, which closing has removed.
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
        let readers = Readers::start(&database, connections).map_err(failed)?;
        let thread = WriterThread::new(database, connection, reserve);
        let writer = Writer::start(thread).map_err(failed)?;
        Ok(Self { writer, readers })
    }

    /// Closes the store: queued operations are still done, later calls are `Unavailable`. When this
    /// returns, the threads have ended and no log is left beside the file, unless another process
    /// uses it. Calling it again does nothing. Needs a Tokio runtime.
    pub async fn close(&self) {
        // The readers have ended before the writer does: SQLite removes the log with the last
        // connection, and of two that close at the same time each takes the other for one that
        // stays open.
        self.readers.close().await;
        self.writer.close().await;
    }
}
