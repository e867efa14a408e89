//! The store is unavailable, or the clock wrong, while the upstream is asked. Nothing is paid for
//! that could not be stored, and what was paid for is stored or reported as lost. These tests lock
//! SQLite's file; `tests/python` tests outages of PostgreSQL.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use prompt_service::config::Config;
use rusqlite::Connection;
use serde_json::json;

use super::endings::locked;
use super::{held_answer, hello, passed, post_with, posting, service, shown, socket};
use crate::support::{App, DEADLINE, Gate, Upstream, skipped_on_postgres, spawn_app};

/// A lease that a test can wait for.
const LEASE: Duration = Duration::from_secs(2);

fn short_lease(config: &mut Config) {
    config.calls.lease = LEASE;
}

fn database(app: &App) -> PathBuf {
    app.folder.path().join("prompt-service.sqlite3")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_store_is_unavailable_the_upstream_is_not_asked() {
    if skipped_on_postgres("it works on the file of SQLite itself") {
        return;
    }
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let away = locked(&database(&app));
    let plain = posting(&user, None, &hello());
    let streamed = posting(&user, None, &json!({ "prompt": "hello", "stream": true }));
    for post in [plain, streamed] {
        let refused = post.await.unwrap();
        assert_eq!(refused.status, 503, "{refused:?}");
        assert_eq!(refused.json()["code"], "unavailable");
    }
    drop(away);
    assert_eq!(upstream.requests().len(), 0);
    assert_eq!(user.try_prompt("hello").await.status, 201);
    assert_eq!(user.all_prompts().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_cannot_be_counted_is_not_begun() {
    if skipped_on_postgres("it works on the file of SQLite itself") {
        return;
    }
    let upstream = Upstream::start().await;
    let limited = |config: &mut prompt_service::config::Config| {
        config.calls.daily_limit = Some(9);
    };
    let (paid, payer) = service(&upstream, limited).await;
    let mock = spawn_app(limited).await;
    let other = mock.user("alice").await;
    for (app, user) in [(&paid, &payer), (&mock, &other)] {
        let away = locked(&database(app));
        let refused = user.try_prompt("hello").await;
        assert_eq!(refused.status, 503, "{refused:?}");
        assert_eq!(refused.json()["code"], "unavailable");
        drop(away);
        assert_eq!(user.all_prompts().await.len(), 0);
        assert_eq!(user.try_prompt("hello").await.status, 201);
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_whose_call_another_process_ended_is_reported_as_that_one_stored_it() {
    if skipped_on_postgres("it works on the file of SQLite itself") {
        return;
    }
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let gate = Gate::new();
    upstream.plan(held_answer(&gate));
    let announced = json!({ "prompt": "hello", "websocket": true });
    let whole = posting(&user, None, &announced);
    eventually!(upstream.requests().len() == 1);
    let away = locked(&database(&app));
    gate.open();
    eventually!(
        app.log
            .text()
            .contains("an outcome could not be stored yet")
    );
    // What another process does with a call whose lease expired.
    away.execute_batch(
        "DELETE FROM running_call;
         UPDATE prompt SET status = 'failed', error = 'interrupted';
         COMMIT",
    )
    .unwrap();
    let failed = whole.await.unwrap();
    assert_eq!(failed.status, 502, "{failed:?}");
    assert_eq!(failed.json()["code"], "interrupted");
    let id = failed.json()["id"].as_i64().unwrap();
    assert_eq!(shown(&user, id).await["status"], "failed");
    assert!(user.similar("hello", 9).await.is_empty());
    // The sockets get the event of the next prompt first: the process that ended this call has
    // reported it.
    let next = user.post("/api/prompts").json(&announced).send().await;
    assert_eq!(socket.next_json().await["data"], next.json());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_ends_none_of_its_calls_even_if_their_leases_expired() {
    if skipped_on_postgres("it works on the file of SQLite itself") {
        return;
    }
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, short_lease).await;
    let gate = Gate::new();
    upstream.plan(held_answer(&gate));
    let whole = posting(&user, Some("k"), &hello());
    eventually!(upstream.requests().len() == 1);
    let connection = Connection::open(database(&app)).unwrap();
    connection.busy_timeout(DEADLINE).unwrap();
    let began = Instant::now();
    // As if the clock jumped or the process stood still. Repeated, so that no renewal comes in
    // time.
    eventually!({
        let over = "UPDATE running_call SET lease_until = 0";
        assert_eq!(connection.execute(over, []).unwrap(), 1);
        passed(began, 2 * LEASE)
    });
    connection
        .execute("UPDATE running_call SET lease_until = 0", [])
        .unwrap();
    let repeated = post_with(&user, "k", &hello()).await;
    assert_eq!(repeated.status, 409, "{repeated:?}");
    gate.open();
    assert_eq!(whole.await.unwrap().status, 201);
    assert_eq!(app.metric("calls_lapsed_total").await, Some(0.0));
    assert_eq!(upstream.requests().len(), 1);
}
