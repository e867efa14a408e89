//! Opens the file, and names what prevents that.

use std::fs;
use std::io;
use std::path::Path;

use rusqlite::{Connection, ErrorCode, ffi};

use super::connection::Database;
use super::migrate::migrate;

/// Why the database could not be opened: one line with the fix. It names no path; the caller knows
/// the path.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder that should hold the file is missing.
    #[error("the folder of the database file does not exist: create it, or name another")]
    NoFolder(#[source] io::Error),
    /// The file or its folder cannot be written (SQLite keeps its log beside the file).
    #[error(
        "the database file or its folder cannot be written: give the user that runs this program write access to both"
    )]
    NotWritable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The file is not an SQLite database, or its first page is damaged.
    #[error(
        "the database file is not an SQLite database or is damaged: restore it from a backup, or move it away to start empty"
    )]
    NotADatabase(#[source] rusqlite::Error),
    /// An SQLite database of another program.
    #[error("the database file belongs to another program: name another file")]
    Foreign,
    /// A later version of this program has used it.
    #[error(
        "the database file was written by a newer version of this program (schema {found}, this one knows up to {known}): run that version"
    )]
    Newer {
        /// The file's schema version.
        found: i32,
        /// The newest one known here.
        known: i32,
    },
    /// The file system cannot hold a database in write-ahead mode.
    #[error(
        "the file system of the database cannot share memory between processes: put the file on a local disk"
    )]
    NoSharedMemory,
    /// A migration found rows that refer to missing rows.
    #[error("the database file holds rows that refer to missing rows: restore it from a backup")]
    BrokenReferences,
    /// The disk has no room for the file, or for the log beside it.
    #[error("the disk of the database file is full: make room on it")]
    NoRoom(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another process held the file locked for longer than `OpenOptions::busy_timeout`.
    #[error("the database file is locked by another process: end that process, or wait for it")]
    Locked(#[source] rusqlite::Error),
    /// Anything else: an I/O error, no more threads.
    #[error("the database file could not be opened: see the cause")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<rusqlite::Error> for OpenError {
    fn from(error: rusqlite::Error) -> Self {
        // SQLite shares an index of its log in a file, and reports this if that file cannot grow.
        let extended = error.sqlite_error().map(|error| error.extended_code);
        if extended == Some(ffi::SQLITE_IOERR_SHMSIZE) {
            return Self::NoRoom(Box::new(error));
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::NoRoom(Box::new(error)),
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Self::NotADatabase(error),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked(error),
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                Self::NotWritable(Box::new(error))
            }
            _ => Self::Failed(Box::new(error)),
        }
    }
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the system's other errors have no fix that could be named"
        )]
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::NoFolder(error),
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::IsADirectory => Self::NotWritable(Box::new(error)),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoRoom(Box::new(error))
            }
            _ => Self::Failed(Box::new(error)),
        }
    }
}

/// Creates the file if it is missing, checks it, and migrates it to the present schema. Returns the
/// writing connection.
pub(super) fn open_writer(database: &Database) -> Result<Connection, OpenError> {
    create_private(&database.path)?;
    let mut connection = database.writer()?;
    migrate(&mut connection, database.busy_timeout)?;
    Ok(connection)
}

/// Creates the file, if it is missing, with mode 0600; SQLite gives its log the same permissions.
/// An existing file keeps the permissions that its operator has set.
fn create_private(path: &Path) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).map(drop)
}
