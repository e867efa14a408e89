//! Copies the write-ahead log back into the database file.
//!
//! SQLite by itself would do it inside some commit, whose caller would wait for it. Here the writer
//! does it after its callers have their results.

use std::path::PathBuf;
use std::time::Duration;

use rusqlite::Connection;

use super::connection::{Database, PAGE_SIZE, wait_for_locks};

/// Pages in the log from which it is copied back: 8 MB, some hundred small commits.
const COPY_PAGES: i64 = 1000;

/// Pages in the log from which the writer waits for readers, so that the log can start over: 64 MB.
/// Only an unbroken chain of overlapping readers lets the log grow to this.
const WAIT_PAGES: i64 = 8000;

/// How long the writer then waits for readers.
const WAIT: Duration = Duration::from_millis(250);

/// Remembers how long the log was, so that it is not copied again before it has grown.
#[derive(Debug)]
pub(super) struct Checkpointer {
    path: PathBuf,
    /// How long the connection otherwise waits for locks.
    busy_timeout: Duration,
    /// How far the database file may lag behind the log, in bytes.
    most_lag: u64,
    last: i64,
    next: i64,
}

impl Checkpointer {
    /// For a database whose file may lag behind its log by `most_lag` bytes.
    pub fn new(database: &Database, most_lag: u64) -> Self {
        Self {
            path: database.path.clone(),
            busy_timeout: database.busy_timeout,
            most_lag,
            last: 0,
            next: COPY_PAGES,
        }
    }

    /// Copies the log back if it is long, if the database file lags too far behind it, or if
    /// `at_once`. After a failure the log stays, and a later call tries again.
    pub fn after_commit(
        &mut self,
        connection: &mut Connection,
        at_once: bool,
    ) -> rusqlite::Result<()> {
        let pages = checkpoint(connection, "NOOP")?;
        if pages < self.last {
            self.next = COPY_PAGES;
        }
        self.last = pages;
        if pages < self.next && !at_once && self.lag(connection)? <= self.most_lag {
            return Ok(());
        }
        self.next = pages.saturating_add(COPY_PAGES);
        if pages < WAIT_PAGES {
            checkpoint(connection, "PASSIVE").map(drop)
        } else {
            self.truncate(connection)
        }
    }

    /// Copies and empties the log, unless another process is using it.
    pub fn finish(&self, connection: &mut Connection) {
        let _ = self.truncate(connection);
    }

    fn truncate(&self, connection: &mut Connection) -> rusqlite::Result<()> {
        let copied =
            wait_for_locks(connection, WAIT).and_then(|()| checkpoint(connection, "TRUNCATE"));
        wait_for_locks(connection, self.busy_timeout)?;
        copied.map(drop)
    }

    /// By how many bytes the database file has to grow when the log is copied.
    pub fn lag(&self, connection: &Connection) -> rusqlite::Result<u64> {
        let bytes = pages(connection)?.saturating_mul(u64::from(PAGE_SIZE));
        // A file of unknown size lags by all of it.
        let written = std::fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        Ok(bytes.saturating_sub(written))
    }
}

/// Pages that the database has, those in the log included.
pub(super) fn pages(connection: &Connection) -> rusqlite::Result<u64> {
    let pages: i64 = connection
        .prepare_cached("PRAGMA page_count")?
        .query_row([], |row| row.get(0))?;
    Ok(u64::try_from(pages).unwrap_or(0))
}

/// Copies the log in SQLite's mode of that name, and returns the number of pages in it.
fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))?
        .query_row([], |row| row.get(1))
}
