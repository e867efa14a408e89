//! The scale-out store: PostgreSQL with pgvector, for any number of servers at once.
//!
//! A bounded pool of connections (`pool`), one statement a call, and similarity search in the
//! database, where the vectors are (`vectors`, `hnsw`). The schema is migrated when a server
//! opens the store (`migrate`). The process caches nothing of it except the numbers of models,
//! which never change: what one server has committed, every other reads.

mod accounts;
mod api_keys;
mod bulk;
mod calls;
mod chats;
mod error;
mod hnsw;
mod inspect;
mod lock;
mod migrate;
mod open_error;
mod pool;
mod prompts;
mod requirements;
mod session;
mod tls;
mod url;
mod usage;
mod vectors;

use std::fmt;

use tokio_postgres::row::RowIndex;
use tokio_postgres::types::{FromSql, FromSqlOwned};
use tokio_postgres::{Client, Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

use self::migrate::{VectorVersion, migrate};
use self::open_error::{at_connection, no_connection, within};
use self::pool::{CONNECT, Connector, Pool};
use self::vectors::Models;
use super::rows::{Column, Defect, StoredRow};
use super::{Error, sql_limit};

pub(super) use self::error::meaning;
pub use self::inspect::{count_rows, inspect};
pub use self::lock::ServerLock;
pub use self::open_error::OpenError;
pub use self::requirements::DatabaseState;
pub(super) use self::session::NO_TIMEOUTS;

/// Connections that a server may have beside its pool: for locks and builds.
pub const FURTHER_CONNECTIONS: usize = 3;

/// How the store uses its database.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// The most connections, at least 1; they are made when needed. A server may have
    /// [`FURTHER_CONNECTIONS`] beside them.
    pub pool_size: usize,
    /// The dimension of the vectors of the model in use; `None` if no model is in use, as in the
    /// operator's commands.
    pub dimension: Option<usize>,
}

impl Default for OpenOptions {
    /// 16 connections, no model.
    fn default() -> Self {
        Self {
            pool_size: 16,
            dimension: None,
        }
    }
}

/// [`AccountStore`](super::AccountStore), [`PromptStore`](super::PromptStore),
/// [`CallStore`](super::CallStore), [`BulkStore`](super::BulkStore) over one PostgreSQL database,
/// with its search by similarity. Needs a Tokio runtime.
pub struct PostgresStore {
    pool: Pool,
    models: Models,
    pgvector: VectorVersion,
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PostgresStore")
            .field(&self.pool.stats())
            .finish()
    }
}

impl PostgresStore {
    /// The statement of a search among one owner's rows, for callers that explain its plan: `$1`
    /// vector, `$2` model's number, `$3` owner, `$4` limit.
    pub const OWN_SEARCH: &str = vectors::NEAREST_OWN;

    /// Connects, checks the server and applies the migrations it lacks. Safe when several servers
    /// open the same database at once. `url`: `postgres://` or `postgresql://`.
    ///
    /// # Errors
    /// One line that names the setting and the fix.
    pub async fn open(url: &str, options: OpenOptions) -> Result<Self, OpenError> {
        let (connector, mut client) = connect(url).await?;
        let pgvector = migrate(&mut client, options.dimension).await?;
        let pool = Pool::new(connector, options.pool_size.max(1))
            .map_err(|error| OpenError::Failed(Box::new(error)))?;
        Ok(Self {
            pool,
            models: Models::default(),
            pgvector,
        })
    }

    /// Locks the database for this server alone, which does not share a Redis with others. Keep the
    /// lock with [`ServerLock::hold`].
    ///
    /// # Errors
    /// `InUse` if another server has locked it, alone or together with others.
    pub async fn lock_exclusive(&self) -> Result<ServerLock, OpenError> {
        let lock = ServerLock::take(&self.pool, lock::SOLE_SERVER).await;
        lock.map_err(no_connection)?.ok_or(OpenError::InUse)
    }

    /// Locks the database together with the other servers that use it and share one Redis. Keep the
    /// lock with [`ServerLock::hold`].
    ///
    /// # Errors
    /// `InUseAlone` if a server has locked the database for itself.
    pub async fn lock_shared(&self) -> Result<ServerLock, OpenError> {
        let lock = ServerLock::take(&self.pool, lock::REPLICA).await;
        lock.map_err(no_connection)?.ok_or(OpenError::InUseAlone)
    }

    /// Refuses further calls and closes the connections; the calls in progress close theirs.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// Why no connection can be attempted.
#[derive(Debug)]
pub(super) enum UrlFault {
    /// The URL cannot be read.
    Url(Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the URL asks.
    Tls(Box<dyn std::error::Error + Send + Sync>),
}

/// The settings of the driver in a URL, and the encryption that it asks for.
pub(super) fn driver(url: &str) -> Result<(Config, MakeRustlsConnect), UrlFault> {
    let (config, tls) = url::parse(url).map_err(|error| UrlFault::Url(Box::new(error)))?;
    let tls = tls
        .connector()
        .map_err(|error| UrlFault::Tls(Box::new(error)))?;
    Ok((config, tls))
}

/// A first connection, and the maker of further ones.
async fn connect(url: &str) -> Result<(Connector, Client), OpenError> {
    let (config, tls) = driver(url)?;
    let connector = Connector::new(config, tls);
    let connecting = async { connector.connect().await.map_err(at_connection) };
    let (client, _task) = within(CONNECT, connecting).await?;
    Ok((connector, client))
}

/// A column of a row. A value that does not fit its type is a defect.
fn get<'a, T: FromSql<'a>>(row: &'a Row, column: impl RowIndex + fmt::Display) -> Result<T, Error> {
    row.try_get(column).map_err(|_| Defect::UnknownValue.into())
}

impl<T: FromSqlOwned> Column<T> for Row {
    fn read(&self, column: &str) -> Result<T, Error> {
        get(self, column)
    }
}

impl StoredRow for Row {}

/// The values in rows.
fn all<T>(
    rows: &[Row],
    read: impl Fn(&dyn StoredRow) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    rows.iter().map(|row| read(row)).collect()
}

/// The value in the row of a statement that returns at most one.
fn first<T>(
    rows: &[Row],
    read: impl Fn(&dyn StoredRow) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    rows.first().map(|row| read(row)).transpose()
}

/// The row of a statement that always returns one.
fn one(mut rows: Vec<Row>) -> Result<Row, Defect> {
    rows.pop().ok_or(Defect::UnknownValue)
}
