//! The approximate index over everybody's vectors: what a search sets, and how it is built.
//!
//! It is built only where searches are shared, because it makes every insert many times dearer. The build goes on beside
//! everything else; until it is done the server answers the same statement exactly, only slower.

use std::time::Duration;

use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use super::error::Cause;
use super::migrate::VectorVersion;
use super::pool::{LONG_PATIENCE, Pool};
use super::{get, sql_limit};
use crate::store::Error;

/// Rows that a search looks at before it may stop. Recall rises with it, and so does the time.
const LEAST_EFFORT: usize = 100;
/// The most that the server takes.
const MOST_EFFORT: usize = 1_000;
/// The first version that goes on where a filter left too few rows.
const ITERATIVE_SINCE: VectorVersion = (0, 8);
/// How often a build's progress is logged, and how long to wait for somebody else's build or after a failure.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Half of a build that was broken off is of no use. It is dropped in a transaction that holds the lock of all who would, and
/// only if nobody is building: a build cannot begin while an index of that name exists. "PrmSindx".
const DROP_LOCK: i64 = 0x5072_6d53_696e_6478;

const BUILD: &str = "
    CREATE INDEX CONCURRENTLY IF NOT EXISTS prompt_embedding_by_meaning
    ON prompt_embedding USING hnsw (embedding halfvec_ip_ops) WITH (m = 16, ef_construction = 64)";

/// Whether the index is there and whole, and whether somebody is building it.
const STATE: &str = "
    SELECT (SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('prompt_embedding_by_meaning')),
           (SELECT coalesce(tuples_done, 0) FROM pg_stat_progress_create_index
            WHERE relid = 'prompt_embedding'::regclass LIMIT 1),
           (SELECT coalesce(tuples_total, 0) FROM pg_stat_progress_create_index
            WHERE relid = 'prompt_embedding'::regclass LIMIT 1)";

/// What the installed version of pgvector can do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meaning {
    is_iterative: bool,
}

impl Meaning {
    pub fn new(version: VectorVersion) -> Self {
        Self {
            is_iterative: version >= ITERATIVE_SINCE,
        }
    }

    /// What a search for `k` rows sets for its transaction.
    pub fn settings(self, k: usize) -> String {
        let effort = sql_limit(k.clamp(LEAST_EFFORT, MOST_EFFORT));
        let iterative = if self.is_iterative {
            "; SET LOCAL hnsw.iterative_scan = relaxed_order"
        } else {
            ""
        };
        format!("SET LOCAL hnsw.ef_search = {effort}{iterative}")
    }
}

/// How the index stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent,
    Building { done: i64, total: i64 },
    Broken,
    Whole,
}

async fn state(pool: &Pool) -> Result<State, Error> {
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    let row = connection.query_opt(STATE, &[]).await?;
    let row = row.ok_or(super::error::Cause::UnknownValue)?;
    let is_whole: Option<bool> = get(&row, 0)?;
    let done: Option<i64> = get(&row, 1)?;
    let total: Option<i64> = get(&row, 2)?;
    Ok(match (is_whole, done) {
        (Some(true), _) => State::Whole,
        (_, Some(done)) => State::Building {
            done,
            total: total.unwrap_or(0),
        },
        (Some(false), None) => State::Broken,
        (None, None) => State::Absent,
    })
}

/// Sees to it that the index is there, for as long as it takes or until `stop`ped.
pub(super) async fn ensure(pool: &Pool, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work(pool) => {}
    }
}

async fn work(pool: &Pool) {
    let mut is_new = false;
    loop {
        let step = match state(pool).await {
            Ok(State::Whole) => {
                if is_new {
                    tracing::info!("the index for shared searches is built");
                }
                return;
            }
            Ok(State::Building { done, total }) => {
                is_new = true;
                tracing::info!(done, total, "the index for shared searches is being built");
                sleep(LOG_EVERY).await;
                Ok(())
            }
            Ok(State::Broken) => drop_broken(pool).await,
            Ok(State::Absent) => {
                is_new = true;
                build(pool).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = step {
            tracing::warn!(%error, "the index for shared searches cannot be built yet; searches are exact and slower");
            sleep(LOG_EVERY).await;
        }
    }
}

async fn build(pool: &Pool) -> Result<(), Error> {
    let failed = |error: &tokio_postgres::Error| Error::Unavailable(Box::new(Cause::from(error)));
    // A connection of its own: a build takes minutes, no statement of a build may run in a transaction, and what a server that
    // stops has begun is of use to the others.
    let (client, _task) = pool
        .connector()
        .connect()
        .await
        .map_err(|error| failed(&error))?;
    client
        .batch_execute(
            "SET statement_timeout = 0; SET lock_timeout = 0; SET client_connection_check_interval = 0",
        )
        .await
        .map_err(|error| failed(&error))?;
    tracing::info!(
        "building the index for shared searches; they are exact and slower until it is done"
    );
    let mut ticks = interval(LOG_EVERY);
    ticks.tick().await;
    let mut building = std::pin::pin!(client.batch_execute(BUILD));
    loop {
        tokio::select! {
            built = &mut building => {
                return built.map_err(|error| super::error::from_server(&error));
            }
            _ = ticks.tick() => {
                if let Ok(State::Building { done, total }) = state(pool).await {
                    tracing::info!(done, total, "the index for shared searches is being built");
                }
            }
        }
    }
}

async fn drop_broken(pool: &Pool) -> Result<(), Error> {
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    let sql = format!(
        "DO $$ BEGIN
             PERFORM pg_advisory_xact_lock({DROP_LOCK});
             IF EXISTS (SELECT FROM pg_index
                        WHERE indexrelid = to_regclass('prompt_embedding_by_meaning') AND NOT indisvalid)
                AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index
                                WHERE relid = 'prompt_embedding'::regclass) THEN
                 DROP INDEX prompt_embedding_by_meaning;
             END IF;
         END $$"
    );
    connection.write(&sql, &[]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effort_follows_k_within_what_the_server_takes() {
        let settings = |version, k| Meaning::new(version).settings(k);
        assert_eq!(settings((0, 7), 5), "SET LOCAL hnsw.ef_search = 100");
        assert_eq!(
            settings((0, 8), 400),
            "SET LOCAL hnsw.ef_search = 400; SET LOCAL hnsw.iterative_scan = relaxed_order"
        );
        assert!(settings((1, 0), 5000).starts_with("SET LOCAL hnsw.ef_search = 1000;"));
    }
}
