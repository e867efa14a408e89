//! When the write-ahead log is copied back into the database file.
//!
//! SQLite would do it inside some commit, whose caller then waits for it. Here the writer does it after its callers have
//! their answers.

use std::time::Duration;

use rusqlite::Connection;

use super::connection::wait_for_locks;

/// Pages in the log from which it is copied back: 8 MB, some hundred small commits.
const COPY_PAGES: i64 = 1000;

/// Pages in the log from which the writer waits for readers, so that the log can start over: 64 MB. Only an unbroken chain
/// of overlapping readers lets it come to this.
const WAIT_PAGES: i64 = 8000;

/// How long the writer then waits for them.
const WAIT: Duration = Duration::from_millis(250);

/// Remembers how long the log was, so as not to try again before it has grown.
#[derive(Debug)]
pub(super) struct Checkpointer {
    /// How long the connection otherwise waits for locks.
    busy_timeout: Duration,
    last: i64,
    next: i64,
}

impl Checkpointer {
    pub fn new(busy_timeout: Duration) -> Self {
        Self {
            busy_timeout,
            last: 0,
            next: COPY_PAGES,
        }
    }

    /// Copies the log back if it is long. A failure is no one's: the log stays, and a later call tries again.
    pub fn after_commit(&mut self, connection: &mut Connection) {
        let Ok(pages) = checkpoint(connection, "NOOP") else {
            return;
        };
        if pages < self.last {
            self.next = COPY_PAGES;
        }
        self.last = pages;
        if pages < self.next {
            return;
        }
        self.next = pages.saturating_add(COPY_PAGES);
        if pages < WAIT_PAGES {
            let _ = checkpoint(connection, "PASSIVE");
        } else {
            self.truncate(connection);
        }
    }

    /// Leaves an empty log behind, unless another process is using it.
    pub fn finish(&self, connection: &mut Connection) {
        self.truncate(connection);
    }

    fn truncate(&self, connection: &mut Connection) {
        let _ = wait_for_locks(connection, WAIT).and_then(|()| checkpoint(connection, "TRUNCATE"));
        let _ = wait_for_locks(connection, self.busy_timeout);
    }
}

/// Answers the pages in the log.
fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))?
        .query_row([], |row| row.get(1))
}
