//! Why the store cannot be opened.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::error::SqlState;

use super::UrlFault;
use super::error::Cause;

/// Why the store cannot be opened: with its cause, one line that names the setting and the fix.
/// Never holds the URL or a part of it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL cannot be used.
    #[error("DATABASE_URL: the URL cannot be used")]
    Url(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the URL asks.
    #[error("DATABASE_URL: TLS cannot be set up")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server's certificate is not trusted: why, and the fix.
    #[error("DATABASE_URL: the PostgreSQL server's certificate is not trusted: {0}")]
    Distrusted(&'static str),
    /// No connection.
    #[error(
        "DATABASE_URL: the PostgreSQL server cannot be reached; start it, or correct host and port"
    )]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server does not accept this user or password.
    #[error(
        "DATABASE_URL: the PostgreSQL server refuses the user or the password; correct them, or let the user in from this machine in the server's pg_hba.conf (some let users in over TLS alone: sslmode=require)"
    )]
    Refused,
    /// No such database.
    #[error(
        "DATABASE_URL: the server has no database of that name; make it with createdb, or correct the name"
    )]
    NoDatabase,
    /// The role may not connect to the database.
    #[error(
        "DATABASE_URL: the user may not connect to this database; run GRANT CONNECT ON DATABASE … TO that user"
    )]
    NoConnect,
    /// The role lacks a right that `examine` did not find missing.
    #[error(
        "DATABASE_URL: the user lacks a right, which the PostgreSQL server's log names; make it the database's owner"
    )]
    NoRight,
    /// The server, or a limit of the role or the database, has no connection left.
    #[error(
        "DATABASE_URL: the PostgreSQL server has no connection left for this user; lower DATABASE_POOL_SIZE on the servers that use it, or raise max_connections or the user's CONNECTION LIMIT"
    )]
    NoRoom,
    /// The role may not create tables.
    #[error(
        "DATABASE_URL: the user may not make tables in the schema {schema}; run GRANT CREATE ON SCHEMA {schema} TO that user, or make it the database's owner"
    )]
    NotAllowed {
        /// The schema, quoted as in SQL.
        schema: String,
    },
    /// No schema of the role's search path exists and may be used.
    #[error(
        "DATABASE_URL: no schema of the user's search_path is there and may be used; run ALTER ROLE … SET search_path = public for that user, and GRANT USAGE, CREATE ON SCHEMA public"
    )]
    NoSchema,
    /// The role may not read and write the existing tables.
    #[error(
        "DATABASE_URL: the user may not read and write the table {table}; make it the tables' owner, or run GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA … TO that user"
    )]
    NoTableRights {
        /// One of them.
        table: String,
    },
    /// The tables have to be changed, and belong to another role.
    #[error(
        "DATABASE_URL: the tables have to be changed, which only their owner may; start once as their owner, or make the user their owner"
    )]
    NotOwner,
    /// A standby, which takes no writes.
    #[error(
        "DATABASE_URL: the PostgreSQL server is a standby, which takes no writes; name the primary, or several hosts and target_session_attrs=read-write"
    )]
    Standby,
    /// The role, the database or the server begins transactions that cannot write.
    #[error(
        "DATABASE_URL: the user's transactions are read-only; run ALTER ROLE … RESET default_transaction_read_only for that user (or ALTER DATABASE …), or name a user who may write"
    )]
    ReadOnly,
    /// The database cannot store every text.
    #[error(
        "DATABASE_URL: the database's encoding is {0}, and prompts need UTF8; make one with createdb --encoding=UTF8 --template=template0"
    )]
    Encoding(String),
    /// A server before PostgreSQL 14.
    #[error("DATABASE_URL: the server is PostgreSQL {0}; this program needs 14 or newer")]
    ServerTooOld(i32),
    /// pgvector is not installed on the server.
    #[error(
        "DATABASE_URL: the server lacks the extension pgvector; install version 0.7 or newer on it (a package postgresql-NN-pgvector, or the image pgvector/pgvector)"
    )]
    NoVector,
    /// Only another role may add pgvector.
    #[error(
        "DATABASE_URL: the extension pgvector must be added to the database by a superuser: run CREATE EXTENSION vector in it"
    )]
    VectorNotAllowed,
    /// pgvector is in a schema that the role may not use.
    #[error(
        "DATABASE_URL: the extension pgvector is in the schema {schema}, which the user may not use; run GRANT USAGE ON SCHEMA {schema} TO that user"
    )]
    VectorHidden {
        /// The schema, quoted as in SQL.
        schema: String,
    },
    /// A pgvector before 0.7.
    #[error(
        "DATABASE_URL: the database's pgvector is too old; install 0.7 or newer on the server, then run ALTER EXTENSION vector UPDATE"
    )]
    VectorTooOld,
    /// A newer program has migrated the database to a schema that this one cannot use.
    #[error(
        "DATABASE_URL: the database has schema {found}, which this program, made for schema {known}, cannot use; run the newer version of the program"
    )]
    Newer {
        /// The database's schema.
        found: i32,
        /// The newest this program knows.
        known: i32,
    },
    /// The schema has to be changed, and a transaction uses its tables without a pause.
    #[error(
        "DATABASE_URL: the schema cannot be changed while a long transaction uses its tables; end it (pg_stat_activity shows it), and start again"
    )]
    TablesInUse,
    /// The database belongs to another program.
    #[error(
        "DATABASE_URL: the database holds tables of another program; give this one a database of its own"
    )]
    Foreign,
    /// The stored vectors have another dimension than the model's.
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
    /// Another server has locked the database.
    #[error(
        "DATABASE_URL: another prompt-service uses this database; stop it, or set REDIS_URL on all of them to run several"
    )]
    InUse,
    /// A server without Redis has locked the database for itself.
    #[error(
        "DATABASE_URL: a prompt-service without REDIS_URL has this database for itself; stop it, or set the same REDIS_URL on all of them"
    )]
    InUseAlone,
    /// Anything else.
    #[error(
        "DATABASE_URL: the database cannot be prepared; the PostgreSQL server's log has the reason"
    )]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The result of `work`, unless the server does not reply in time.
pub(super) async fn within<T>(
    patience: Duration,
    work: impl Future<Output = Result<T, OpenError>>,
) -> Result<T, OpenError> {
    let late = |_| OpenError::Unreachable(Box::new(Cause::TimedOut));
    timeout(patience, work).await.map_err(late)?
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
        let cause = Cause::from(&error);
        match error.code() {
            Some(&SqlState::INVALID_CATALOG_NAME) => Self::NoDatabase,
            Some(&SqlState::TOO_MANY_CONNECTIONS) => Self::NoRoom,
            Some(code) if code.code().starts_with("28") => Self::Refused,
            Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Self::NoRight,
            Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Self::ReadOnly,
            Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED) => {
                Self::TablesInUse
            }
            // The server is starting, is stopping, or has no connection left.
            Some(code) if code.code().starts_with("57") || code.code().starts_with("53") => {
                Self::Unreachable(Box::new(cause))
            }
            Some(_) => Self::Failed(Box::new(cause)),
            None => no_connection(cause),
        }
    }
}

/// The failure of the first connection, before the database was asked anything.
pub(super) fn at_connection(error: tokio_postgres::Error) -> OpenError {
    if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        OpenError::NoConnect
    } else {
        error.into()
    }
}

/// Why a starting server has no connection.
pub(super) fn no_connection(cause: Cause) -> OpenError {
    if let Cause::Distrust(why) = cause {
        OpenError::Distrusted(why)
    } else {
        OpenError::Unreachable(Box::new(cause))
    }
}
