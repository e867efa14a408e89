//! Why the store cannot be opened.

use tokio_postgres::error::SqlState;

use super::UrlFault;
use super::error::{Cause, connection_failure};

/// Why the store cannot be opened: with its cause, one line that names the setting and the mend. Never holds the URL or a part of it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL cannot be used.
    #[error("DATABASE_URL: the URL cannot be used")]
    Url(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the URL asks.
    #[error("DATABASE_URL: TLS cannot be set up")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server's certificate is not trusted: why, and the mend.
    #[error("DATABASE_URL: the PostgreSQL server's certificate is not trusted: {0}")]
    Distrusted(&'static str),
    /// No connection.
    #[error(
        "DATABASE_URL: the PostgreSQL server cannot be reached; start it, or correct host and port"
    )]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server does not take this user or password.
    #[error("DATABASE_URL: the PostgreSQL server refuses the user or the password; correct them")]
    Refused,
    /// No such database.
    #[error(
        "DATABASE_URL: the server has no database of that name; make it with createdb, or correct the name"
    )]
    NoDatabase,
    /// The role may not make tables.
    #[error(
        "DATABASE_URL: the user may not make tables in this database; make it the database's owner"
    )]
    NotAllowed,
    /// A server before PostgreSQL 14.
    #[error("DATABASE_URL: the server is PostgreSQL {0}; this program needs 14 or newer")]
    ServerTooOld(i32),
    /// pgvector is not installed on the server.
    #[error(
        "DATABASE_URL: the server lacks the extension pgvector; install version 0.7 or newer on it (a package postgresql-NN-pgvector, or the image pgvector/pgvector)"
    )]
    NoVector,
    /// pgvector may only be added by somebody else.
    #[error(
        "DATABASE_URL: the extension pgvector must be added to the database by a superuser: CREATE EXTENSION vector"
    )]
    VectorNotAllowed,
    /// A pgvector before 0.7.
    #[error(
        "DATABASE_URL: the database's pgvector is too old; install 0.7 or newer on the server, then run ALTER EXTENSION vector UPDATE"
    )]
    VectorTooOld,
    /// The database was migrated by a newer program, to what this one cannot use.
    #[error(
        "DATABASE_URL: the database has schema {found}, which this program, made for schema {known}, cannot use; run the newer version of the program"
    )]
    Newer {
        /// The database's schema.
        found: i32,
        /// The newest this program knows.
        known: i32,
    },
    /// The schema has to be changed, and somebody uses its tables without a pause.
    #[error(
        "DATABASE_URL: the schema cannot be changed while a long transaction uses its tables; end it (pg_stat_activity shows it), and start again"
    )]
    TablesInUse,
    /// The database is somebody else's.
    #[error(
        "DATABASE_URL: the database holds tables of another program; give this one a database of its own"
    )]
    Foreign,
    /// The stored vectors have another length than the model's.
    #[error(
        "EMBEDDING_MODEL_DIR: the model makes vectors of {wanted} numbers, and the database holds vectors of {found}; use a model of {found}, or another database"
    )]
    Dimension {
        /// Of the table.
        found: i32,
        /// Of the model.
        wanted: i32,
    },
    /// A model's vectors are longer than pgvector's may be.
    #[error("EMBEDDING_MODEL_DIR: the model's vectors are longer than pgvector takes")]
    TooLong,
    /// Another server has the database for itself.
    #[error(
        "DATABASE_URL: another prompt-service uses this database; stop it, or set REDIS_URL on all of them to run several"
    )]
    InUse,
    /// A server without Redis has the database for itself.
    #[error(
        "DATABASE_URL: a prompt-service without REDIS_URL has this database for itself; stop it, or set the same REDIS_URL on all of them"
    )]
    InUseAlone,
    /// Anything else.
    #[error("DATABASE_URL: the database cannot be prepared")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<UrlFault> for OpenError {
    fn from(fault: UrlFault) -> Self {
        match fault {
            UrlFault::Url(source) => Self::Url(source),
            UrlFault::Tls(source) => Self::Tls(source),
        }
    }
}

impl From<tokio_postgres::Error> for OpenError {
    fn from(error: tokio_postgres::Error) -> Self {
        let server = |code: &SqlState| Box::new(Cause::Server(code.code().to_owned()));
        match error.code() {
            Some(&SqlState::INVALID_CATALOG_NAME) => Self::NoDatabase,
            Some(code) if code.code().starts_with("28") => Self::Refused,
            Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Self::NotAllowed,
            Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED) => {
                Self::TablesInUse
            }
            // It starts, stops, or has no connection left.
            Some(code) if code.code().starts_with("57") || code.code().starts_with("53") => {
                Self::Unreachable(server(code))
            }
            Some(code) => Self::Failed(server(code)),
            None => no_connection(connection_failure(&error)),
        }
    }
}

/// What keeps a starting server from a connection.
pub(super) fn no_connection(cause: Cause) -> OpenError {
    if let Cause::Distrust(why) = cause {
        OpenError::Distrusted(why)
    } else {
        OpenError::Unreachable(Box::new(cause))
    }
}
