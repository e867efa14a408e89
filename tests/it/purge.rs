//! Purging expired rows, with clocks that are right and wrong.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prompt_service::domain::{Timestamp, UserId};
use prompt_service::services::purge::Purge;
use prompt_service::store::{AccountStore, CallStore, KeyRecord, RevokedToken, Session};

use crate::store::{TestableStore, user};
use crate::support::Folder;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// A store, and a monotonic clock that the test moves.
struct Setting {
    store: Arc<dyn TestableStore>,
    _folder: Folder,
    user: UserId,
    now: Instant,
}

impl Setting {
    async fn new() -> Self {
        let folder = Folder::new();
        let store = folder.store().await;
        let user = user(&*store, "alice").await.id;
        let now = Instant::now();
        Self {
            store,
            _folder: folder,
            user,
            now,
        }
    }

    /// A process that purges for `hours`, and whose clock shows `clock` when it starts.
    async fn run(&mut self, clock: Timestamp, hours: u32) {
        let accounts: Arc<dyn AccountStore> = Arc::clone(&self.store) as _;
        let calls: Arc<dyn CallStore> = Arc::clone(&self.store) as _;
        let mut purge = Purge::new(accounts, calls, self.now);
        for hour in 0..=hours {
            let ran = HOUR * hour;
            let step = purge.step(clock.plus(ran), self.now + ran);
            step.await.unwrap();
        }
        self.now += HOUR * hours;
    }

    /// Stores a session, a revoked token and an idempotency key that expire at `end`.
    async fn put(&self, mark: u8, end: Timestamp) {
        let session = Session {
            token_hash: [mark; 32],
            user_id: self.user,
            created_at: end.minus(DAY),
            expires_at: end,
        };
        self.store.create_session(session, 100).await.unwrap();
        let token = RevokedToken {
            jti: mark.to_string(),
            expires_at: end,
        };
        self.store.log_out(&[], Some(token)).await.unwrap();
        let key = KeyRecord {
            user_id: self.user,
            key_hash: [mark; 32],
            fingerprint: [mark; 32],
            prompt_id: prompt_service::domain::PromptId(1),
            claimed_at: end.minus(DAY),
        };
        self.store.put_keys(vec![key]).await.unwrap();
    }

    /// Whether all three are still stored; fails if only some are.
    async fn is_kept(&self, mark: u8) -> bool {
        let sessions = self.store.sessions(&[[mark; 32]]).await.unwrap();
        let is_revoked = self
            .store
            .is_token_revoked(&mark.to_string())
            .await
            .unwrap();
        let keys = self.store.list_keys(None, 100).await.unwrap();
        let has_key = keys.iter().any(|key| key.key_hash == [mark; 32]);
        assert_eq!([!sessions.is_empty(), has_key], [is_revoked; 2]);
        is_revoked
    }
}

#[tokio::test]
async fn clock_that_is_ahead_for_one_start_purges_nothing() {
    for ahead in [DAY * 2, DAY * 30, DAY * 3650] {
        let mut setting = Setting::new().await;
        let clock = Timestamp::now();
        setting.run(clock, 1).await;
        setting.put(1, clock.plus(DAY)).await;
        setting.run(clock.plus(ahead), 48).await;
        assert!(setting.is_kept(1).await, "{ahead:?}");
        let later = clock.plus(HOUR * 49);
        setting.put(2, later.plus(DAY)).await;
        setting.run(later, 48).await;
        assert!(
            setting.is_kept(1).await && setting.is_kept(2).await,
            "{ahead:?}"
        );
    }
}

#[tokio::test]
async fn rows_that_expired_a_week_ago_are_purged_also_after_a_pause() {
    let mut setting = Setting::new().await;
    let clock = Timestamp::now();
    setting.run(clock, 0).await;
    for (mark, days) in [(1, 0), (2, 1), (3, 3)] {
        setting.put(mark, clock.plus(DAY * days)).await;
    }
    setting.run(clock, 7 * 24).await;
    assert!(!setting.is_kept(1).await);
    assert!(setting.is_kept(2).await);
    // The service was stopped for ten days; the purge catches up at twice its pace.
    let clock = clock.plus(DAY * 17);
    setting.run(clock, 24).await;
    assert!(!setting.is_kept(2).await);
    setting.run(clock.plus(DAY), 24).await;
    assert!(!setting.is_kept(3).await);
}

#[tokio::test]
async fn store_created_under_a_wrong_clock_purges_nothing_once_the_clock_is_right() {
    let mut setting = Setting::new().await;
    let clock = Timestamp::now();
    setting.run(clock.plus(DAY * 3650), 24).await;
    setting.put(1, clock.plus(DAY)).await;
    setting.run(clock, 24).await;
    assert!(setting.is_kept(1).await);
}
