//! API keys.

use std::sync::Arc;
use std::time::Duration;

use prompt_service::domain::{
    ApiKey, ApiKeyChange, ApiKeyId, ApiKeyRecord, Budget, Period, Picodollars, PreviousSecret,
    Record, RecordCursor, Scope, Timestamp, UserId,
};
use prompt_service::store::{Error, NewSecret, USE_NOTED_EVERY};
use tokio::task::JoinSet;

use crate::store::{TestableStore, user};

type Store = Arc<dyn TestableStore>;

/// More keys than most cases make.
const LIMIT: usize = 100;
const NOW: Timestamp = Timestamp(1_000_000);

fn id(name: &str) -> ApiKeyId {
    ApiKeyId::parse(&format!("{name:0<8}")).unwrap()
}

/// A key of that user which never expires, with nothing but defaults.
pub fn plain(name: &str, user_id: UserId) -> ApiKeyRecord {
    ApiKeyRecord {
        key: ApiKey {
            id: id(name),
            user_id,
            name: name.to_owned(),
            scopes: [Scope::Chat].into_iter().collect(),
            models: Vec::new(),
            rates: None,
            budget: None,
            expires_at: None,
            created_at: Timestamp(5),
            last_used_at: None,
            last_four: "wxyz".to_owned(),
        },
        key_hash: [1; 32],
        previous: None,
        revoked_at: None,
    }
}

fn full(name: &str, user_id: UserId) -> ApiKeyRecord {
    let plain = plain(name, user_id);
    ApiKeyRecord {
        key: ApiKey {
            name: "schlüssel 🔑".to_owned(),
            scopes: Scope::ALL.into_iter().collect(),
            models: vec!["gpt-*".to_owned(), "llama3.2".to_owned()],
            rates: Some("2/s,100/day".parse().unwrap()),
            budget: Some(Budget {
                amount: Picodollars(i64::MAX),
                period: Period::Week,
            }),
            expires_at: Some(Timestamp(2_000_000)),
            last_used_at: Some(Timestamp(7)),
            ..plain.key
        },
        previous: Some(PreviousSecret {
            key_hash: [2; 32],
            until: Timestamp(99),
        }),
        revoked_at: Some(Timestamp(98)),
        ..plain
    }
}

async fn create(store: &Store, record: ApiKeyRecord) -> Result<(), Error> {
    store.create_api_key(record, LIMIT, NOW).await
}

async fn read(store: &Store, name: &str) -> ApiKeyRecord {
    store.api_key(id(name)).await.unwrap().unwrap()
}

async fn names(store: &Store, user_id: UserId) -> Vec<String> {
    let keys = store.api_keys(user_id).await.unwrap();
    keys.into_iter().map(|key| key.name).collect()
}

fn is_full(outcome: &Result<impl Sized, Error>) -> bool {
    matches!(outcome, Err(Error::TooManyApiKeys))
}

pub async fn a_key_is_read_back_whole(store: Store) {
    let alice = user(&*store, "alice").await.id;
    for record in [plain("a", alice), full("b", alice)] {
        let name = if record.revoked_at.is_some() {
            "b"
        } else {
            "a"
        };
        create(&store, record.clone()).await.unwrap();
        assert_eq!(read(&store, name).await, record);
    }
    assert_eq!(store.api_key(id("c")).await.unwrap(), None);
    assert_eq!(store.api_key(id("A")).await.unwrap(), None, "case counts");
}

pub async fn a_key_of_an_unknown_account_or_a_taken_id_is_refused(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let refused = create(&store, plain("a", UserId(999))).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    create(&store, plain("a", alice)).await.unwrap();
    let again = ApiKeyRecord {
        key_hash: [9; 32],
        ..plain("a", alice)
    };
    let refused = create(&store, again).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(read(&store, "a").await, plain("a", alice));
}

pub async fn keys_are_listed_newest_first_and_only_the_users(store: Store) {
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    for (name, owner, created_at) in [
        ("old", alice, 1),
        ("same1", alice, 3),
        ("same2", alice, 3),
        ("bobs", bob, 2),
        ("new", alice, 4),
    ] {
        let mut record = plain(name, owner);
        record.key.created_at = Timestamp(created_at);
        create(&store, record).await.unwrap();
    }
    assert_eq!(names(&store, alice).await, ["new", "same2", "same1", "old"]);
    assert_eq!(names(&store, bob).await, ["bobs"]);
    assert_eq!(names(&store, UserId(999)).await, [""; 0]);
}

pub async fn a_revoked_key_keeps_its_row_and_is_absent_otherwise(store: Store) {
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    create(&store, plain("a", alice)).await.unwrap();
    assert!(!store.revoke_api_key(bob, id("a"), NOW).await.unwrap());
    assert!(!store.revoke_api_key(alice, id("b"), NOW).await.unwrap());
    assert_eq!(read(&store, "a").await.revoked_at, None);
    assert!(store.revoke_api_key(alice, id("a"), NOW).await.unwrap());
    let later = Timestamp(NOW.0 + 1);
    assert!(!store.revoke_api_key(alice, id("a"), later).await.unwrap());
    assert_eq!(read(&store, "a").await.revoked_at, Some(NOW));
    assert_eq!(names(&store, alice).await, [""; 0]);
    let change = ApiKeyChange::default();
    let changed = store.change_api_key(alice, id("a"), change, LIMIT, NOW);
    assert_eq!(changed.await.unwrap(), None);
    let rotated = store.rotate_api_key(alice, id("a"), secret(None));
    assert_eq!(rotated.await.unwrap(), None);
    let used = store.note_api_key_use(id("a"), NOW).await.unwrap();
    assert!(!used);
}

pub async fn a_change_replaces_what_it_names(store: Store) {
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    let before = ApiKeyRecord {
        revoked_at: None,
        ..full("a", alice)
    };
    create(&store, before.clone()).await.unwrap();
    let change = ApiKeyChange {
        name: Some("other".to_owned()),
        rates: Some(None),
        budget: Some(None),
        expires_at: Some(None),
        ..ApiKeyChange::default()
    };
    let of_others = store.change_api_key(bob, id("a"), change.clone(), LIMIT, NOW);
    assert_eq!(of_others.await.unwrap(), None);
    assert_eq!(read(&store, "a").await, before);
    let changed = store.change_api_key(alice, id("a"), change.clone(), LIMIT, NOW);
    let changed = changed.await.unwrap().unwrap();
    assert_eq!(changed, change.apply(before.key.clone()));
    let expected = ApiKeyRecord {
        key: changed,
        ..before
    };
    assert_eq!(read(&store, "a").await, expected);
    let change = ApiKeyChange {
        scopes: Some([Scope::Write].into_iter().collect()),
        models: Some(vec!["x".to_owned()]),
        rates: Some(Some("7/h".parse().unwrap())),
        budget: Some(Some(Picodollars(8))),
        budget_period: Some(Some(Period::Day)),
        expires_at: Some(Some(Timestamp(i64::MAX))),
        ..ApiKeyChange::default()
    };
    let changed = store.change_api_key(alice, id("a"), change.clone(), LIMIT, NOW);
    assert_eq!(
        changed.await.unwrap().unwrap(),
        change.apply(expected.key.clone())
    );
}

fn secret(previous_until: Option<Timestamp>) -> NewSecret {
    NewSecret {
        key_hash: [7; 32],
        last_four: "next".to_owned(),
        previous_until,
    }
}

pub async fn a_rotation_keeps_the_last_secret_alone_for_its_grace(store: Store) {
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    create(&store, plain("a", alice)).await.unwrap();
    let of_others = store.rotate_api_key(bob, id("a"), secret(None)).await;
    assert_eq!(of_others.unwrap(), None);
    let until = Timestamp(50);
    let rotated = store.rotate_api_key(alice, id("a"), secret(Some(until)));
    let rotated = rotated.await.unwrap().unwrap();
    assert_eq!(rotated.last_four, "next");
    let found = read(&store, "a").await;
    assert_eq!((found.key_hash, &found.key), ([7; 32], &rotated));
    let previous = PreviousSecret {
        key_hash: [1; 32],
        until,
    };
    assert_eq!(found.previous, Some(previous));
    let second = NewSecret {
        key_hash: [8; 32],
        ..secret(Some(Timestamp(60)))
    };
    store.rotate_api_key(alice, id("a"), second).await.unwrap();
    let previous = read(&store, "a").await.previous.unwrap();
    assert_eq!(previous.key_hash, [7; 32], "the first is forgotten");
    store
        .rotate_api_key(alice, id("a"), secret(None))
        .await
        .unwrap();
    assert_eq!(read(&store, "a").await.previous, None);
}

pub async fn a_user_has_no_more_live_keys_than_allowed(store: Store) {
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    let mut expired = plain("expired", alice);
    expired.key.expires_at = Some(NOW);
    store.create_api_key(expired, 2, NOW).await.unwrap();
    for name in ["a", "b"] {
        let made = store.create_api_key(plain(name, alice), 2, NOW);
        made.await.unwrap();
    }
    let refused = store.create_api_key(plain("c", alice), 2, NOW).await;
    assert!(is_full(&refused), "{refused:?}");
    assert_eq!(store.api_key(id("c")).await.unwrap(), None);
    let made = store.create_api_key(plain("d", bob), 2, NOW).await;
    made.unwrap();
    // The expired key cannot become live beside them.
    let revive = ApiKeyChange {
        name: Some("revived".to_owned()),
        expires_at: Some(None),
        ..ApiKeyChange::default()
    };
    let change = |limit| store.change_api_key(alice, id("expired"), revive.clone(), limit, NOW);
    let refused = change(2).await;
    assert!(is_full(&refused), "{refused:?}");
    assert_eq!(read(&store, "expired").await.key.name, "expired");
    assert!(change(3).await.unwrap().is_some());
    // A live key can be changed however many there are.
    let rename = ApiKeyChange {
        expires_at: None,
        ..revive
    };
    let renamed = store.change_api_key(alice, id("a"), rename, 1, NOW).await;
    assert!(renamed.unwrap().is_some());
    store.revoke_api_key(alice, id("a"), NOW).await.unwrap();
    let made = store.create_api_key(plain("e", alice), 3, NOW).await;
    made.unwrap();
}

pub async fn expired_keys_beyond_the_limit_are_revoked(store: Store) {
    let alice = user(&*store, "alice").await.id;
    for (name, expires_at) in [("x3", 30), ("x1", 10), ("x2", 20)] {
        let mut record = plain(name, alice);
        record.key.expires_at = Some(Timestamp(expires_at));
        let made = store.create_api_key(record, 2, Timestamp(1)).await;
        // Two are live, and the third is refused.
        assert_eq!(is_full(&made), name == "x2");
    }
    let mut record = plain("x2", alice);
    record.key.expires_at = Some(Timestamp(20));
    store
        .create_api_key(record, 2, Timestamp(15))
        .await
        .unwrap();
    let made = store.create_api_key(plain("a", alice), 2, NOW).await;
    made.unwrap();
    assert_eq!(names(&store, alice).await, ["x3", "x2", "a"]);
    assert_eq!(read(&store, "x1").await.revoked_at, Some(Timestamp(10)));
}

pub async fn a_use_is_noted_once_a_minute(store: Store) {
    let alice = user(&*store, "alice").await.id;
    create(&store, plain("a", alice)).await.unwrap();
    let at = |seconds| NOW.plus(Duration::from_secs(seconds));
    let every = USE_NOTED_EVERY.as_secs();
    for (seconds, is_noted) in [
        (0, true),
        (0, false),
        (every - 1, false),
        (every, true),
        (2 * every - 1, false),
        (2 * every, true),
        // A clock that is set back a little changes nothing, and a wrong one does not stay.
        (every + 1, false),
        (0, true),
    ] {
        let noted = store.note_api_key_use(id("a"), at(seconds)).await;
        assert_eq!(noted.unwrap(), is_noted, "{seconds}");
        if is_noted {
            let last = read(&store, "a").await.key.last_used_at;
            assert_eq!(last, Some(at(seconds)));
        }
    }
    assert!(!store.note_api_key_use(id("b"), NOW).await.unwrap());
}

pub async fn racing_creators_stop_at_the_limit_of_keys(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut racers = JoinSet::new();
    for n in 0..24 {
        let store = Arc::clone(&store);
        racers.spawn(async move {
            let made = store.create_api_key(plain(&format!("r{n:02}"), alice), 5, NOW);
            match made.await {
                Ok(()) => true,
                Err(Error::TooManyApiKeys) => false,
                Err(error) => panic!("{error:?}"),
            }
        });
    }
    let made = racers.join_all().await;
    assert_eq!(made.into_iter().filter(|made| *made).count(), 5);
    assert_eq!(names(&store, alice).await.len(), 5);
}

pub async fn racing_uses_of_a_key_are_noted_once(store: Store) {
    let alice = user(&*store, "alice").await.id;
    create(&store, plain("a", alice)).await.unwrap();
    let mut racers = JoinSet::new();
    for n in 0..16 {
        let store = Arc::clone(&store);
        let now = Timestamp(NOW.0 + n);
        racers.spawn(async move { store.note_api_key_use(id("a"), now).await.unwrap() });
    }
    let noted = racers.join_all().await;
    assert_eq!(noted.into_iter().filter(|noted| *noted).count(), 1);
}

pub async fn keys_are_put_and_listed_whole_by_rising_bytes_of_the_id(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let records = [
        plain("0", alice),
        full("B", alice),
        plain("a", alice),
        full("b", alice),
    ];
    let shuffled = [3, 0, 2, 1].map(|n| Record::ApiKey(records[n].clone()));
    store.put(shuffled.to_vec()).await.unwrap();
    let changed = ApiKeyRecord {
        key_hash: [9; 32],
        ..plain("0", alice)
    };
    store.put(vec![Record::ApiKey(changed)]).await.unwrap();
    let first = store.records(RecordCursor::ApiKeys(None), 3).await.unwrap();
    assert_eq!(
        first,
        records[..3]
            .iter()
            .cloned()
            .map(Record::ApiKey)
            .collect::<Vec<_>>()
    );
    let rest = store.records(first[2].cursor(), 3).await.unwrap();
    assert_eq!(rest, [Record::ApiKey(records[3].clone())]);
    let orphan = Record::ApiKey(plain("z", UserId(999)));
    let refused = store.put(vec![orphan]).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
}
