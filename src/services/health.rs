//! Whether the parts are well, and how they stand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::embed::Embedder;
use crate::search::Similarity;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

/// How often the store is asked for the gauge.
pub const STORE_CHECK_EVERY: Duration = Duration::from_secs(3);
/// How long the store may take to answer before it counts as down.
const PATIENCE: Duration = Duration::from_secs(2);

/// What readiness and the gauges are read from.
pub struct Health {
    /// Where everything is kept.
    pub store: Arc<dyn PromptStore>,
    /// Makes vectors.
    pub embedder: Arc<Embedder>,
    /// Finds them.
    pub similarity: Arc<dyn Similarity>,
    /// Whether Redis is up, if this is one of several replicas.
    pub redis_up: Option<watch::Receiver<bool>>,
    /// The embedding model's name.
    pub model_name: String,
    /// Where the gauges are.
    pub metrics: Arc<Metrics>,
}

/// How the parts stood when they were asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Whether the store answered.
    pub store: bool,
    /// Whether Redis answers; `None` if none is configured. Without it a replica goes on by itself, so it is as ready as before:
    /// otherwise the loss of Redis would take all replicas at once from behind their balancer.
    pub redis: Option<bool>,
    /// Whether all vectors that searches need at once are loaded.
    pub vectors: bool,
    /// The embedding model's name; it is loaded before anything listens.
    pub model: String,
}

impl Readiness {
    /// One word for the whole.
    pub fn status(&self) -> &'static str {
        match (self.store, self.vectors) {
            (true, true) => "ready",
            (true, false) => "starting",
            (false, _) => "degraded",
        }
    }

    /// One word for each part.
    pub fn parts(&self) -> BTreeMap<&'static str, &'static str> {
        let store = if self.store { "ok" } else { "down" };
        let vectors = if self.vectors { "ok" } else { "loading" };
        let redis = self.redis.map(|up| if up { "ok" } else { "down" });
        [("store", store), ("model", "ok"), ("vectors", vectors)]
            .into_iter()
            .chain(redis.map(|redis| ("redis", redis)))
            .collect()
    }
}

impl Health {
    /// Asks the parts.
    pub async fn readiness(&self) -> Readiness {
        Readiness {
            store: self.store_answers().await,
            redis: self.redis_up.as_ref().map(|up| *up.borrow()),
            vectors: self.similarity.status().ready,
            model: self.model_name.clone(),
        }
    }

    /// Asks the store, and brings its gauge up to date: to be called again every [`STORE_CHECK_EVERY`] with the answer of the call before.
    /// A store that was up is asked twice before it counts as down, since one slow answer is no outage. A change is logged once.
    pub async fn watch_store(&self, was_up: bool) -> bool {
        let is_up = self.store_answers().await || (was_up && self.store_answers().await);
        match (was_up, is_up) {
            (true, false) => tracing::warn!("the store does not answer"),
            (false, true) => tracing::info!("the store answers again"),
            (true, true) | (false, false) => {}
        }
        self.set_store(is_up);
        is_up
    }

    /// Sets the store's gauge.
    pub fn set_store(&self, is_up: bool) {
        self.metrics
            .backend_up
            .with_label_values(&["store"])
            .set(f64::from(u8::from(is_up)));
    }

    async fn store_answers(&self) -> bool {
        let answer = tokio::time::timeout(PATIENCE, self.store.ping()).await;
        matches!(answer, Ok(Ok(())))
    }

    /// Brings the gauges up to date, before they are read.
    pub fn observe(&self) {
        let metrics = &self.metrics;
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let search = self.similarity.status();
        metrics.search_vectors.set(gauge(search.rows));
        metrics.search_memory.set(gauge(search.bytes));
        metrics.search_evictions.set(gauge(search.evictions));
        metrics
            .embedding_queue_depth
            .set(gauge(self.embedder.queue_depth() as u64));
        let store = self.store.stats();
        metrics
            .store_queue_depth
            .set(gauge(store.queued_writes as u64));
        let writes = |kind, value: u64| {
            metrics
                .store_writes
                .with_label_values(&[kind])
                .set(value as f64)
        };
        writes("operations", store.committed_operations);
        writes("commits", store.committed_batches);
        writes("failed_commits", store.failed_batches);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_away_weighs_more_than_vectors_that_load() {
        let readiness = |store, vectors| Readiness {
            store,
            redis: None,
            vectors,
            model: String::new(),
        };
        assert_eq!(readiness(true, true).status(), "ready");
        assert_eq!(readiness(true, false).status(), "starting");
        assert_eq!(readiness(false, false).status(), "degraded");
        assert_eq!(readiness(false, true).parts()["store"], "down");
    }

    #[test]
    fn a_replica_without_its_redis_says_so_and_stays_ready() {
        let readiness = |redis| Readiness {
            store: true,
            redis,
            vectors: true,
            model: String::new(),
        };
        assert_eq!(readiness(Some(false)).status(), "ready");
        assert_eq!(readiness(Some(false)).parts()["redis"], "down");
        assert_eq!(readiness(Some(true)).parts()["redis"], "ok");
        assert!(!readiness(None).parts().contains_key("redis"));
    }
}
