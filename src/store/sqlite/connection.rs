//! Opens connections: one kind writes, one only reads.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use super::OpenOptions;

/// Bytes a page of a new database. A vector of 384 numbers takes 0.8 kB of a row, and the rows are
/// the tree's inner nodes too. Pages of 4 kB hold five of them and make a deep tree, which the
/// bench `store` sweeps half as fast; pages of 16 kB are swept a little faster yet, but write twice
/// as much for each small commit.
pub(super) const PAGE_SIZE: u32 = 8192;

/// Page cache of the writer, in KiB. It holds the right edge of each tree; the kernel's cache holds
/// the rest.
const WRITER_CACHE_KIB: i64 = 4096;

/// Page cache of each reader, in KiB. SQLite empties it whenever another connection has committed,
/// so more would be idle memory. For the same reason nothing is mapped: mapped pages count as
/// memory of the process, and a failing disk would end the process with SIGBUS where `read` returns
/// an error.
const READER_CACHE_KIB: i64 = 1024;

/// Bytes that the write-ahead log is cut to when it starts over.
const WAL_KEEP_BYTES: i64 = 16 << 20;

/// Prepared statements each connection keeps: more than the store has.
const STATEMENTS: usize = 64;

/// Where the database is and how its connections behave.
#[derive(Clone, Debug)]
pub(super) struct Database {
    /// Absolute, so that a relative name beginning with `file:` is not read as a URI.
    pub path: PathBuf,
    /// How long a connection waits for another process's lock.
    pub busy_timeout: Duration,
    /// The most pages the file may have, if bounded.
    pub max_pages: Option<u32>,
}

impl Database {
    /// The database at `path`.
    pub fn at(path: &Path, options: OpenOptions) -> io::Result<Self> {
        Ok(Self {
            path: std::path::absolute(path)?,
            busy_timeout: options.busy_timeout,
            max_pages: options.max_pages,
        })
    }

    /// A connection for writing. The file must exist: only opening the store creates it.
    pub fn writer(&self) -> rusqlite::Result<Connection> {
        let mut connection = self.connect(OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        wait_for_locks(&mut connection, self.busy_timeout)?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
        // Otherwise the data for rolling back a savepoint would go to a file in the folder of
        // temporary files, which may be full or read-only.
        connection.pragma_update(None, "temp_store", "MEMORY")?;
        // The writer checkpoints itself, after its callers have their results.
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        connection.pragma_update(None, "journal_size_limit", WAL_KEEP_BYTES)?;
        if let Some(pages) = self.max_pages {
            connection.pragma_update(None, "max_page_count", pages)?;
        }
        Ok(connection)
    }

    /// A connection that cannot write.
    pub fn reader(&self) -> rusqlite::Result<Connection> {
        let mut connection = self.connect(OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        wait_for_locks(&mut connection, self.busy_timeout)?;
        connection.pragma_update(None, "cache_size", -READER_CACHE_KIB)?;
        Ok(connection)
    }

    /// A connection that reads and leaves no files behind, if no other process has the file open. A
    /// reader of a file in write-ahead mode otherwise leaves a log and its index beside the file.
    pub fn traceless_reader(&self) -> rusqlite::Result<Connection> {
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        if Path::new(&log).exists() {
            return self.reader();
        }
        // A process that opens the file creates a log first, and writes to the file itself only
        // much later.
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_URI
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Connection::open_with_flags(immutable_uri(&self.path), flags)
    }

    fn connect(&self, access: OpenFlags) -> rusqlite::Result<Connection> {
        // Each connection stays on one thread, so SQLite's own mutex around it is not needed.
        let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        Ok(connection)
    }
}

/// The URI of an absolute path, with the parameter that makes SQLite assume that no process writes
/// to the file.
fn immutable_uri(path: &Path) -> OsString {
    let mut uri = b"file:".to_vec();
    for byte in path.as_os_str().as_bytes() {
        if b"%?#".contains(byte) {
            uri.extend(format!("%{byte:02x}").bytes());
        } else {
            uri.push(*byte);
        }
    }
    uri.extend(b"?immutable=1");
    OsString::from_vec(uri)
}

/// Makes the connection wait up to `timeout` for another's lock.
///
/// SQLite's own handler backs off to 100 ms between attempts. A writer that commits without pause
/// leaves its lock for microseconds at a time, and so rare an attempt may miss the gap for seconds:
/// two processes of 200 writes each took 1.6 to 9 s beside eight busy callers with it, 1.1 to 1.8 s
/// with an attempt a millisecond.
pub(super) fn wait_for_locks(
    connection: &mut Connection,
    timeout: Duration,
) -> rusqlite::Result<()> {
    let mut since = Instant::now();
    connection.busy_handler(Some(move |attempt: i32| {
        if attempt == 0 {
            since = Instant::now();
        }
        let go_on = since.elapsed() < timeout;
        if go_on {
            thread::sleep(Duration::from_millis(1));
        }
        go_on
    }))
}
