//! The scale-out store: PostgreSQL with pgvector, for any number of servers at once.
//!
//! A bounded pool of connections (`pool`), one statement a call, and similarity where the vectors are (`vectors`, `meaning`).
//! The schema is migrated when a server opens the store (`migrate`). Nothing of it is cached in the process but the numbers of
//! models, which never change: what one server has committed, every other reads.

mod accounts;
mod bulk;
mod calls;
mod error;
mod inspect;
mod lock;
mod meaning;
mod migrate;
mod open_error;
mod pool;
mod prompts;
mod requirements;
mod session;
mod tls;
mod url;
mod vectors;

use std::fmt;

use async_trait::async_trait;
use tokio::time::timeout;
use tokio_postgres::row::RowIndex;
use tokio_postgres::types::FromSql;
use tokio_postgres::{Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;

use self::error::Cause;
use self::meaning::Meaning;
use self::migrate::migrate;
use self::open_error::{at_connection, no_connection};
use self::pool::{CONNECT, Connector, Pool};
use self::vectors::Models;
use super::{Claim, Error, NearestStore};
use crate::domain::{Embedding, ModelId, PromptId, UserId};

pub(super) use self::error::meaning;
pub use self::inspect::{count_rows, inspect};
pub use self::lock::Place;
pub use self::open_error::OpenError;
pub use self::requirements::DatabaseState;
pub(super) use self::session::NO_TIMEOUTS;

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
    /// One line that names the setting at fault and the repair.
    pub async fn open(url: &str, options: OpenOptions) -> Result<Self, OpenError> {
        let (config, tls) = driver(url)?;
        let connector = Connector::new(config, tls);
        let (mut client, _task) = timeout(CONNECT, connector.connect())
            .await
            .map_err(|_| OpenError::Unreachable(Box::new(Cause::TimedOut)))?
            .map_err(at_connection)?;
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

/// Why no connection can be tried.
#[derive(Debug)]
pub(super) enum UrlFault {
    /// The URL says nothing this program understands.
    Url(Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the URL asks.
    Tls(Box<dyn std::error::Error + Send + Sync>),
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
fn get<'a, T: FromSql<'a>>(row: &'a Row, column: impl RowIndex + fmt::Display) -> Result<T, Error> {
    row.try_get(column).map_err(|_| Cause::UnknownValue.into())
}

/// A count for a `LIMIT` clause.
fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
