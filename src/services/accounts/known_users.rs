//! A short-lived cache of accounts, so that not every request asks the store whether its user still
//! exists.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hashlink::LinkedHashMap;
use parking_lot::Mutex;

use crate::domain::{User, UserId};
use crate::error::Error;
use crate::store::AccountStore;

/// How old an entry may be for an access token or a session. A disabled account or a changed password takes effect within this time
/// plus one request, on every process that shares the store; the contract allows 5 s.
pub const MAX_AGE: Duration = Duration::from_secs(2);
/// The most entries. Beyond it the entry that was read first is removed.
const CAPACITY: usize = 10_000;

/// Accounts by id, with the time at which each was read. A missing account is not remembered: it is
/// rare, and the account may be created.
#[derive(Default)]
pub struct KnownUsers {
    users: Mutex<LinkedHashMap<UserId, (Arc<User>, Instant)>>,
}

impl KnownUsers {
    /// Returns the account, from memory if it is no older than `max_age` there, or else from the
    /// store.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn get(
        &self,
        id: UserId,
        max_age: Duration,
        store: &dyn AccountStore,
        now: Instant,
    ) -> Result<Option<Arc<User>>, Error> {
        if let Some((user, read_at)) = self.users.lock().get(&id)
            && now.saturating_duration_since(*read_at) < max_age
        {
            return Ok(Some(Arc::clone(user)));
        }
        let Some(user) = store.user(id).await?.map(Arc::new) else {
            self.users.lock().remove(&id);
            return Ok(None);
        };
        let mut users = self.users.lock();
        users.insert(id, (Arc::clone(&user), now));
        if users.len() > CAPACITY {
            users.pop_front();
        }
        Ok(Some(user))
    }

    /// Removes the account, so that the next request reads it from the store.
    pub fn forget(&self, id: UserId) {
        self.users.lock().remove(&id);
    }
}
