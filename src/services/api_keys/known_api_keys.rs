//! A short-lived cache of API keys, so that not every request asks the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hashlink::LinkedHashMap;
use parking_lot::Mutex;

use crate::credentials::api_key::is_same_hash;
use crate::domain::{ApiKey, ApiKeyId, ApiKeyRecord, PreviousSecret, Timestamp};
use crate::error::Error;
use crate::store::ApiKeyStore;

/// How old an entry may be. A revoked or changed key takes effect within this time plus one
/// request, on every process that shares the store; the contract allows 2 s.
const MAX_AGE: Duration = Duration::from_secs(1);
/// The most entries. Beyond it the entry that was read first is removed.
const CAPACITY: usize = 10_000;

/// The end of what has none.
pub const NEVER: Timestamp = Timestamp(i64::MAX);

/// What authentication needs of a key.
#[derive(Clone)]
pub struct KnownApiKey {
    /// What its user sees of it.
    pub key: Arc<ApiKey>,
    /// SHA-256 of its text.
    pub key_hash: [u8; 32],
    /// Its text before the last rotation.
    pub previous: Option<PreviousSecret>,
    /// Whether it was revoked.
    pub is_revoked: bool,
}

impl KnownApiKey {
    /// Until when a text of that hash may be used: for ever if it is the key's present one. `None`
    /// if it is none of the key's.
    pub fn end_of(&self, key_hash: &[u8; 32]) -> Option<Timestamp> {
        // Both are compared, so that the time shows nothing.
        let is_current = is_same_hash(&self.key_hash, key_hash);
        let previous = self
            .previous
            .filter(|previous| is_same_hash(&previous.key_hash, key_hash));
        match (is_current, previous) {
            (true, _) => Some(NEVER),
            (false, previous) => previous.map(|previous| previous.until),
        }
    }
}

impl From<ApiKeyRecord> for KnownApiKey {
    fn from(record: ApiKeyRecord) -> Self {
        Self {
            key: Arc::new(record.key),
            key_hash: record.key_hash,
            previous: record.previous,
            is_revoked: record.revoked_at.is_some(),
        }
    }
}

/// Keys by id, each read at most a second ago. An id that no key has is not remembered: a stranger
/// could fill the cache with such ids.
#[derive(Default)]
pub struct KnownApiKeys {
    keys: Mutex<LinkedHashMap<ApiKeyId, (KnownApiKey, Instant)>>,
}

impl KnownApiKeys {
    /// Returns the key from memory, if it was read within a second.
    pub fn remembered(&self, id: ApiKeyId, now: Instant) -> Option<KnownApiKey> {
        let keys = self.keys.lock();
        let (known, read_at) = keys.get(&id)?;
        (now.saturating_duration_since(*read_at) < MAX_AGE).then(|| known.clone())
    }

    /// Returns the key from the store, and remembers it as of `now`.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn read(
        &self,
        id: ApiKeyId,
        store: &dyn ApiKeyStore,
        now: Instant,
    ) -> Result<Option<KnownApiKey>, Error> {
        let Some(known) = store.api_key(id).await?.map(KnownApiKey::from) else {
            return Ok(None);
        };
        let mut keys = self.keys.lock();
        keys.insert(id, (known.clone(), now));
        if keys.len() > CAPACITY {
            keys.pop_front();
        }
        Ok(Some(known))
    }

    /// Removes the key, so that the next request reads it from the store.
    pub fn forget(&self, id: ApiKeyId) {
        self.keys.lock().remove(&id);
    }
}
