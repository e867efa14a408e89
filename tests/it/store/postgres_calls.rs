//! Running calls in PostgreSQL while another transaction has locked their rows. Each case holds
//! that transaction open.

use std::sync::Arc;
use std::time::Duration;

use prompt_service::domain::PromptStatus;
use prompt_service::store::postgres::{OpenOptions, PostgresStore};
use prompt_service::store::{AccountStore, Begun, CallStore, KeyState, NewCall, PromptStore};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::task::TaskTracker;

use crate::store::calls::{call, claim, holder, started};
use crate::store::{newest, user};
use crate::support::postgres::Database;

async fn open(database: &Database) -> Arc<PostgresStore> {
    let options = OpenOptions::default();
    Arc::new(PostgresStore::open(&database.url(), options).await.unwrap())
}

/// Waits until a connection to the database waits for a lock.
async fn somebody_waits(client: &Client) {
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually!(
        client
            .query_one(waiting, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            > 0
    );
}

/// Begins a call again with its key while another transaction does `meanwhile` to its expired row.
/// That transaction ends after the row was seen as expired.
async fn begin_again_while(meanwhile: &str) -> (Begun, Arc<PostgresStore>, Database) {
    let database = Database::migrated().await;
    let store = open(&database).await;
    let alice = user(&*store, "alice").await.id;
    let keyed = NewCall {
        key: Some(claim(1, 1)),
        lease: Duration::ZERO,
        ..call(alice)
    };
    started(&*store, keyed.clone()).await;
    let (client, other) = (database.client().await, database.client().await);
    client
        .batch_execute(&format!("BEGIN; {meanwhile}"))
        .await
        .unwrap();
    let again = NewCall {
        holder: holder(2, 1),
        lease: Duration::from_secs(600),
        ..keyed
    };
    let retried = Arc::clone(&store);
    let begun: JoinHandle<Begun> =
        TaskTracker::new().spawn(async move { retried.begin_call(again).await.unwrap() });
    somebody_waits(&other).await;
    client.batch_execute("COMMIT").await.unwrap();
    let begun = begun.await.unwrap();
    // However the call ended, there is one row at most.
    let listed = newest(&*store, alice, 9).await;
    assert!(listed.len() <= 1, "{listed:?}");
    (begun, store, database)
}

fn known_state(begun: Begun) -> KeyState {
    match begun {
        Begun::Known(state) => state,
        Begun::Started(prompt) | Begun::OverLimit(prompt) => panic!("started: {prompt:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_answered_during_its_take_over_stays_answered() {
    let finish = "SELECT 1 FROM prompt FOR UPDATE; DELETE FROM running_call;
                  UPDATE prompt SET status = 'completed', response = 'Because.'";
    let (begun, store, _database) = begin_again_while(finish).await;
    let KeyState::Completed(id) = known_state(begun) else {
        panic!("the answer is replayed");
    };
    let alice = store.user_by_username("alice").await.unwrap().unwrap().id;
    let stored = store.prompt(alice, id).await.unwrap().unwrap();
    assert_eq!(stored.response.as_deref(), Some("Because."));
    assert_eq!(stored.status, PromptStatus::Completed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_renewed_during_its_take_over_keeps_its_holder() {
    let renew = "UPDATE running_call SET lease_until = lease_until + 600000000";
    let (begun, ..) = begin_again_while(renew).await;
    assert!(matches!(known_state(begun), KeyState::InFlight(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_deleted_during_its_take_over_stays_deleted() {
    let (begun, ..) = begin_again_while("DELETE FROM prompt").await;
    assert_eq!(known_state(begun), KeyState::Deleted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_during_a_take_over_releases_the_key_for_another_row() {
    let fail = "SELECT 1 FROM prompt FOR UPDATE; DELETE FROM running_call;
                UPDATE prompt SET status = 'failed', error = 'upstream_failed';
                DELETE FROM idempotency_key; DELETE FROM prompt";
    let (begun, ..) = begin_again_while(fail).await;
    assert!(matches!(begun, Begun::Started(_)), "{begun:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expiring_does_not_wait_for_a_renewal() {
    let database = Database::migrated().await;
    let store = open(&database).await;
    let alice = user(&*store, "alice").await.id;
    let over = || NewCall {
        lease: Duration::ZERO,
        ..call(alice)
    };
    let first = started(&*store, over()).await.id;
    let renewed = started(&*store, over()).await.id;
    let client = database.client().await;
    client
        .batch_execute(&format!(
            "BEGIN; UPDATE running_call SET lease_until = lease_until + 600000000 WHERE prompt_id = {}",
            renewed.0
        ))
        .await
        .unwrap();
    let expired = store.expire_calls(9, &[]).await.unwrap();
    assert_eq!(expired.len(), 1);
    assert_eq!(expired[0].prompt.id, first);
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(store.expire_calls(9, &[]).await.unwrap(), []);
}
