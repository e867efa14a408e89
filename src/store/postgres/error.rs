//! What PostgreSQL's failures mean for the store's callers.
//!
//! The server's own messages quote rows, statements and names of hosts and roles. So none of them
//! is kept, only the five-character SQLSTATE.

use std::io;

use tokio_postgres::error::SqlState;

use super::tls::distrust;
use crate::store::Error;

/// Why a call failed, in words that may be logged.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    /// The error of the server.
    #[error("the database answered with SQLSTATE {0}: {meaning}", meaning = meaning(.0))]
    Server(String),
    /// The connection broke, or could not be made; with the error of the operating system, if there
    /// is one.
    #[error("the connection to the database failed: {0}")]
    Connection(String),
    /// The server's certificate was refused: why, and the fix.
    #[error("the database server's certificate is not trusted: {0}")]
    Distrust(&'static str),
    /// No reply in time.
    #[error("the database did not answer in time")]
    TimedOut,
    /// Every connection is in use.
    #[error("no connection to the database was free in time")]
    PoolExhausted,
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
    /// The lock of this server was lost and has not been taken again yet.
    #[error("the lock that keeps other servers out is being taken again")]
    Suspended,
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Self::Unavailable(Box::new(cause))
    }
}

impl From<&tokio_postgres::Error> for Cause {
    /// Keeps the SQLSTATE; of a failure without one only its kind.
    fn from(error: &tokio_postgres::Error) -> Self {
        if let Some(code) = error.code() {
            return Self::Server(code.code().to_owned());
        }
        if let Some(why) = distrust(error) {
            return Self::Distrust(why);
        }
        let system = std::error::Error::source(error)
            .and_then(|source| source.downcast_ref::<io::Error>())
            .map(|source| source.kind().to_string());
        Self::Connection(system.unwrap_or_else(|| error.to_string()))
    }
}

/// The failure of a statement, without its text and values.
pub(super) fn from_server(error: &tokio_postgres::Error) -> Error {
    let cause = Cause::from(error);
    match error.code() {
        Some(code) if !is_temporary(code) => Error::Internal(Box::new(cause)),
        Some(_) | None => cause.into(),
    }
}

/// What a SQLSTATE means for an operator; if it says little, where to find more.
pub(in crate::store) fn meaning(code: &str) -> &'static str {
    match code {
        "57P03" => "the server is starting or stopping",
        "57P01" | "57P02" => "the server was shut down",
        "57P05" | "25P03" | "25P04" => "a time limit of the user or the server ended the session",
        "57014" => "the statement took too long",
        "53100" => "the server's disk is full",
        "53200" => "the server is out of memory",
        "53300" => "the server has no connection left",
        "25006" => "the server, or the user, takes no writes",
        "26000" => "a pooler has taken away a prepared statement",
        "42501" => "the user lacks a right",
        _ => "the server's log has the reason",
    }
}

/// Whether the same call may succeed later.
fn is_temporary(code: &SqlState) -> bool {
    const CLASSES: [&str; 5] = [
        "08", // connection
        "40", // rolled back for the sake of others: deadlock, serialization
        "53", // no room: disk, memory, connections
        "57", // the operator's doing: shutdown, restart, cancelled by a timeout
        "58", // the system under the server: input and output
    ];
    let temporary = [
        SqlState::READ_ONLY_SQL_TRANSACTION,
        SqlState::LOCK_NOT_AVAILABLE,
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
    ];
    CLASSES.contains(&&code.code()[..2]) || temporary.contains(code) || is_stale(code)
}

/// Whether a connection with this error is of no more use: the server shuts down, it became a
/// standby, or it no longer has the statements that were prepared on it.
pub(super) fn spoils_connection(error: &tokio_postgres::Error) -> bool {
    error.code().is_none_or(|code| {
        let shutting_down = [
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
            SqlState::CANNOT_CONNECT_NOW,
            SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
            SqlState::READ_ONLY_SQL_TRANSACTION,
        ];
        shutting_down.contains(code) || code.code().starts_with("08") || is_stale(code)
    })
}

/// A prepared statement is missing (a pooler removed it), or its result has other columns (another
/// version of this program has changed the schema).
fn is_stale(code: &SqlState) -> bool {
    *code == SqlState::INVALID_SQL_STATEMENT_NAME || *code == SqlState::FEATURE_NOT_SUPPORTED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_failures_are_distinguished_from_defects() {
        let temporary = [
            "08006", "53100", "53300", "57P01", "57P03", "57014", "25006", "40P01", "55P03",
            "58030",
        ];
        for code in temporary {
            assert!(is_temporary(&SqlState::from_code(code)), "{code}");
        }
        for code in ["23503", "23505", "42P01", "22021", "XX000", "28P01"] {
            assert!(!is_temporary(&SqlState::from_code(code)), "{code}");
        }
    }
}
