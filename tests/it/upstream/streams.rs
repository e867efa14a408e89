//! Streams while the upstream is still writing: subscribers that read, that leave, and what a
//! disconnect does.

use std::time::Duration;

use prompt_service::config::OnClientDisconnect;
use prompt_service::credentials::TokenType;
use prompt_service::domain::{Timestamp, UserId};
use serde_json::{Value, json};

use super::{
    held_answer, held_stream, hello, outcome, post, posting, read_until, service, shown, socket,
};
use crate::support::{App, Gate, PASSWORD, Reply, Stream, Upstream, User, names, text_of};

async fn read(user: &User, id: i64, last: Option<&str>) -> Stream {
    let mut request = user
        .get(&format!("/api/prompts/{id}"))
        .header("accept", "text/event-stream");
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    request.open().await
}

/// The same user with the token of a new login.
async fn logged_in_again(app: &App, user: &User) -> User {
    eventually!(app.try_login("alice", PASSWORD).await.status == 200);
    let (access, refresh) = app.login("alice").await;
    let user = User {
        id: user.id,
        client: app.client().with_bearer(&access),
        access,
        refresh,
    };
    eventually!(user.get("/api/auth/me/").send().await.status == 200);
    user
}

/// Asserts that the answer to the first request was read to its end: its connection serves another
/// request.
async fn assert_first_was_not_broken_off(upstream: &Upstream, user: &User) {
    let first = upstream.requests()[0].connection;
    eventually!({
        let before = upstream.requests().len();
        user.prompt("next").await;
        let requests = upstream.requests();
        requests[before..]
            .iter()
            .any(|request| request.connection == first)
    });
    assert_eq!(upstream.broken_off(), 0);
}

#[tokio::test]
async fn others_read_along_from_the_beginning_and_from_where_one_left_off() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut first = post(&user, &hello()).await;
    let (id, last) = read_until(&mut first, "one two ").await;
    let running = shown(&user, id).await;
    assert_eq!(running["status"], "running");
    assert_eq!(running["response"], Value::Null);
    let mut second = read(&user, id, None).await;
    assert_eq!(read_until(&mut second, "one two ").await.0, id);
    let mut third = read(&user, id, Some(&last)).await;
    gate.open();
    let (first, second, third) = tokio::join!(first.rest(), second.rest(), third.rest());
    for rest in [&first, &second, &third] {
        assert_eq!(names(rest), ["delta", "completed"]);
        assert_eq!(text_of(rest), "three");
        assert_eq!(rest.last().unwrap().data["response"], "one two three");
        assert_eq!(rest.last(), first.last());
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_stream_without_readers_is_finished_stored_and_announced() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut stream = post(&user, &json!({ "prompt": "hello", "websocket": true })).await;
    let (id, last) = read_until(&mut stream, "one two ").await;
    drop(stream);
    gate.open();
    let event = outcome(&mut socket).await;
    assert_eq!(event["event"], "prompt_completed");
    assert_eq!(event["data"]["response"], "one two three");
    assert_eq!(shown(&user, id).await["status"], "completed");
    assert_eq!(user.similar("hello", 1).await, [id]);
    let rest = read(&user, id, Some(&last)).await.rest().await;
    assert_eq!(text_of(&rest), "three");
    assert_first_was_not_broken_off(&upstream, &user).await;
}

#[tokio::test]
async fn a_whole_post_is_shown_as_running_and_then_reported_in_one_piece() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let gate = Gate::new();
    upstream.plan(held_answer(&gate));
    let client = posting(
        &user,
        None,
        &json!({ "prompt": "hello", "websocket": true }),
    );
    eventually!(upstream.requests().len() == 1);
    let running = user.all_prompts().await;
    assert_eq!(running.len(), 1);
    assert_eq!(running[0]["status"], "running");
    let mut along = read(&user, running[0]["id"].as_i64().unwrap(), None).await;
    assert_eq!(along.next().await.unwrap().name, "started");
    gate.open();
    let answer = client.await.unwrap();
    assert_eq!(answer.status, 201);
    assert_eq!(answer.json()["id"], running[0]["id"]);
    let event = socket.next_json().await;
    assert_eq!(event["event"], "prompt_completed");
    assert_eq!(event["data"], answer.json());
    assert_eq!(names(&along.rest().await), ["delta", "completed"]);
}

#[tokio::test]
async fn a_prompt_deleted_while_it_is_answered_here_ends_for_its_readers_and_sockets() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let announced = json!({ "prompt": "hello", "websocket": true });
    let mut stream = post(&user, &announced).await;
    let (id, _) = read_until(&mut stream, "one two ").await;
    let mut told = String::new();
    while told != "one two " {
        let piece = socket.next_json().await;
        assert_eq!(piece["event"], "prompt.delta");
        told.push_str(piece["data"]["text"].as_str().unwrap());
    }
    let path = format!("/api/prompts/{id}");
    assert_eq!(user.delete(&path).send().await.status, 204);
    // The upstream is still writing.
    let events = stream.rest().await;
    assert_eq!(names(&events), ["failed"]);
    let deleted = json!({ "detail": "The prompt was deleted while it was being answered.", "code": "prompt_deleted", "id": id });
    assert_eq!(events[0].data, deleted);
    let event = socket.next_json().await;
    assert_eq!(event["event"], "prompt_failed");
    assert_eq!(event["data"], deleted);
    assert_eq!(read(&user, id, None).await.status, 404);
    gate.open();
    eventually!(app.metric("calls_running").await == Some(0.0));

    // A whole answer is announced at its end too, and no end is announced twice.
    let gate = Gate::new();
    upstream.plan(held_answer(&gate));
    let client = posting(&user, None, &announced);
    eventually!(upstream.requests().len() == 2);
    let id = user.all_prompts().await[0]["id"].as_i64().unwrap();
    let path = format!("/api/prompts/{id}");
    assert_eq!(user.delete(&path).send().await.status, 204);
    gate.open();
    let gone = client.await.unwrap();
    assert_eq!(gone.status, 410, "{gone:?}");
    assert_eq!(gone.json()["code"], "prompt_deleted");
    let event = socket.next_json().await;
    assert_eq!(event["event"], "prompt_failed");
    assert_eq!(event["data"]["code"], "prompt_deleted");
    assert_eq!(event["data"]["id"], id);
    assert!(user.similar("hello", 9).await.is_empty());
}

#[tokio::test]
async fn with_cancel_a_stream_ends_with_its_last_reader() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        config.calls.on_client_disconnect = OnClientDisconnect::Cancel;
    })
    .await;
    let mut socket = socket(&app, &user).await;
    upstream.plan(Reply::stream_head().delta("one ").delta("two ").hang());
    let mut stream = post(&user, &json!({ "prompt": "hello", "websocket": true })).await;
    let (id, _) = read_until(&mut stream, "one two ").await;
    let mut other = read(&user, id, None).await;
    read_until(&mut other, "one two ").await;
    drop(stream);
    eventually!(app.metric("http_connections").await <= Some(3.0));
    assert_eq!(shown(&user, id).await["status"], "running");
    assert_eq!(upstream.broken_off(), 0);
    drop(other);
    let event = outcome(&mut socket).await;
    assert_eq!(event["event"], "prompt_failed");
    assert_eq!(event["data"]["code"], "cancelled");
    let failed = shown(&user, id).await;
    assert_eq!(failed["status"], "failed");
    assert_eq!(failed["error"], "cancelled");
    eventually!(upstream.broken_off() == 1);
    assert!(user.similar("hello", 1).await.is_empty());
}

#[tokio::test]
async fn a_stream_ends_within_five_seconds_after_its_account_was_disabled() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut stream = post(&user, &hello()).await;
    let (id, last) = read_until(&mut stream, "one two ").await;
    let mut along = read(&user, id, None).await;
    read_until(&mut along, "one two ").await;
    // As the operator's command does it, beside the running service.
    let store = app.folder.store().await;
    let user_id = UserId(user.id);
    let change = store.set_active(user_id, false, Timestamp::now());
    assert!(change.await.unwrap());
    let (stream, along) = tokio::join!(stream.rest(), along.rest());
    // The upstream is still writing, and no event says that the answer ended.
    assert_eq!((stream, along), (Vec::new(), Vec::new()));
    gate.open();
    let change = store.set_active(user_id, true, Timestamp::now());
    assert!(change.await.unwrap());
    let user = logged_in_again(&app, &user).await;
    let rest = read(&user, id, Some(&last)).await.rest().await;
    assert_eq!(text_of(&rest), "three");
}

#[tokio::test]
async fn a_stream_ends_with_its_token_and_goes_on_with_a_new_one() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        config.calls.on_client_disconnect = OnClientDisconnect::Cancel;
    })
    .await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let lifetime = Duration::from_secs(4);
    let access = app.token(TokenType::Access, user.id, Timestamp::now(), lifetime);
    let soon_expired = User {
        client: app.client().with_bearer(&access),
        access,
        refresh: user.refresh.clone(),
        id: user.id,
    };
    let mut stream = post(&soon_expired, &hello()).await;
    let (id, last) = read_until(&mut stream, "one two ").await;
    assert_eq!(stream.rest().await, []);
    assert_eq!(read(&soon_expired, id, Some(&last)).await.status, 401);
    // It has no reader at the moment, and is not cancelled.
    let mut rest = read(&user, id, Some(&last)).await;
    gate.open();
    let rest = rest.rest().await;
    assert_eq!(text_of(&rest), "three");
    assert_eq!(names(&rest), ["delta", "completed"]);
}

#[tokio::test]
async fn a_whole_answer_whose_caller_hung_up_is_stored_and_announced() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    for (asked, key) in [(1, None), (2, Some("k"))] {
        let gate = Gate::new();
        upstream.plan(held_answer(&gate));
        let body = json!({ "prompt": "hello", "websocket": true });
        let client = posting(&user, key, &body);
        eventually!(upstream.requests().len() == asked);
        client.abort();
        client.await.unwrap_err();
        gate.open();
        let event = outcome(&mut socket).await;
        assert_eq!(event["event"], "prompt_completed");
        let id = event["data"]["id"].as_i64().unwrap();
        assert_eq!(shown(&user, id).await["response"], "at last");
        assert_eq!(user.similar("hello", 9).await.len(), asked);
    }
    assert_first_was_not_broken_off(&upstream, &user).await;
}

#[tokio::test]
async fn with_cancel_a_whole_answer_ends_with_its_caller() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        config.calls.on_client_disconnect = OnClientDisconnect::Cancel;
    })
    .await;
    let mut socket = socket(&app, &user).await;
    for (asked, key) in [(1, None), (2, Some("k"))] {
        upstream.plan(Reply::default().hang());
        let body = json!({ "prompt": "hello", "websocket": true });
        let client = posting(&user, key, &body);
        eventually!(upstream.requests().len() == asked);
        client.abort();
        let event = outcome(&mut socket).await;
        assert_eq!(event["event"], "prompt_failed");
        assert_eq!(event["data"]["code"], "cancelled");
        let failed = shown(&user, event["data"]["id"].as_i64().unwrap()).await;
        assert_eq!(failed["error"], "cancelled");
        eventually!(upstream.broken_off() == asked);
    }
    // The cancelled post has released its key.
    let again = super::post_with(&user, "k", &hello()).await;
    assert_eq!(again.status, 201, "{again:?}");
}
