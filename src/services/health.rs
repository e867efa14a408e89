//! Readiness of the dependencies, and the gauges that show their state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::embed::Embedder;
use crate::search::Similarity;
use crate::store::{Access, PromptStore};
use crate::telemetry::Metrics;

/// How often the store is checked for the gauge.
pub const STORE_CHECK_EVERY: Duration = Duration::from_secs(3);
/// How long the store may take to respond before it counts as down.
const PATIENCE: Duration = Duration::from_secs(2);

/// The dependencies whose state is shown.
pub struct Health {
    /// The store.
    pub store: Arc<dyn PromptStore>,
    /// The embedder.
    pub embedder: Arc<Embedder>,
    /// The index of vectors.
    pub similarity: Arc<dyn Similarity>,
    /// Whether Redis is up, if this is one of several replicas.
    pub redis_up: Option<watch::Receiver<bool>>,
    /// The embedding model's name.
    pub model_name: String,
    /// The gauges.
    pub metrics: Arc<Metrics>,
}

/// The state of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreHealth {
    /// It reads and writes.
    Ok,
    /// It reads, and cannot store a prompt, for example because its disk is full.
    ReadOnly,
    /// It does not respond.
    Down,
}

impl StoreHealth {
    /// The state as readiness reports it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ReadOnly => "read_only",
            Self::Down => "down",
        }
    }
}

/// The state of the parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// The state of the store.
    pub store: StoreHealth,
    /// Whether Redis responds; `None` if none is configured. A replica without Redis goes on by
    /// itself and stays ready: otherwise the loss of Redis would take all replicas from their
    /// balancer at once.
    pub redis: Option<bool>,
    /// Whether the vectors that must be loaded before the first search are loaded.
    pub vectors: bool,
    /// The embedding model's name; it is loaded before anything listens.
    pub model: String,
}

impl Readiness {
    /// The state of the service in one word.
    pub fn status(&self) -> &'static str {
        match (self.store, self.vectors) {
            (StoreHealth::Ok, true) => "ready",
            (StoreHealth::Ok, false) => "starting",
            (StoreHealth::ReadOnly | StoreHealth::Down, _) => "degraded",
        }
    }

    /// The state of each part in one word.
    pub fn parts(&self) -> BTreeMap<&'static str, &'static str> {
        let vectors = if self.vectors { "ok" } else { "loading" };
        let store = self.store.as_str();
        let mut parts = BTreeMap::from([("store", store), ("model", "ok"), ("vectors", vectors)]);
        if let Some(is_up) = self.redis {
            parts.insert("redis", if is_up { "ok" } else { "down" });
        }
        parts
    }
}

impl Health {
    /// Checks the parts.
    pub async fn readiness(&self) -> Readiness {
        Readiness {
            store: self.ask_store().await,
            redis: self.redis_up.as_ref().map(|up| *up.borrow()),
            vectors: self.similarity.status().ready,
            model: self.model_name.clone(),
        }
    }

    /// Checks the store and updates its gauge. To be called every [`STORE_CHECK_EVERY`] with the
    /// result of the call before. A store that was healthy is checked twice, since one slow
    /// response is no outage. A change is logged once.
    pub async fn watch_store(&self, before: StoreHealth) -> StoreHealth {
        let mut now = self.ask_store().await;
        if before == StoreHealth::Ok && now != StoreHealth::Ok {
            now = self.ask_store().await;
        }
        match now {
            _ if now == before => {}
            StoreHealth::Down => tracing::warn!("the store does not answer"),
            StoreHealth::ReadOnly => tracing::warn!("the store cannot be written"),
            StoreHealth::Ok if before == StoreHealth::Down => {
                tracing::info!("the store answers again");
            }
            StoreHealth::Ok => tracing::info!("the store can be written again"),
        }
        self.set_store(now);
        now
    }

    /// Sets the store's gauge.
    pub fn set_store(&self, health: StoreHealth) {
        self.metrics
            .backend_up
            .with_label_values(&["store"])
            .set(f64::from(u8::from(health == StoreHealth::Ok)));
    }

    async fn ask_store(&self) -> StoreHealth {
        match tokio::time::timeout(PATIENCE, self.store.ping()).await {
            Ok(Ok(Access::ReadWrite)) => StoreHealth::Ok,
            Ok(Ok(Access::ReadOnly)) => StoreHealth::ReadOnly,
            Ok(Err(_)) | Err(_) => StoreHealth::Down,
        }
    }

    /// Updates the gauges, before they are read.
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
    fn unhealthy_store_is_reported_before_vectors_that_load() {
        let readiness = |store, vectors| Readiness {
            store,
            redis: None,
            vectors,
            model: String::new(),
        };
        assert_eq!(readiness(StoreHealth::Ok, true).status(), "ready");
        assert_eq!(readiness(StoreHealth::Ok, false).status(), "starting");
        for (store, word) in [
            (StoreHealth::Down, "down"),
            (StoreHealth::ReadOnly, "read_only"),
        ] {
            assert_eq!(readiness(store, false).status(), "degraded");
            assert_eq!(readiness(store, true).status(), "degraded");
            assert_eq!(readiness(store, true).parts()["store"], word);
        }
    }

    #[test]
    fn replica_without_redis_reports_it_and_stays_ready() {
        let readiness = |redis| Readiness {
            store: StoreHealth::Ok,
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
