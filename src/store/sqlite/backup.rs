//! A consistent copy of the database file, made while others write to it.
//!
//! `VACUUM INTO` reads one state of the database, whatever is committed meanwhile, and writes it
//! without the room and the contents of deleted rows. SQLite's online backup would copy page by
//! page instead: it starts over whenever another process commits between two of its steps, which
//! beside a busy server is always.

use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::connection::Database;
use super::inspect::count;
use super::migrate::schema_version;
use super::{OpenError, OpenOptions};

/// Why there is no copy. It names no path; the caller knows the path.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is no database yet.
    #[error("there is no database to copy yet")]
    Nothing,
    /// The database cannot be read.
    #[error(transparent)]
    Source(#[from] OpenError),
    /// The copy's path is not UTF-8.
    #[error("the path of the copy is not UTF-8: name another")]
    Name,
    /// SQLite failed during the copy.
    #[error("the copy failed half way")]
    Copy(#[source] rusqlite::Error),
    /// The copy was made, but is damaged.
    #[error("the copy is damaged: check the database, the disk and the memory of this machine")]
    Damaged,
}

/// A copy that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Its size.
    pub bytes: u64,
    /// Accounts in it.
    pub users: u64,
    /// Prompts in it.
    pub prompts: u64,
}

/// About how many bytes a copy of the database takes; `Nothing` if there is none. Blocks.
///
/// # Errors
/// `Nothing`, `Source` and `Copy`.
pub fn backup_bytes(from: &Path) -> Result<u64, BackupError> {
    let bytes = open(from)?
        .query_row(
            "SELECT (page_count - freelist_count) * page_size
             FROM pragma_page_count, pragma_freelist_count, pragma_page_size",
            [],
            |row| row.get::<_, i64>(0),
        )
        .map_err(BackupError::Copy)?;
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// Copies the database `from` into the empty file `into`, and checks the copy. The caller must make
/// the copy durable, and remove it after an error. Blocks; safe beside a server.
///
/// # Errors
/// `Nothing`, `Damaged`; `Source` and `Copy` by their cause.
pub fn backup(from: &Path, into: &Path) -> Result<Copied, BackupError> {
    let source = open(from)?;
    let into = into.to_str().ok_or(BackupError::Name)?;
    source
        .execute("VACUUM INTO ?1", [into])
        .map_err(BackupError::Copy)?;
    examine(into)
}

/// A reading connection to an existing database of this service.
fn open(path: &Path) -> Result<Connection, BackupError> {
    if !path.try_exists().map_err(OpenError::from)? {
        return Err(BackupError::Nothing);
    }
    let database = Database::at(path, OpenOptions::default()).map_err(OpenError::from)?;
    let connection = database.reader().map_err(OpenError::from)?;
    match schema_version(&connection)? {
        0 => Err(BackupError::Nothing),
        _ => Ok(connection),
    }
}

/// Reads the whole copy.
fn examine(path: &str) -> Result<Copied, BackupError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let copy = Connection::open_with_flags(path, flags).map_err(BackupError::Copy)?;
    let verdict: String = copy
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .map_err(BackupError::Copy)?;
    let broken = copy
        .prepare("PRAGMA foreign_key_check")
        .and_then(|mut check| check.exists([]))
        .map_err(BackupError::Copy)?;
    if verdict != "ok" || broken {
        return Err(BackupError::Damaged);
    }
    let (users, prompts) = count(&copy)?;
    Ok(Copied {
        bytes: std::fs::metadata(path).map_err(OpenError::from)?.len(),
        users,
        prompts,
    })
}
