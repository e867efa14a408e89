//! Calls in flight when something ends: the service, or the store for a while.

use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};
use tokio::net::TcpStream;

use super::{
    at, held_answer, held_stream, hello, post, post_with, posting, read_until, restart, service,
    shown,
};
use crate::support::{DEADLINE, Gate, Reply, Upstream, names, skipped_on_postgres};

#[tokio::test]
async fn calls_in_flight_finish_within_the_grace() {
    let upstream = Upstream::start().await;
    let (mut app, user) =
        service(&upstream, |config| config.server.shutdown_grace = DEADLINE).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut stream = post(&user, &hello()).await;
    read_until(&mut stream, "one two ").await;
    upstream.plan(held_stream(&gate));
    let mut left = post(&user, &hello()).await;
    read_until(&mut left, "one two ").await;
    drop(left);
    upstream.plan_many(2, &held_answer(&gate));
    let whole = posting(&user, None, &hello());
    let kept = posting(&user, Some("k"), &hello());
    eventually!(upstream.requests().len() == 4);
    app.begin_stop();
    eventually!(TcpStream::connect(app.addr).await.is_err());
    gate.open();
    assert_eq!(names(&stream.rest().await), ["delta", "completed"]);
    assert_eq!(whole.await.unwrap().status, 201);
    assert_eq!(kept.await.unwrap().status, 201);
    let app = restart(app.stopped().await, &upstream, |_| ()).await;
    let user = at(&app, user);
    let all = user.all_prompts().await;
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|prompt| prompt["status"] == "completed"));
    assert_eq!(user.similar("hello", 9).await.len(), 4);
    assert_eq!(upstream.requests().len(), 4);
}

#[tokio::test]
async fn calls_beyond_the_grace_are_broken_off_and_their_keys_are_free_at_the_next_start() {
    let upstream = Upstream::start().await;
    let (mut app, user) = service(&upstream, |config| {
        config.server.shutdown_grace = Duration::from_millis(200);
    })
    .await;
    upstream.plan(Reply::stream_head().delta("one ").hang());
    let mut stream = post(&user, &hello()).await;
    let (streamed, _) = read_until(&mut stream, "one ").await;
    upstream.plan_many(2, &Reply::default().hang());
    let clients = [None, Some("k")].map(|key| posting(&user, key, &hello()));
    eventually!(upstream.requests().len() == 3);
    app.begin_stop();
    assert!(stream.next().await.is_none(), "cut, without an end");
    let folder = app.stopped().await;
    drop(clients);
    eventually!(upstream.broken_off() == 3);
    let app = restart(folder, &upstream, |_| ()).await;
    let user = at(&app, user);
    // At once: the lease of a minute was released.
    let repeated = post_with(&user, "k", &hello()).await;
    assert_eq!(repeated.status, 201, "{repeated:?}");
    eventually!(shown(&user, streamed).await["status"] == "failed");
    let all = user.all_prompts().await;
    assert_eq!(all.len(), 3);
    let mut statuses: Vec<_> = all.iter().map(|each| each["status"].to_string()).collect();
    statuses.sort();
    assert_eq!(statuses, ["\"completed\"", "\"failed\"", "\"failed\""]);
}

/// Locks the database against all writes until it is dropped.
pub(super) fn locked(path: &std::path::Path) -> Connection {
    let mut connection = Connection::open(path).unwrap();
    connection.busy_timeout(DEADLINE).unwrap();
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    std::mem::forget(transaction.unwrap());
    connection
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_is_stored_when_the_store_is_back() {
    if skipped_on_postgres("it works on the file of SQLite itself") {
        return;
    }
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let (gate, kept) = (Gate::new(), Gate::new());
    upstream.plan(held_stream(&gate));
    let mut stream = post(&user, &hello()).await;
    read_until(&mut stream, "one two ").await;
    upstream.plan(held_answer(&kept));
    let whole = posting(&user, Some("k"), &hello());
    eventually!(upstream.requests().len() == 2);
    let away = locked(&app.folder.path().join("prompt-service.sqlite3"));
    gate.open();
    kept.open();
    let told = || {
        app.log
            .text()
            .matches("an outcome could not be stored yet")
            .count()
    };
    eventually!(told() >= 2);
    drop(away);
    assert_eq!(names(&stream.rest().await), ["delta", "completed"]);
    assert_eq!(whole.await.unwrap().status, 201);
    assert_eq!(user.all_prompts().await.len(), 2);
    assert_eq!(user.similar("hello", 9).await.len(), 2);
    assert_eq!(upstream.requests().len(), 2);
}
