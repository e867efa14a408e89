//! Accounts, sessions, revoked tokens.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use prompt_service::domain::{RevokedToken, Session, Timestamp, UserId};
use prompt_service::store::{Error, NewUser};

use crate::store::{TestableStore, list_users, new_user, user};

type Store = Arc<dyn TestableStore>;

fn session(mark: u8, user_id: UserId, expires_at: i64) -> Session {
    Session {
        token_hash: [mark; 32],
        user_id,
        created_at: Timestamp(10),
        expires_at: Timestamp(expires_at),
    }
}

fn token(jti: &str, expires_at: i64) -> RevokedToken {
    RevokedToken {
        jti: jti.to_owned(),
        expires_at: Timestamp(expires_at),
    }
}

/// More sessions than most cases make.
const LIMIT: usize = 100;

async fn stored(store: &dyn TestableStore, hash: &[u8; 32]) -> Option<Session> {
    store.sessions(&[*hash]).await.unwrap().pop()
}

/// Those of the given hashes whose session is stored.
async fn hashes(store: &dyn TestableStore, asked: &[[u8; 32]]) -> HashSet<[u8; 32]> {
    let sessions = store.sessions(asked).await.unwrap();
    sessions
        .into_iter()
        .map(|session| session.token_hash)
        .collect()
}

pub async fn an_account_is_made_active_and_read_back(store: Store) {
    let made = store.create_user(new_user("alice")).await.unwrap();
    assert!(made.id.0 > 0);
    assert!(made.is_active);
    assert_eq!(made.username, "alice");
    assert_eq!(made.email, "alice@example.org");
    assert_eq!(made.password_hash, "$argon2id$first");
    assert_eq!(made.created_at, Timestamp(1_000));
    assert_eq!(made.tokens_valid_from, Timestamp(0));
    assert_eq!(store.user(made.id).await.unwrap(), Some(made.clone()));
    assert_eq!(store.user_by_username("alice").await.unwrap(), Some(made));
}

pub async fn a_taken_username_is_refused_and_changes_nothing(store: Store) {
    let first = user(&*store, "alice").await;
    let second = NewUser {
        email: "other@example.org".to_owned(),
        ..new_user("alice")
    };
    let refused = store.create_user(second).await;
    assert!(matches!(refused, Err(Error::UsernameTaken)), "{refused:?}");
    assert_eq!(list_users(&*store, None, 10).await, [first]);
}

pub async fn usernames_are_compared_byte_by_byte(store: Store) {
    let lower = user(&*store, "alice").await;
    let upper = user(&*store, "Alice").await;
    let padded = user(&*store, "alice ").await;
    for made in [lower, upper, padded] {
        let found = store.user_by_username(&made.username).await.unwrap();
        assert_eq!(found, Some(made));
    }
    assert_eq!(store.user_by_username("ALICE").await.unwrap(), None);
}

pub async fn an_absent_account_is_none(store: Store) {
    assert_eq!(store.user(UserId(1)).await.unwrap(), None);
    assert_eq!(store.user(UserId(i64::MIN)).await.unwrap(), None);
    assert_eq!(store.user_by_username("").await.unwrap(), None);
}

pub async fn several_accounts_are_read_at_once(store: Store) {
    let alice = user(&*store, "alice").await;
    user(&*store, "bob").await;
    let carol = user(&*store, "carol").await;
    let asked = [carol.id, UserId(999), alice.id, alice.id];
    let mut found = store.users(&asked).await.unwrap();
    found.sort_by_key(|user| user.id);
    assert_eq!(found, [alice, carol]);
    assert_eq!(store.users(&[]).await.unwrap(), []);
}

pub async fn accounts_are_listed_by_rising_id_in_pages(store: Store) {
    let mut made = Vec::new();
    for name in ["c", "a", "b"] {
        made.push(user(&*store, name).await);
    }
    assert_eq!(list_users(&*store, None, 2).await, made[..2]);
    let after = Some(made[1].id);
    assert_eq!(list_users(&*store, after, 2).await, made[2..]);
    assert_eq!(list_users(&*store, Some(made[2].id), 2).await, []);
    assert_eq!(list_users(&*store, None, 0).await, []);
    assert_eq!(list_users(&*store, None, usize::MAX).await, made);
}

pub async fn disabling_moves_tokens_valid_from_and_deletes_sessions(store: Store) {
    let alice = user(&*store, "alice").await;
    let bob = user(&*store, "bob").await;
    for (mark, owner) in [(1, alice.id), (2, alice.id), (3, bob.id)] {
        store
            .create_session(session(mark, owner, 99), LIMIT)
            .await
            .unwrap();
    }
    assert!(
        store
            .set_active(alice.id, false, Timestamp(50))
            .await
            .unwrap()
    );
    let now = store.user(alice.id).await.unwrap().unwrap();
    assert!(!now.is_active);
    assert_eq!(now.tokens_valid_from, Timestamp(50));
    let asked = [[1; 32], [2; 32], [3; 32]];
    let stored = hashes(&*store, &asked).await;
    assert_eq!(stored, HashSet::from([[3; 32]]));
    assert_eq!(store.user(bob.id).await.unwrap(), Some(bob));
}

pub async fn enabling_keeps_tokens_valid_from_and_sessions(store: Store) {
    let alice = user(&*store, "alice").await;
    store
        .set_active(alice.id, false, Timestamp(50))
        .await
        .unwrap();
    let kept = session(1, alice.id, 99);
    store.create_session(kept.clone(), LIMIT).await.unwrap();
    assert!(
        store
            .set_active(alice.id, true, Timestamp(70))
            .await
            .unwrap()
    );
    let now = store.user(alice.id).await.unwrap().unwrap();
    assert!(now.is_active);
    assert_eq!(now.tokens_valid_from, Timestamp(50));
    assert_eq!(stored(&*store, &[1; 32]).await, Some(kept));
}

pub async fn tokens_valid_from_never_goes_back(store: Store) {
    let alice = user(&*store, "alice").await;
    store
        .set_active(alice.id, false, Timestamp(50))
        .await
        .unwrap();
    store
        .set_active(alice.id, false, Timestamp(40))
        .await
        .unwrap();
    store
        .set_password(alice.id, "second", Timestamp(30))
        .await
        .unwrap();
    let now = store.user(alice.id).await.unwrap().unwrap();
    assert_eq!(now.tokens_valid_from, Timestamp(50));
    assert_eq!(now.password_hash, "second");
}

pub async fn a_new_password_ends_sessions_and_tokens(store: Store) {
    let alice = user(&*store, "alice").await;
    let bob = user(&*store, "bob").await;
    store
        .create_session(session(1, alice.id, 99), LIMIT)
        .await
        .unwrap();
    store
        .create_session(session(2, bob.id, 99), LIMIT)
        .await
        .unwrap();
    assert!(
        store
            .set_password(alice.id, "second", Timestamp(50))
            .await
            .unwrap()
    );
    let now = store.user(alice.id).await.unwrap().unwrap();
    assert_eq!(now.password_hash, "second");
    assert_eq!(now.tokens_valid_from, Timestamp(50));
    assert!(now.is_active);
    assert_eq!(stored(&*store, &[1; 32]).await, None);
    assert!(stored(&*store, &[2; 32]).await.is_some());
}

pub async fn changing_an_absent_account_returns_false(store: Store) {
    let absent = UserId(7);
    assert!(!store.set_active(absent, false, Timestamp(1)).await.unwrap());
    assert!(!store.set_active(absent, true, Timestamp(1)).await.unwrap());
    assert!(!store.set_password(absent, "h", Timestamp(1)).await.unwrap());
    assert!(!store.upgrade_password_hash(absent, "h", "i").await.unwrap());
}

pub async fn a_hash_upgrade_keeps_sessions_and_tokens(store: Store) {
    let alice = user(&*store, "alice").await;
    let kept = session(1, alice.id, 99);
    store.create_session(kept.clone(), LIMIT).await.unwrap();
    let old = alice.password_hash.clone();
    assert!(
        store
            .upgrade_password_hash(alice.id, &old, "new")
            .await
            .unwrap()
    );
    let now = store.user(alice.id).await.unwrap().unwrap();
    assert_eq!(now.password_hash, "new");
    assert_eq!(now.tokens_valid_from, alice.tokens_valid_from);
    assert_eq!(stored(&*store, &[1; 32]).await, Some(kept));
}

pub async fn a_hash_upgrade_of_a_changed_hash_does_nothing(store: Store) {
    let alice = user(&*store, "alice").await;
    let answer = store.upgrade_password_hash(alice.id, "stale", "new").await;
    assert!(!answer.unwrap());
    assert_eq!(store.user(alice.id).await.unwrap(), Some(alice));
}

pub async fn a_session_is_read_back_even_when_expired(store: Store) {
    let alice = user(&*store, "alice").await;
    let expired = session(1, alice.id, i64::MIN);
    store.create_session(expired.clone(), LIMIT).await.unwrap();
    assert_eq!(stored(&*store, &[1; 32]).await, Some(expired));
    assert_eq!(stored(&*store, &[2; 32]).await, None);
}

pub async fn a_session_of_an_unknown_account_is_refused(store: Store) {
    let refused = store.create_session(session(1, UserId(7), 99), LIMIT).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(stored(&*store, &[1; 32]).await, None);
}

pub async fn stored_sessions_are_distinguished_from_others(store: Store) {
    let alice = user(&*store, "alice").await;
    store
        .create_session(session(1, alice.id, 0), LIMIT)
        .await
        .unwrap();
    store
        .create_session(session(2, alice.id, 99), LIMIT)
        .await
        .unwrap();
    store
        .create_session(session(3, alice.id, 99), LIMIT)
        .await
        .unwrap();
    let asked = [[1; 32], [3; 32], [4; 32], [3; 32]];
    let stored = hashes(&*store, &asked).await;
    assert_eq!(stored, HashSet::from([[1; 32], [3; 32]]));
    assert!(hashes(&*store, &[]).await.is_empty());
}

pub async fn a_session_beyond_the_limit_ends_the_oldest(store: Store) {
    let alice = user(&*store, "alice").await;
    let bob = user(&*store, "bob").await;
    let at = |mark: u8, owner, created_at: i64, expires_at: i64| Session {
        created_at: Timestamp(created_at),
        ..session(mark, owner, expires_at)
    };
    // An expired one, others of which the second is the oldest, and somebody else's.
    for row in [
        at(1, alice.id, 5, 39),
        at(2, alice.id, 20, 99),
        at(3, alice.id, 10, 99),
        at(4, alice.id, 30, 99),
        at(5, bob.id, 1, 99),
    ] {
        store.create_session(row, LIMIT).await.unwrap();
    }
    let asked: Vec<[u8; 32]> = (1..=9).map(|mark| [mark; 32]).collect();
    let left = async || {
        let mut left: Vec<u8> = hashes(&*store, &asked).await.iter().map(|h| h[0]).collect();
        left.sort_unstable();
        left
    };
    let new = at(6, alice.id, 40, 99);
    store.create_session(new.clone(), 3).await.unwrap();
    assert_eq!(
        left().await,
        [1, 2, 4, 5, 6],
        "the expired one is no matter"
    );
    // A lower limit than before ends several; the new one stays, though it is dated earlier.
    let new = at(7, alice.id, 15, 99);
    store.create_session(new.clone(), 2).await.unwrap();
    assert_eq!(left().await, [5, 6, 7]);
    assert_eq!(stored(&*store, &[7; 32]).await, Some(new));
    store
        .create_session(at(8, alice.id, 50, 99), 1)
        .await
        .unwrap();
    assert_eq!(left().await, [5, 8]);
}

pub async fn logging_out_deletes_the_session_and_remembers_the_token(store: Store) {
    let alice = user(&*store, "alice").await;
    store
        .create_session(session(1, alice.id, 99), LIMIT)
        .await
        .unwrap();
    store
        .create_session(session(2, alice.id, 99), LIMIT)
        .await
        .unwrap();
    assert!(!store.is_token_revoked("j1").await.unwrap());
    store
        .log_out(&[[1; 32]], Some(token("j1", 99)))
        .await
        .unwrap();
    assert_eq!(stored(&*store, &[1; 32]).await, None);
    assert!(stored(&*store, &[2; 32]).await.is_some());
    assert!(store.is_token_revoked("j1").await.unwrap());
    assert!(!store.is_token_revoked("J1").await.unwrap());
    let both = session(3, alice.id, 99);
    store.create_session(both, LIMIT).await.unwrap();
    let asked = [[3; 32], [2; 32], [4; 32], [3; 32]];
    store.log_out(&asked, None).await.unwrap();
    assert!(hashes(&*store, &asked).await.is_empty());
}

pub async fn logging_out_twice_or_of_nothing_is_no_error(store: Store) {
    store.log_out(&[], None).await.unwrap();
    for _ in 0..2 {
        store
            .log_out(&[[9; 32]], Some(token("j", 50)))
            .await
            .unwrap();
    }
    assert!(store.is_token_revoked("j").await.unwrap());
    // Of two expiries the later one counts.
    store.log_out(&[], Some(token("j", 60))).await.unwrap();
    store.log_out(&[], Some(token("j", 40))).await.unwrap();
    store.purge_expired(Timestamp(59)).await.unwrap();
    assert!(store.is_token_revoked("j").await.unwrap());
}

pub async fn the_horizon_of_the_purge_goes_forward_by_steps_and_back_at_once(store: Store) {
    let moved = async |latest, step| {
        let step = Duration::from_micros(step);
        let moved = store.move_purge_horizon(Timestamp(latest), step).await;
        moved.unwrap().0
    };
    assert_eq!(moved(100, 0).await, 100, "there was none");
    assert_eq!(moved(500, 0).await, 100);
    assert_eq!(moved(500, 30).await, 130);
    assert_eq!(moved(140, 30).await, 140);
    assert_eq!(moved(90, 30).await, 90);
    assert_eq!(moved(i64::MAX, 5).await, 95);
    assert_eq!(moved(i64::MAX, u64::MAX).await, i64::MAX);
    assert_eq!(moved(i64::MIN, 1).await, i64::MIN);
    assert_eq!(moved(7, u64::MAX).await, -1, "the longest step there is");
}

pub async fn purging_forgets_what_expired_at_or_before_the_horizon(store: Store) {
    let alice = user(&*store, "alice").await;
    for (mark, expires_at) in [(1, 49), (2, 50), (3, 51)] {
        let row = session(mark, alice.id, expires_at);
        store.create_session(row, LIMIT).await.unwrap();
        let row = token(&format!("j{mark}"), expires_at);
        store.log_out(&[], Some(row)).await.unwrap();
    }
    assert_eq!(store.purge_expired(Timestamp(50)).await.unwrap(), 4);
    assert_eq!(store.purge_expired(Timestamp(50)).await.unwrap(), 0);
    let asked = [[1; 32], [2; 32], [3; 32]];
    let stored = hashes(&*store, &asked).await;
    assert_eq!(stored, HashSet::from([[3; 32]]));
    assert!(!store.is_token_revoked("j2").await.unwrap());
    assert!(store.is_token_revoked("j3").await.unwrap());
}

pub async fn odd_texts_come_back_as_they_were(store: Store) {
    for name in [
        "",
        "'; DROP TABLE user; --",
        "日本語 ﷽",
        "%_",
        "\u{10FFFF}\u{7f}",
        "01",
    ] {
        let made = user(&*store, name).await;
        assert_eq!(store.user_by_username(name).await.unwrap(), Some(made));
    }
}
