//! When each API key was last used: written once a minute, and not in the request's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hashlink::LinkedHashMap;
use parking_lot::Mutex;
use tokio_util::task::TaskTracker;

use crate::domain::{ApiKey, ApiKeyId, Timestamp};
use crate::store::{ApiKeyStore, USE_NOTED_EVERY};

/// The most keys whose last note is remembered. A key beyond them costs a write that the store
/// ignores.
const CAPACITY: usize = 10_000;

/// The uses of keys on their way to the store.
pub struct Uses {
    store: Arc<dyn ApiKeyStore>,
    tasks: TaskTracker,
    /// When this process last wrote a use, or tried to.
    noted: Mutex<LinkedHashMap<ApiKeyId, Timestamp>>,
    /// Whether the last write failed: an outage is logged once.
    is_failing: AtomicBool,
}

impl Uses {
    /// No use was noted yet.
    pub fn new(store: Arc<dyn ApiKeyStore>, tasks: TaskTracker) -> Arc<Self> {
        Arc::new(Self {
            store,
            tasks,
            noted: Mutex::default(),
            is_failing: AtomicBool::new(false),
        })
    }

    /// Notes a use at `now`, unless one was noted within a minute, here or on another replica.
    pub fn note(self: &Arc<Self>, key: &ApiKey, now: Timestamp) {
        let is_recent = |last: Timestamp| {
            now.since(last) < USE_NOTED_EVERY && last.since(now) <= USE_NOTED_EVERY
        };
        if key.last_used_at.is_some_and(is_recent) {
            return;
        }
        {
            let mut noted = self.noted.lock();
            if noted.get(&key.id).copied().is_some_and(is_recent) {
                return;
            }
            noted.insert(key.id, now);
            if noted.len() > CAPACITY {
                noted.pop_front();
            }
        }
        let (uses, id) = (Arc::clone(self), key.id);
        // Outside the request's span: a failure is not the request's.
        self.tasks.spawn(async move { uses.write(id, now).await });
    }

    async fn write(&self, id: ApiKeyId, now: Timestamp) {
        match self.store.note_api_key_use(id, now).await {
            Ok(_) => self.is_failing.store(false, Ordering::Relaxed),
            Err(error) => {
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "the last use of API keys could not be stored");
                }
            }
        }
    }
}
