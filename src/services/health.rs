//! Whether the parts are well, and how they stand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::embed::Embedder;
use crate::search::Similarity;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

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
        let answer = tokio::time::timeout(PATIENCE, self.store.ping()).await;
        let store = matches!(answer, Ok(Ok(())));
        self.metrics
            .backend_up
            .with_label_values(&["store"])
            .set(f64::from(u8::from(store)));
        Readiness {
            store,
            redis: self.redis_up.as_ref().map(|up| *up.borrow()),
            vectors: self.similarity.status().ready,
            model: self.model_name.clone(),
        }
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
