//! The scale-out store: PostgreSQL with pgvector, for any number of servers at once.
//!
//! A bounded pool of connections (`pool`), one statement a call, and similarity where the vectors are (`vectors`, `meaning`).
//! The schema is migrated when a server opens the store (`migrate`). Nothing of it is cached in the process but the numbers of
//! models, which never change: what one server has committed, every other reads.

mod accounts;
mod bulk;
mod bulk_calls;
mod calls;
mod error;
mod inspect;
mod lock;
mod meaning;
mod migrate;
mod pool;
mod prompts;
mod tls;
mod url;
mod vectors;

use std::fmt;

use async_trait::async_trait;
use tokio::time::timeout;
use tokio_postgres::types::FromSql;
use tokio_postgres::{Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;

use self::error::Cause;
use self::meaning::Meaning;
use self::migrate::migrate;
use self::pool::{CONNECT, Connector, Pool};
use self::vectors::Models;
use super::{Claim, Error, NearestStore};
use crate::domain::{Embedding, ModelId, PromptId, UserId};

pub use self::inspect::{DatabaseState, inspect};
pub use self::lock::Place;

/// Connections that a server may keep beside its pool: for locks and builds.
pub const FURTHER_CONNECTIONS: usize = 3;

/// How the store uses its database.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Connections at most, at least 1; made when needed. Beside them a server may keep [`FURTHER_CONNECTIONS`].
    pub pool_size: usize,
    /// The length of the vectors of the model in use; `None` where no model is in use, as in the operator's commands.
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

/// [`AccountStore`](super::AccountStore), [`PromptStore`](super::PromptStore), [`CallStore`](super::CallStore),
/// [`BulkStore`](super::BulkStore) and [`NearestStore`] over one PostgreSQL database. Needs a Tokio runtime.
pub struct PostgresStore {
    pool: Pool,
    models: Models,
    meaning: Meaning,
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PostgresStore")
            .field(&self.pool.stats())
            .finish()
    }
}

impl PostgresStore {
    /// The statement of a search among one owner's rows, for whoever wants to see its plan: `$1` vector, `$2` model's number,
    /// `$3` owner, `$4` rows at most.
    pub const OWN_SEARCH: &str = vectors::NEAREST_OWN;

    /// Connects, checks the server and applies the migrations it lacks. Safe when several servers open the same database at
    /// once. `url`: `postgres://` or `postgresql://`.
    ///
    /// # Errors
    /// One line that names the setting at fault and the mend.
    pub async fn open(url: &str, options: OpenOptions) -> Result<Self, OpenError> {
        let (config, tls) = driver(url)?;
        let connector = Connector::new(config, tls);
        let (mut client, _task) = timeout(CONNECT, connector.connect())
            .await
            .map_err(|_| OpenError::Unreachable(Box::new(Cause::TimedOut)))??;
        let version = migrate(&mut client, options.dimension).await?;
        let pool = Pool::new(connector, options.pool_size.max(1))
            .map_err(|error| OpenError::Failed(Box::new(error)))?;
        Ok(Self {
            pool,
            models: Models::default(),
            meaning: Meaning::new(version),
        })
    }

    /// Takes the database for this server alone, which is for one that shares no Redis with others. Keep the place with
    /// [`Place::hold`].
    ///
    /// # Errors
    /// `InUse` if another server has it, alone or together with others.
    pub async fn be_alone(&self) -> Result<Place, OpenError> {
        Place::alone(self.pool.connector().clone(), self.pool.suspended())
            .await
            .map_err(no_connection)?
            .ok_or(OpenError::InUse)
    }

    /// Takes a place among the servers that use the database and one Redis together. Keep it with [`Place::hold`].
    ///
    /// # Errors
    /// `InUseAlone` if a server has the database for itself.
    pub async fn be_a_replica(&self) -> Result<Place, OpenError> {
        Place::among_replicas(self.pool.connector().clone(), self.pool.suspended())
            .await
            .map_err(no_connection)?
            .ok_or(OpenError::InUseAlone)
    }

    /// Sees to the approximate index that searches among everybody's prompts need to be quick, for as long as that takes or
    /// until `stop`. Several servers may do so at once; one builds. A build that was broken off is begun again.
    pub async fn index_meaning(&self, stop: CancellationToken) {
        meaning::ensure(&self.pool, stop).await;
    }

    /// Refuses further calls and closes the connections; those in use are closed by their calls.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Takes the turn of embedding stored prompts: see [`PromptStore::claim_reembedding`](super::PromptStore::claim_reembedding).
    async fn claim(&self) -> Result<Option<Claim>, Error> {
        match lock::attempt(self.pool.connector(), lock::REEMBEDDING, None).await? {
            lock::Attempt::Held(held) => Ok(Some(Claim::new(held))),
            lock::Attempt::Taken => Ok(None),
        }
    }
}

/// What keeps a starting server from a connection.
fn no_connection(cause: Cause) -> OpenError {
    if let Cause::Distrust(why) = cause {
        OpenError::Distrusted(why)
    } else {
        OpenError::Unreachable(Box::new(cause))
    }
}

/// Why no connection can be tried.
#[derive(Debug)]
pub(super) enum UrlFault {
    /// The URL says nothing this program understands.
    Url(Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the URL asks.
    Tls(Box<dyn std::error::Error + Send + Sync>),
}

impl From<UrlFault> for OpenError {
    fn from(fault: UrlFault) -> Self {
        match fault {
            UrlFault::Url(source) => Self::Url(source),
            UrlFault::Tls(source) => Self::Tls(source),
        }
    }
}

/// What a URL says to the driver, and the encryption that it asks for.
pub(super) fn driver(url: &str) -> Result<(Config, MakeRustlsConnect), UrlFault> {
    let (config, tls) = url::parse(url).map_err(|error| UrlFault::Url(Box::new(error)))?;
    let tls = tls
        .connector()
        .map_err(|error| UrlFault::Tls(Box::new(error)))?;
    Ok((config, tls))
}

#[async_trait]
impl NearestStore for PostgresStore {
    async fn nearest(
        &self,
        model: &ModelId,
        owner: Option<UserId>,
        query: &Embedding,
        k: usize,
    ) -> Result<Vec<(PromptId, f32)>, Error> {
        vectors::nearest(self, model, owner, query, k).await
    }
}

/// A column of a row. A value that does not fit its type is a defect.
fn get<'a, T: FromSql<'a>>(row: &'a Row, column: usize) -> Result<T, Error> {
    row.try_get(column).map_err(|_| Cause::UnknownValue.into())
}

/// A count for a `LIMIT` clause.
fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
