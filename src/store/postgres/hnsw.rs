//! The approximate index over everybody's vectors (HNSW, of pgvector): how a search uses it, and
//! how it is built.
//!
//! It is built only if searches are shared, because it makes every insert many times more
//! expensive. The build runs beside everything else. Until it is done, the same statement is exact
//! and slower.

use std::time::Duration;

use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use super::error::{Cause, from_server};
use super::migrate::VectorVersion;
use super::pool::{LONG_PATIENCE, Pool};
use super::{PostgresStore, get, one, sql_limit};
use crate::store::Error;

/// Rows that a search looks at before it may stop. Recall rises with it, and so does the time.
const MIN_EF_SEARCH: usize = 100;
/// The maximum of the server.
const MAX_EF_SEARCH: usize = 1_000;
/// The first version that continues if a filter left too few rows.
const ITERATIVE_SINCE: VectorVersion = (0, 8);
/// How often a build's progress is logged, and how long to wait for another server's build or after
/// a failure.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Half of a build that was interrupted is of no use. It is dropped in a transaction that holds
/// this lock, and only if no server is building: a build cannot begin while an index of that name
/// exists. "PrmSindx".
const DROP_LOCK: i64 = 0x5072_6d53_696e_6478;

const BUILD: &str = "
    CREATE INDEX CONCURRENTLY IF NOT EXISTS prompt_embedding_by_meaning
    ON prompt_embedding USING hnsw (embedding halfvec_ip_ops) WITH (m = 16, ef_construction = 64)";

/// Whether the index exists and is valid, and whether a server is building it.
const STATE: &str = "
    SELECT (SELECT indisvalid FROM pg_index
            WHERE indexrelid = to_regclass('prompt_embedding_by_meaning')) AS is_valid,
           (SELECT coalesce(tuples_done, 0) FROM pg_stat_progress_create_index
            WHERE relid = 'prompt_embedding'::regclass LIMIT 1) AS done,
           (SELECT coalesce(tuples_total, 0) FROM pg_stat_progress_create_index
            WHERE relid = 'prompt_embedding'::regclass LIMIT 1) AS total";

/// Begins the transaction of a search for `k` rows, with its settings.
pub(super) fn begin_search(version: VectorVersion, k: usize) -> String {
    let ef_search = sql_limit(k.clamp(MIN_EF_SEARCH, MAX_EF_SEARCH));
    let iterative = if version >= ITERATIVE_SINCE {
        "; SET LOCAL hnsw.iterative_scan = relaxed_order"
    } else {
        ""
    };
    format!("BEGIN READ ONLY; SET LOCAL hnsw.ef_search = {ef_search}{iterative}")
}

/// The state of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IndexState {
    Absent,
    Building { done: i64, total: i64 },
    Invalid,
    Valid,
}

async fn state(pool: &Pool) -> Result<IndexState, Error> {
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    let row = one(connection.query(STATE, &[]).await?)?;
    let (is_valid, done): (Option<bool>, Option<i64>) =
        (get(&row, "is_valid")?, get(&row, "done")?);
    let total: Option<i64> = get(&row, "total")?;
    Ok(match (is_valid, done) {
        (Some(true), _) => IndexState::Valid,
        (_, Some(done)) => IndexState::Building {
            done,
            total: total.unwrap_or(0),
        },
        (Some(false), None) => IndexState::Invalid,
        (None, None) => IndexState::Absent,
    })
}

impl PostgresStore {
    /// Builds the approximate index, which makes searches among everybody's prompts fast, until it
    /// exists or `stop` is cancelled. Several servers may do so at once: one of them builds. A
    /// build that was interrupted is begun again.
    pub async fn build_hnsw_index(&self, stop: CancellationToken) {
        stop.run_until_cancelled(build_until_valid(&self.pool))
            .await;
    }
}

async fn build_until_valid(pool: &Pool) {
    let mut is_new = false;
    loop {
        let step = match state(pool).await {
            Ok(IndexState::Valid) => {
                if is_new {
                    tracing::info!("the index for shared searches is built");
                }
                return;
            }
            Ok(IndexState::Building { done, total }) => {
                is_new = true;
                tracing::info!(done, total, "the index for shared searches is being built");
                sleep(LOG_EVERY).await;
                Ok(())
            }
            Ok(IndexState::Invalid) => drop_invalid(pool).await,
            Ok(IndexState::Absent) => {
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
    // A separate connection: a build takes minutes and may not run in a transaction, and a build
    // that a stopping server has begun is of use to the others.
    let connected = async {
        let (client, _task) = pool.connector.connect().await?;
        client
            .batch_execute(
                "SET statement_timeout = 0; SET lock_timeout = 0; SET client_connection_check_interval = 0",
            )
            .await?;
        Ok(client)
    };
    let client = connected.await.map_err(|error| Cause::from(&error))?;
    tracing::info!(
        "building the index for shared searches; they are exact and slower until it is done"
    );
    let mut ticks = interval(LOG_EVERY);
    ticks.tick().await;
    let mut building = std::pin::pin!(client.batch_execute(BUILD));
    loop {
        tokio::select! {
            built = &mut building => {
                return built.map_err(|error| from_server(&error));
            }
            _ = ticks.tick() => {
                if let Ok(IndexState::Building { done, total }) = state(pool).await {
                    tracing::info!(done, total, "the index for shared searches is being built");
                }
            }
        }
    }
}

async fn drop_invalid(pool: &Pool) -> Result<(), Error> {
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
    fn ef_search_follows_k_within_the_limits_of_the_server() {
        assert_eq!(
            begin_search((0, 7), 5),
            "BEGIN READ ONLY; SET LOCAL hnsw.ef_search = 100"
        );
        assert_eq!(
            begin_search((0, 8), 400),
            "BEGIN READ ONLY; SET LOCAL hnsw.ef_search = 400; SET LOCAL hnsw.iterative_scan = relaxed_order"
        );
        assert!(begin_search((1, 0), 5000).contains("SET LOCAL hnsw.ef_search = 1000;"));
    }
}
