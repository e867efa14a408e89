//! A cache of accounts, so that not every request has to ask the store for its user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::{User, UserId};
use crate::error::Error;
use crate::store::AccountStore;

/// How old a cached account may be. Disabling it or changing its password takes effect within this
/// time plus one request, on every process that shares the store; the contract allows 5 s.
const MAX_AGE: Duration = Duration::from_secs(2);
/// The most accounts in the cache. Beyond it the outdated ones are dropped, or all if none is
/// outdated.
const CAPACITY: usize = 10_000;

/// Accounts by id, each at most two seconds old. A missing account is not cached: it is rare, and
/// the account may be created.
#[derive(Default)]
pub struct KnownUsers {
    users: Mutex<HashMap<UserId, (Arc<User>, Instant)>>,
}

impl KnownUsers {
    /// The account, from the cache or else from the store.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn get(
        &self,
        id: UserId,
        store: &dyn AccountStore,
        now: Instant,
    ) -> Result<Option<Arc<User>>, Error> {
        if let Some((user, read_at)) = self.lock().get(&id)
            && now.saturating_duration_since(*read_at) < MAX_AGE
        {
            return Ok(Some(Arc::clone(user)));
        }
        let Some(user) = store.user(id).await?.map(Arc::new) else {
            self.lock().remove(&id);
            return Ok(None);
        };
        let mut users = self.lock();
        if users.len() >= CAPACITY && !users.contains_key(&id) {
            users.retain(|_, (_, read_at)| now.saturating_duration_since(*read_at) < MAX_AGE);
            if users.len() >= CAPACITY {
                users.clear();
            }
        }
        users.insert(id, (Arc::clone(&user), now));
        Ok(Some(user))
    }

    /// Drops the account from the cache.
    pub fn forget(&self, id: UserId) {
        self.lock().remove(&id);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<UserId, (Arc<User>, Instant)>> {
        // Every change is one call on the map, so a panic with this lock leaves the map consistent.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
