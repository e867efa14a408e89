//! Idempotency keys with a slow or failing upstream, and what is left of calls whose process died.

use std::time::{Duration, Instant};

use prompt_service::config::StoreConfig;
use serde_json::json;

use super::{
    at, held_answer, held_stream, hello, passed, post, post_with, posting, read_until, restart,
    service, shown, socket,
};
use crate::support::{DEADLINE, Folder, Gate, Reply, Upstream, names, postgres};

/// Makes the leases of all calls expire, as they do a minute after their process died.
async fn end_leases(folder: &Folder) {
    execute(folder, "UPDATE running_call SET lease_until = 0").await;
}

/// Changes rows of the store without the service.
async fn execute(folder: &Folder, sql: &str) {
    let changed = match folder.store_config().await {
        StoreConfig::Sqlite { path, .. } => {
            let file = rusqlite::Connection::open(path).unwrap();
            file.busy_timeout(DEADLINE).unwrap();
            file.execute(sql, []).unwrap() as u64
        }
        StoreConfig::Postgres { url, .. } => {
            let client = postgres::connect(url.expose()).await;
            client.execute(sql, &[]).await.unwrap()
        }
    };
    assert_ne!(changed, 0);
}

/// What another process does with a call whose lease expired, after it took the call over by its
/// key.
async fn answer_elsewhere(folder: &Folder, response: &str) {
    execute(folder, "DELETE FROM running_call").await;
    let completed =
        format!("UPDATE prompt SET status = 'completed', model = 'other', response = '{response}'");
    execute(folder, &completed).await;
}

/// A refusal that waits for the gate.
fn held_failure(gate: &Gate) -> Reply {
    Reply::default().wait(gate).and(Reply::error(400, &[]))
}

#[tokio::test]
async fn a_post_whose_call_another_process_took_over_is_answered_as_that_one_stored_it() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    // However the call of this process ends.
    for reply in [held_answer as fn(&Gate) -> Reply, held_failure] {
        let gate = Gate::new();
        upstream.plan(reply(&gate));
        let asked = upstream.requests().len();
        let key = format!("k{asked}");
        let first = posting(&user, Some(&key), &hello());
        eventually!(upstream.requests().len() > asked);
        answer_elsewhere(&app.folder, "from elsewhere").await;
        gate.open();
        let answered = first.await.unwrap();
        assert_eq!(answered.status, 201, "{answered:?}");
        let body = answered.json();
        assert_eq!(body["response"], "from elsewhere");
        assert_eq!(body["model"], "other");
        assert_eq!(answered.header("idempotent-replayed"), Some("true"));
        let again = post_with(&user, &key, &hello()).await;
        assert_eq!((again.status, again.json()), (201, body));
    }
}

#[tokio::test]
async fn a_stream_whose_call_another_process_took_over_ends_with_the_stored_answer() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    for stored in ["one two and more", "another text", "one"] {
        let gate = Gate::new();
        upstream.plan(held_stream(&gate));
        let key = stored.replace(' ', "-");
        let request = user.post("/api/prompts").header("idempotency-key", &key);
        let request = request.header("accept", "text/event-stream");
        let mut stream = request.json(&hello()).open().await;
        read_until(&mut stream, "one two ").await;
        answer_elsewhere(&app.folder, stored).await;
        gate.open();
        let mut text = "one two ".to_owned();
        let rest = stream.rest().await;
        let (last, rest) = rest.split_last().unwrap();
        for event in rest {
            match event.name.as_str() {
                // The text that was read before is not part of this answer.
                "started" => text.clear(),
                "delta" => text.push_str(event.data["text"].as_str().unwrap()),
                other => panic!("{other}"),
            }
        }
        assert_eq!(text, stored);
        assert_eq!(
            (last.name.as_str(), &last.data["response"]),
            ("completed", &json!(stored))
        );
    }
}

#[tokio::test]
async fn a_repetition_waits_for_a_slow_upstream_and_then_gets_its_answer() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    for (asked, is_streamed) in [(1, false), (2, true)] {
        let gate = Gate::new();
        let key = format!("k{asked}");
        let mut stream = None;
        let mut first = None;
        if is_streamed {
            upstream.plan(held_stream(&gate));
            let request = user.post("/api/prompts").header("idempotency-key", &key);
            let request = request.header("accept", "text/event-stream");
            stream = Some(request.json(&hello()).open().await);
        } else {
            upstream.plan(held_answer(&gate));
            first = Some(posting(&user, Some(&key), &hello()));
        }
        eventually!(upstream.requests().len() == asked);
        for body in [hello(), json!({ "prompt": "hello", "stream": true })] {
            let early = post_with(&user, &key, &body).await;
            assert_eq!(early.status, 409, "{early:?}");
            assert_eq!(early.json()["code"], "idempotency_key_in_use");
            assert_eq!(early.header("retry-after"), Some("1"));
        }
        gate.open();
        let answered = match (first, stream) {
            (Some(first), _) => {
                let first = first.await.unwrap();
                assert_eq!(first.status, 201);
                first.json()
            }
            (None, Some(mut stream)) => stream.rest().await.pop().unwrap().data,
            (None, None) => unreachable!(),
        };
        let replayed = post_with(&user, &key, &hello()).await;
        assert_eq!(replayed.status, 201);
        assert_eq!(replayed.header("idempotent-replayed"), Some("true"));
        assert_eq!(replayed.json(), answered);
        assert_eq!(upstream.requests().len(), asked);
        assert_eq!(user.all_prompts().await.len(), asked);
    }
}

#[tokio::test]
async fn a_failure_of_the_upstream_releases_the_key_and_the_repetition_asks_again() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::error(500, &[]));
    let failed = post_with(&user, "k", &hello()).await;
    assert_eq!(failed.status, 502);
    let again = post_with(&user, "k", &hello()).await;
    assert_eq!(again.status, 201);
    assert_eq!(again.header("idempotent-replayed"), None);
    assert_ne!(again.json()["id"], failed.json()["id"]);
    assert_eq!(upstream.requests().len(), 2);
    let replayed = post_with(&user, "k", &hello()).await;
    assert_eq!(replayed.body, again.body);
    assert_eq!(upstream.requests().len(), 2);
    let statuses: Vec<_> = user
        .all_prompts()
        .await
        .iter()
        .map(|prompt| prompt["status"].clone())
        .collect();
    assert_eq!(statuses, ["completed", "failed"]);
}

#[tokio::test]
async fn after_a_crash_a_key_ends_in_one_row_and_one_further_call() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::default().hang());
    upstream.plan(Reply::default().hang());
    let clients = ["k1", "k2"].map(|key| posting(&user, Some(key), &hello()));
    eventually!(upstream.requests().len() == 2);
    let folder = app.kill().await;
    for client in clients {
        client.await.unwrap_err();
    }
    let app = restart(folder, &upstream, |_| ()).await;
    let user = at(&app, user);
    let early = post_with(&user, "k1", &hello()).await;
    assert_eq!(early.status, 409, "{early:?}");
    end_leases(&app.folder).await;
    // The first is repeated until it is served, the second after its failure was reported.
    let answered = async || {
        let answer = post_with(&user, "k1", &hello()).await;
        assert!(matches!(answer.status, 201 | 409), "{answer:?}");
        answer.status == 201
    };
    eventually!(answered().await);
    let lapsed = async || {
        let all = user.all_prompts().await;
        assert_eq!(all.len(), 2);
        all.iter()
            .filter(|prompt| prompt["status"] == "failed")
            .count()
            == 1
    };
    eventually!(lapsed().await);
    let second = post_with(&user, "k2", &hello()).await;
    assert_eq!(second.status, 201, "{second:?}");
    assert_eq!(upstream.requests().len(), 4);
    let all = user.all_prompts().await;
    assert_eq!(all.len(), 2);
    assert!(all.iter().all(|prompt| prompt["status"] == "completed"));
    assert_eq!(user.similar("hello", 9).await.len(), 2);
}

#[tokio::test]
async fn after_a_crash_a_stream_without_a_key_fails_once_and_its_sockets_get_the_event() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::stream_head().delta("one ").hang());
    let mut stream = post(&user, &json!({ "prompt": "hello", "websocket": true })).await;
    let (id, _) = read_until(&mut stream, "one ").await;
    let folder = app.kill().await;
    assert!(stream.next().await.is_none());
    let app = restart(folder, &upstream, |_| ()).await;
    let user = at(&app, user);
    let mut socket = socket(&app, &user).await;
    // Only now: a socket that is opened later gets no event.
    end_leases(&app.folder).await;
    let event = socket.next_json().await;
    assert_eq!(event["event"], "prompt_failed");
    let failed = json!({ "detail": "The service stopped while the prompt was being answered.", "code": "interrupted", "id": id });
    assert_eq!(event["data"], failed);
    let shown = shown(&user, id).await;
    assert_eq!(shown["status"], "failed");
    assert_eq!(shown["response"], serde_json::Value::Null);
    assert_eq!(app.metric("calls_lapsed_total").await, Some(1.0));
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn after_a_crash_a_post_with_neither_stream_nor_key_is_kept_as_failed() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::default().hang());
    let client = posting(&user, None, &hello());
    eventually!(upstream.requests().len() == 1);
    let folder = app.kill().await;
    client.await.unwrap_err();
    let app = restart(folder, &upstream, |_| ()).await;
    end_leases(&app.folder).await;
    let user = at(&app, user);
    let ended = async || {
        let all = user.all_prompts().await;
        assert_eq!(all.len(), 1);
        all[0]["status"] == "failed" && all[0]["error"] == "interrupted"
    };
    eventually!(ended().await);
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_call_longer_than_its_lease_keeps_it() {
    let upstream = Upstream::start().await;
    // The lease is renewed after each quarter of it, so it also outlasts a process that does not
    // run for a while.
    let lease = Duration::from_secs(10);
    let (app, user) = service(&upstream, |config| config.calls.lease = lease).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut stream = post(&user, &hello()).await;
    let (id, _) = read_until(&mut stream, "one two ").await;
    let began = Instant::now();
    let outlived = async || {
        assert_eq!(shown(&user, id).await["status"], "running");
        passed(began, lease + lease / 2)
    };
    eventually!(outlived().await);
    gate.open();
    assert_eq!(names(&stream.rest().await), ["delta", "completed"]);
    assert_eq!(shown(&user, id).await["status"], "completed");
    assert_eq!(app.metric("calls_lapsed_total").await, Some(0.0));
    assert_eq!(upstream.requests().len(), 1);
}
