//! The thread that writes: it commits many operations in one transaction, and handles a full disk.
//!
//! The thread is *short of room* while the reserve is not whole. Then the database file does not
//! grow, because growth would take the room that the log needs. Writes go on as far as the pages
//! suffice that deletions have freed, each in a separate transaction, so that a write without room
//! fails alone. A vital operation may let the file grow, and may use the reserve's room if it fails
//! without it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, ffi};
use tokio::sync::{mpsc, oneshot};

use super::checkpoint::{Checkpointer, pages};
use super::connection::{Database, PAGE_SIZE};
use super::error::{NotCommitted, cannot_write};
use super::reserve::Reserve;
use super::writer::{MAX_BATCH, Operation, Ran, WriterCommand, WriterStatus, operation};

/// Bytes of the text that a probe stores twice, in a table and in its index: together as much as
/// nearly every prompt.
const PROBE_BYTES: usize = 32 << 10;

/// How long the result of a probe is used again. Anybody may ask for readiness, and each probe
/// waits for the disk twice.
const PROBE_HOLDS: Duration = Duration::from_secs(1);

/// From this number of running calls on, transactions may be delayed.
const MANY_CALLS: isize = 8;

/// The longest commit delay, counted from the start of the transaction before.
const LONGEST_DELAY: Duration = Duration::from_millis(2);

/// The state of the writer's thread.
pub(super) struct WriterThread {
    database: Database,
    /// `None` after a failure that may have left the connection in any state; the next transaction
    /// opens another.
    connection: Option<Connection>,
    checkpointer: Checkpointer,
    pub reserve: Reserve,
    is_short: bool,
    /// The time and the result of the last probe.
    probed: Option<(Instant, bool)>,
    /// What other threads may know of this one.
    pub status: Arc<WriterStatus>,
}

impl WriterThread {
    /// Takes an open connection, and makes the reserve as far as there is room for it.
    pub fn new(database: Database, connection: Connection, reserve: Reserve) -> Self {
        let mut thread = Self {
            checkpointer: Checkpointer::new(&database, reserve.lag()),
            database,
            connection: Some(connection),
            reserve,
            is_short: false,
            probed: None,
            status: Arc::default(),
        };
        thread.settle();
        if thread.is_short {
            // The log of an earlier process may hold pages that the database file has no room for.
            thread.draw_on_reserve(Vec::new());
        }
        thread
    }

    /// Writes what is queued until the queue is closed.
    pub fn run_until_closed(mut self, mut queue: mpsc::Receiver<WriterCommand>) {
        let mut commands = Vec::with_capacity(MAX_BATCH);
        let mut batch = Vec::with_capacity(MAX_BATCH);
        let mut probes = Vec::new();
        let (mut began, mut previous) = (Instant::now(), 0);
        while queue.blocking_recv_many(&mut commands, MAX_BATCH) > 0 {
            let running_calls = self.status.running_calls.load(Ordering::Relaxed);
            let delay = commit_delay(running_calls, commands.len(), previous, began.elapsed());
            if !delay.is_zero() {
                std::thread::sleep(delay);
                let room = MAX_BATCH - commands.len();
                commands.extend(std::iter::from_fn(|| queue.try_recv().ok()).take(room));
            }
            (began, previous) = (Instant::now(), commands.len());
            for command in commands.drain(..) {
                match command {
                    WriterCommand::Run(operation) => batch.push(operation),
                    WriterCommand::Probe(reply) => probes.push(reply),
                    WriterCommand::Close => queue.close(),
                }
            }
            while !batch.is_empty() {
                self.write(&mut batch);
            }
            self.answer_probes(&mut probes);
        }
        if let Some(mut connection) = self.connection {
            self.checkpointer.finish(&mut connection);
        }
    }

    /// Writes the first operations of the batch in one transaction, and sends their results.
    fn write(&mut self, batch: &mut Vec<Box<dyn Operation>>) {
        let most = if self.is_short { 1 } else { batch.len() };
        let (ran, outcome) = self.commit(&mut batch[..most]);
        let is_full = outcome.as_ref().is_err_and(cannot_write);
        let outcome = outcome.map_err(NotCommitted::new);
        let mut vital = Vec::new();
        for operation in batch.drain(..ran) {
            if is_full && operation.is_vital() {
                vital.push(operation);
            } else {
                operation.answer(outcome.clone());
            }
        }
        // While room is short already, only a vital operation may use the reserve.
        if is_full && !(self.is_short && vital.is_empty()) {
            self.draw_on_reserve(vital);
        } else {
            self.copy_log();
        }
    }

    /// Carries out vital operations that failed for lack of room. They get the reserve's room,
    /// which is taken back before anything else is written. The log is emptied before and after:
    /// its pages get their place in the database file, and an empty log leaves its room to the
    /// reserve.
    fn draw_on_reserve(&mut self, vital: Vec<Box<dyn Operation>>) {
        self.reserve.release();
        self.empty_log();
        for mut operation in vital {
            let (_, outcome) = self.commit(std::slice::from_mut(&mut operation));
            operation.answer(outcome.map_err(NotCommitted::new));
        }
        self.empty_log();
        self.settle();
    }

    /// Makes the reserve as large as there is room for. Room is short if it is not whole then.
    fn settle(&mut self) {
        let was_short = std::mem::replace(&mut self.is_short, !self.reserve.fill());
        if self.is_short {
            self.status.is_in_doubt.store(true, Ordering::Relaxed);
        }
        match (was_short, self.is_short) {
            (false, true) => tracing::warn!(
                "the disk of the database is full: the database does not grow until there is room again; deleting works"
            ),
            (true, false) => {
                // A new connection has no bound on the size of the file.
                self.connection = None;
                tracing::info!("the disk of the database has room again");
            }
            (true, true) | (false, false) => {}
        }
    }

    /// Copies the log into the database file if it is time for that.
    fn copy_log(&mut self) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let copied = self.checkpointer.after_commit(connection, self.is_short);
        // This prevents a failed write: the log must not hold more than the reserve has room for.
        if copied.is_err_and(|error| cannot_write(&error)) && !self.is_short {
            self.draw_on_reserve(Vec::new());
        }
    }

    /// Copies the whole log and cuts it, unless the database file needs more room for that than
    /// there is: it would use up the room, and the log would stay.
    fn empty_log(&mut self) {
        let Ok(mut connection) = self.take_connection() else {
            return;
        };
        let is_possible = self
            .checkpointer
            .lag(&connection)
            .is_ok_and(|bytes| self.reserve.has_room(bytes));
        if is_possible {
            self.checkpointer.finish(&mut connection);
        }
        self.connection = Some(connection);
    }

    fn answer_probes(&mut self, probes: &mut Vec<oneshot::Sender<bool>>) {
        if probes.is_empty() {
            return;
        }
        let can_write = match self.probed {
            Some((at, found)) if at.elapsed() < PROBE_HOLDS => found,
            Some(_) | None => {
                let found = self.probe();
                self.probed = Some((Instant::now(), found));
                found
            }
        };
        for probe in probes.drain(..) {
            // The caller may have left.
            let _ = probe.send(can_write);
        }
    }

    /// Looks for room, and stores a text and deletes it again. While room is short, its pages must
    /// come from the free pages of the database file.
    fn probe(&mut self) -> bool {
        self.settle();
        // A row that a crash leaves here has expired already, and is purged with others.
        let insert = "INSERT OR REPLACE INTO revoked_token (jti, expires_at) VALUES (?1, 0)";
        let delete = "DELETE FROM revoked_token WHERE jti = ?1";
        let can_write = self.is_written(false, insert) && self.is_written(true, delete);
        if can_write && !self.is_short {
            self.status.is_in_doubt.store(false, Ordering::Relaxed);
        }
        self.copy_log();
        can_write
    }

    fn is_written(&mut self, is_vital: bool, sql: &'static str) -> bool {
        let (mut probe, _) = operation(is_vital, move |connection: &Connection| {
            let text = "x".repeat(PROBE_BYTES);
            Ok(connection.prepare_cached(sql)?.execute([text])?)
        });
        self.commit(std::slice::from_mut(&mut probe)).1.is_ok()
    }

    /// Writes operations in one transaction: as many of the first as it has room for. Returns how
    /// many were in it. After an error that is all of them, and none has been stored.
    fn commit(&mut self, batch: &mut [Box<dyn Operation>]) -> (usize, rusqlite::Result<()>) {
        let (operations, outcome) = match self.take_connection() {
            Ok(connection) => self.commit_on(connection, batch),
            Err(error) => (batch.len(), Err(error)),
        };
        let status = &self.status;
        if outcome.is_ok() {
            let number = u64::try_from(operations).unwrap_or(u64::MAX);
            status.committed_batches.fetch_add(1, Ordering::Relaxed);
            status
                .committed_operations
                .fetch_add(number, Ordering::Relaxed);
        } else {
            status.failed_batches.fetch_add(1, Ordering::Relaxed);
        }
        if outcome.as_ref().is_err_and(cannot_write) {
            status.is_in_doubt.store(true, Ordering::Relaxed);
        }
        (operations, outcome)
    }

    fn commit_on(
        &mut self,
        connection: Connection,
        batch: &mut [Box<dyn Operation>],
    ) -> (usize, rusqlite::Result<()>) {
        let bounds = TransactionBounds {
            max_pages: self.is_short.then(|| match &batch {
                [operation] if operation.is_vital() => self.database.max_pages.unwrap_or(u32::MAX),
                _ => PRESENT_SIZE,
            }),
            growth: self.reserve.lag() / u64::from(PAGE_SIZE),
        };
        let (ran, outcome) = transact(&connection, batch, bounds);
        let keep = match &outcome {
            Ok(()) => true,
            // Another process held the lock for longer than the timeout. Nothing was begun.
            Err(error) => {
                error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && connection.is_autocommit()
            }
        };
        // Otherwise the connection is dropped, which rolls back. A new one reads the state of the
        // file, whatever the failure left in the caches of this one.
        if keep {
            self.connection = Some(connection);
        }
        (ran, outcome)
    }

    fn take_connection(&mut self) -> rusqlite::Result<Connection> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => self.database.writer(),
        }
    }
}

/// A bound on the pages of the database file that means: no more than it has. SQLite takes no bound
/// below that.
const PRESENT_SIZE: u32 = 1;

/// How far a transaction may extend the database file.
struct TransactionBounds {
    /// The most pages that the file may have; `None` leaves the connection's bound.
    max_pages: Option<u32>,
    /// Pages of growth after which further operations are left to the next transaction.
    growth: u64,
}

/// Runs operations in a transaction, as many of the first as its bounds allow. Returns how many of
/// them have their outcome now.
fn transact(
    connection: &Connection,
    batch: &mut [Box<dyn Operation>],
    bounds: TransactionBounds,
) -> (usize, rusqlite::Result<()>) {
    let mut ran = 0;
    let outcome = (|| {
        // IMMEDIATE takes the write lock first, so this is the only place that waits for other
        // processes.
        run(connection, "BEGIN IMMEDIATE")?;
        if let Some(pages) = bounds.max_pages {
            connection.pragma_update(None, "max_page_count", pages)?;
        }
        let before = pages(connection)?;
        for operation in &mut *batch {
            if ran > 0 && pages(connection)?.saturating_sub(before) > bounds.growth {
                break;
            }
            ran += 1;
            run(connection, "SAVEPOINT operation")?;
            match operation.run(connection) {
                Ran::Done => {}
                Ran::Undone if connection.is_autocommit() => {
                    // Some failures (no memory) end the whole transaction, including the earlier
                    // operations.
                    return Err(failure(ffi::Error::new(ffi::SQLITE_ABORT_ROLLBACK)));
                }
                Ran::Undone => run(connection, "ROLLBACK TO operation")?,
                Ran::CannotWrite(error) => return Err(failure(error)),
            }
            run(connection, "RELEASE operation")?;
        }
        run(connection, "COMMIT")
    })();
    // A failure concerns all operations, including those that were not run.
    let operations = if outcome.is_ok() { ran } else { batch.len() };
    (operations, outcome)
}

/// How long a transaction waits for more operations than have gathered. `previous`: the operations
/// of the transaction before, which began `since` ago.
fn commit_delay(
    running_calls: isize,
    gathered: usize,
    previous: usize,
    since: Duration,
) -> Duration {
    if running_calls >= MANY_CALLS && gathered < previous {
        LONGEST_DELAY.saturating_sub(since)
    } else {
        Duration::ZERO
    }
}

fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([]).map(drop)
}

fn failure(error: ffi::Error) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(error, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_smaller_transaction_among_many_calls_is_delayed_for_two_milliseconds_at_most() {
        let delay = |running_calls, gathered, micros| {
            commit_delay(running_calls, gathered, 5, Duration::from_micros(micros)).as_micros()
        };
        assert_eq!(delay(MANY_CALLS, 1, 500), 1500);
        assert_eq!(delay(MANY_CALLS, 4, 0), 2000);
        assert_eq!(delay(MANY_CALLS, 1, 2500), 0);
        assert_eq!(delay(MANY_CALLS, 5, 500), 0);
        assert_eq!(delay(MANY_CALLS - 1, 1, 500), 0);
        assert_eq!(delay(-1, 1, 500), 0);
    }
}
