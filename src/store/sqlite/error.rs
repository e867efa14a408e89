//! What SQLite's failures mean for the store's callers.

use std::sync::Arc;

use rusqlite::{ErrorCode, ffi};

use crate::store::Error;

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        let temporary = is_temporary(&error);
        let cause = without_sql(error).into();
        if temporary {
            Self::Unavailable(cause)
        } else {
            Self::Internal(cause)
        }
    }
}

/// SQLite's error behind the failure of an operation, if it means that the file cannot be written.
pub(super) fn write_failure(failure: &Error) -> Option<ffi::Error> {
    let Error::Unavailable(cause) = failure else {
        return None;
    };
    let error = cause.downcast_ref::<rusqlite::Error>()?;
    error
        .sqlite_error()
        .copied()
        .filter(|_| cannot_write(error))
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
