//! What SQLite's failures mean for the store's callers.

use std::sync::Arc;

use rusqlite::{ErrorCode, ffi};

use crate::store::Error;

/// A failure of one operation on a connection, before it is known whether its transaction commits.
#[derive(Debug)]
pub(super) enum Failure {
    /// SQLite's own.
    Sqlite(rusqlite::Error),
    /// An error of the store's contract, or a defect found by our own checks.
    Store(Error),
}

impl Failure {
    /// SQLite's error, if it means that the file cannot be written.
    pub fn cannot_write(&self) -> Option<ffi::Error> {
        match self {
            Self::Sqlite(error) if cannot_write(error) => error.sqlite_error().copied(),
            Self::Sqlite(_) | Self::Store(_) => None,
        }
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => error,
            Failure::Sqlite(error) => {
                let temporary = is_temporary(&error);
                let cause = without_sql(error).into();
                if temporary {
                    Self::Unavailable(cause)
                } else {
                    Self::Internal(cause)
                }
            }
        }
    }
}

/// Why a whole batch of writes failed; shared by its operations.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the transaction was not committed")]
pub(super) struct NotCommitted(#[source] Arc<rusqlite::Error>);

impl NotCommitted {
    pub(super) fn new(error: rusqlite::Error) -> Self {
        Self(Arc::new(without_sql(error)))
    }
}

impl From<NotCommitted> for Error {
    fn from(error: NotCommitted) -> Self {
        Self::Unavailable(Box::new(error))
    }
}

/// The store was closed, or the thread that served the call has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the store is closed")]
pub(super) struct Closed;

impl From<Closed> for Error {
    fn from(closed: Closed) -> Self {
        Self::Unavailable(Box::new(closed))
    }
}

/// A value that this program must never have stored or passed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Defect {
    #[error("a stored word is not one of its column's")]
    UnknownWord,
    #[error("the operation panicked")]
    Panicked,
    #[error("a vector of {given} numbers where the model's have {expected}")]
    Dimension { given: usize, expected: usize },
}

impl From<Defect> for Failure {
    fn from(defect: Defect) -> Self {
        Self::Store(Error::Internal(Box::new(defect)))
    }
}

/// Whether the same call may succeed later: the file is locked or cannot be written, or memory is
/// short.
fn is_temporary(error: &rusqlite::Error) -> bool {
    cannot_write(error)
        || matches!(
            error.sqlite_error_code(),
            Some(
                ErrorCode::DatabaseBusy
                    | ErrorCode::DatabaseLocked
                    | ErrorCode::OutOfMemory
                    | ErrorCode::FileLockingProtocolFailed
            )
        )
}

/// Whether the file cannot be written: the disk is full, fails or is read-only. A quota that is
/// used up, and a limit on the size of files, are among the disk's failures.
pub(super) fn cannot_write(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::DiskFull
                | ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::ReadOnly
                | ErrorCode::PermissionDenied
        )
    )
}

/// Removes the statement's text, which must not reach a log, from the one error that carries it.
fn without_sql(error: rusqlite::Error) -> rusqlite::Error {
    if let rusqlite::Error::SqlInputError { error, .. } = error {
        return rusqlite::Error::SqliteFailure(error, None);
    }
    error
}
