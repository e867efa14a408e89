//! Streamed answers: their events, resuming, and who may read them.

use std::time::Duration;

use prompt_service::domain::{PromptSource, Timestamp, UserId};
use prompt_service::store::{Begun, CallBudgets, CallOutcome, CallStore, Holder, NewCall};
use serde_json::{Value, json};

use crate::support::{DEADLINE, Stream, User, names, spawn_app, text_of, within_a_day};

const EVENT_STREAM: &str = "text/event-stream";
const THROUGH_OTHERS: Holder = Holder {
    replica: [9; 16],
    call: 1,
};

async fn post(user: &User, body: &Value) -> Stream {
    let request = user.post("/api/prompts").header("accept", EVENT_STREAM);
    request.json(body).open().await
}

async fn read(user: &User, id: i64, last: Option<&str>) -> Stream {
    let mut request = user
        .get(&format!("/api/prompts/{id}/"))
        .header("accept", EVENT_STREAM);
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    request.open().await
}

#[tokio::test]
async fn a_streamed_post_sends_its_id_the_text_and_the_body_of_a_201() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let mut stream = post(&user, &json!({ "prompt": "hello wide world" })).await;
    assert_eq!(stream.status, 200);
    assert_eq!(stream.headers["content-type"], EVENT_STREAM);
    assert_eq!(stream.headers["cache-control"], "no-store");
    assert_eq!(stream.headers["x-accel-buffering"], "no");
    assert!(stream.headers.contains_key("x-request-id"));
    let events = stream.rest().await;
    assert_eq!(names(&events), ["started", "delta", "completed"]);
    assert_eq!(text_of(&events), "[mock] You said: hello wide world");
    let id = events[0].data["id"].as_i64().unwrap();
    let completed = events.last().unwrap();
    assert_eq!(completed.id, "done");
    let shown = user.get(&format!("/api/prompts/{id}")).send().await.json();
    assert_eq!(shown["status"], "completed");
    for key in ["id", "prompt", "response", "created_at", "model"] {
        assert_eq!(completed.data[key], shown[key], "{key}");
    }
    assert_eq!(completed.data.as_object().unwrap().len(), 5);
    assert_eq!(user.similar("hello wide world", 1).await, [id]);
}

#[tokio::test]
async fn what_the_body_says_of_streaming_wins_over_accept_and_left_out_accept_decides() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let json = |body: Value| ("application/json", body.to_string());
    let form = |body: &str| ("application/x-www-form-urlencoded", body.to_owned());
    let only_streams = [EVENT_STREAM, "text/event-stream, */*;q=0.1"];
    let only_json = [
        "application/json",
        "*/*",
        "application/json, text/event-stream",
    ];
    for (accepted, (kind, body), streams) in [
        (&only_streams[..], json(json!({ "prompt": "hi" })), true),
        (&only_streams[..], form("prompt=hi"), true),
        (
            &only_streams[..],
            json(json!({ "prompt": "hi", "stream": false })),
            false,
        ),
        (
            &only_streams[..],
            json(json!({ "prompt": "hi", "stream": 0 })),
            false,
        ),
        (
            &only_streams[..],
            json(json!({ "prompt": "hi", "stream": "off" })),
            false,
        ),
        (&only_streams[..], form("prompt=hi&stream=false"), false),
        (&only_json[..], json(json!({ "prompt": "hi" })), false),
        (
            &only_json[..],
            json(json!({ "prompt": "hi", "stream": true })),
            true,
        ),
        (&only_json[..], form("prompt=hi&stream=1"), true),
    ] {
        for accept in accepted {
            let request = user.post("/api/prompts").header("accept", accept);
            let mut answer = request.body(kind, body.clone()).open().await;
            let at = format!("{accept}: {body}");
            let expected = if streams {
                (200, EVENT_STREAM)
            } else {
                (201, "application/json")
            };
            let media_type = answer.headers["content-type"].to_str().unwrap().to_owned();
            assert_eq!((answer.status, media_type.as_str()), expected, "{at}");
            if streams {
                assert_eq!(text_of(&answer.rest().await), "[mock] You said: hi", "{at}");
            }
        }
    }
    // A member that is no flag is a mistake, whatever Accept says.
    let request = user.post("/api/prompts").header("accept", EVENT_STREAM);
    let refused = request.json(&json!({ "prompt": "hi", "stream": null }));
    assert_eq!(refused.send().await.status, 400);
}

#[tokio::test]
async fn a_repeated_post_is_replayed_in_the_form_that_its_body_asks_for() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let post = |body: Value| {
        let request = user.post("/api/prompts").header("accept", EVENT_STREAM);
        request.header("idempotency-key", "once").json(&body)
    };
    let mut first = post(json!({ "prompt": "hi" })).open().await;
    assert_eq!(first.status, 200);
    let id = first.rest().await[0].data["id"].clone();
    let again = post(json!({ "prompt": "hi", "stream": false }))
        .send()
        .await;
    assert_eq!((again.status, &again.json()["id"]), (201, &id));
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
}

#[tokio::test]
async fn the_body_may_ask_for_the_stream_too() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello", "stream": true });
    let mut stream = user.post("/api/prompts").json(&body).open().await;
    assert_eq!(
        (
            stream.status,
            stream.headers["content-type"].to_str().unwrap()
        ),
        (200, EVENT_STREAM)
    );
    assert_eq!(
        names(&stream.rest().await),
        ["started", "delta", "completed"]
    );
    let plain = user
        .post("/api/prompts")
        .json(&json!({ "prompt": "hello", "stream": "no" }));
    assert_eq!(plain.send().await.status, 201);
}

#[tokio::test]
async fn clients_that_take_anything_get_json_as_ever() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for accept in ["*/*", "application/json, text/event-stream"] {
        let request = user.post("/api/prompts").header("accept", accept);
        let answer = request.json(&json!({ "prompt": "hello" })).send().await;
        assert_eq!(answer.status, 201, "{accept}");
        let id = answer.json()["id"].as_i64().unwrap();
        let request = user.get(&format!("/api/prompts/{id}"));
        let shown = request.header("accept", accept).send().await;
        assert_eq!(shown.json()["id"], id, "{accept}");
    }
}

#[tokio::test]
async fn only_the_two_routes_take_streams_and_others_stay_406() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for path in ["/api/prompts", "/api/prompts/similar?q=x", "/api/auth/me/"] {
        let answer = user.get(path).header("accept", EVENT_STREAM).send().await;
        assert_eq!(answer.status, 406, "{path}");
    }
    let gone = user.delete("/api/prompts/1").header("accept", EVENT_STREAM);
    assert_eq!(gone.send().await.status, 406);
    let other = user.post("/api/prompts").header("accept", "text/html");
    assert_eq!(other.send().await.status, 406);
}

#[tokio::test]
async fn errors_before_the_start_are_plain_json_with_their_status() {
    let app = spawn_app(|config| config.prompt_throttle = "1/h".parse().unwrap()).await;
    let user = app.user("alice").await;
    let stranger = app.post("/api/prompts").header("accept", EVENT_STREAM);
    let refused = stranger.json(&json!({ "prompt": "x" })).send().await;
    assert_eq!(refused.status, 401);
    let request = user.post("/api/prompts").header("accept", EVENT_STREAM);
    let invalid = request.json(&json!({ "prompt": " " })).send().await;
    assert_eq!(invalid.status, 400);
    assert!(invalid.json()["prompt"].is_array());
    let request = user.post("/api/prompts").header("accept", EVENT_STREAM);
    let throttled = request.json(&json!({ "prompt": "x" })).send().await;
    assert_eq!(throttled.status, 429);
    assert!(throttled.json()["detail"].is_string());
}

#[tokio::test]
async fn a_completed_prompt_is_read_as_a_stream_from_any_place() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let long = "wörd ".repeat(4_000);
    let all = post(&user, &json!({ "prompt": long })).await.rest().await;
    let id = all[0].data["id"].as_i64().unwrap();
    let whole = text_of(&all);
    let again = read(&user, id, None).await.rest().await;
    assert_eq!(names(&again), ["started", "delta", "completed"]);
    assert_eq!(text_of(&again), whole);
    assert_eq!(again.last(), all.last());
    assert!(again.len() > 5, "a long text comes in pieces");
    for (n, event) in again.iter().enumerate().take(again.len() - 1) {
        let rest = read(&user, id, Some(&event.id)).await.rest().await;
        assert_eq!(rest, again[n + 1..], "after event {n}");
    }
    let done = user
        .get(&format!("/api/prompts/{id}"))
        .header("accept", EVENT_STREAM)
        .header("last-event-id", "done");
    let done = done.send().await;
    assert_eq!((done.status, done.body.len()), (204, 0));
}

#[tokio::test]
async fn a_last_event_id_of_another_text_starts_again_and_nonsense_is_refused() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let first = post(&user, &json!({ "prompt": "one" })).await.rest().await;
    let second = post(&user, &json!({ "prompt": "two" })).await.rest().await;
    let id = second[0].data["id"].as_i64().unwrap();
    let last = &first[first.len() - 2].id;
    let events = read(&user, id, Some(last)).await.rest().await;
    assert_eq!(names(&events), ["started", "delta", "completed"]);
    assert_eq!(text_of(&events), "[mock] You said: two");
    for nonsense in ["x", "12", "-1-0", "5-zz"] {
        let request = user.get(&format!("/api/prompts/{id}"));
        let request = request.header("accept", EVENT_STREAM);
        let answer = request.header("last-event-id", nonsense).send().await;
        assert_eq!(answer.status, 400, "{nonsense}");
    }
}

#[tokio::test]
async fn only_the_owner_reads_a_stream() {
    let app = spawn_app(|_| ()).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let id = alice.prompt("mine").await;
    let path = format!("/api/prompts/{id}");
    for last in [None, Some("0-cbf29ce484222325"), Some("done")] {
        let mut request = bob.get(&path).header("accept", EVENT_STREAM);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let answer = request.send().await;
        assert_eq!(answer.status, 404, "{last:?}");
        assert_eq!(answer.json(), json!({ "detail": "Not found." }));
    }
    let anonymous = app.get(&path).header("accept", EVENT_STREAM).send().await;
    assert_eq!(anonymous.status, 401);
}

#[tokio::test]
async fn sockets_get_the_pieces_of_a_stream_and_of_nothing_else() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let bearer = format!("Bearer {}", user.access);
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap();
    socket.next_json().await;
    let plain = json!({ "prompt": "whole", "websocket": true });
    let answer = user.post("/api/prompts").json(&plain).send().await.json();
    let event = socket.next_json().await;
    assert_eq!(event["event"], "prompt_completed");
    assert_eq!(event["data"], answer);

    let quiet = json!({ "prompt": "quiet", "stream": true });
    post(&user, &quiet).await.rest().await;
    let streamed = json!({ "prompt": "in pieces", "websocket": true });
    let events = post(&user, &streamed).await.rest().await;
    let (mut text, id) = (String::new(), &events[0].data["id"]);
    let completed = loop {
        let event = socket.next_json().await;
        assert_eq!(event["type"], "prompt.message");
        if event["event"] != "prompt.delta" {
            break event;
        }
        assert_eq!(event["data"]["id"], *id);
        assert_eq!(event["data"]["offset"], text.len());
        text.push_str(event["data"]["text"].as_str().unwrap());
    };
    assert_eq!(text, "[mock] You said: in pieces");
    assert_eq!(completed["event"], "prompt_completed");
    assert_eq!(completed["data"], events.last().unwrap().data);
}

/// A prompt that another process answers.
async fn begin_elsewhere(store: &dyn CallStore, user: &User, lease: Duration) -> i64 {
    let begun = store
        .begin_call(NewCall {
            user_id: UserId(user.id),
            source: PromptSource::Api,
            chat: None,
            is_kept: true,
            prompt: "Why?".to_owned(),
            model: "other".to_owned(),
            created_at: Timestamp::now(),
            announce: true,
            key: None,
            holder: THROUGH_OTHERS,
            lease,
            max_prompts: None,
            api_key_id: None,
            budgets: CallBudgets::default(),
            daily: None,
        })
        .await
        .unwrap();
    let Begun::Started(prompt) = begun else {
        panic!("{begun:?}");
    };
    prompt.id.0
}

fn answer(text: &str) -> CallOutcome {
    CallOutcome::completed(text, "other")
}

#[tokio::test]
async fn an_answer_of_another_process_is_read_whole_once_it_is_done() {
    let app = spawn_app(|config| config.server.stream_heartbeat = Duration::from_millis(20)).await;
    let user = app.user("alice").await;
    let store = app.folder.store().await;
    let id = begin_elsewhere(&*store, &user, Duration::from_secs(600)).await;
    let shown = user.get(&format!("/api/prompts/{id}")).send().await.json();
    assert_eq!(
        (&shown["status"], &shown["response"]),
        (&json!("running"), &Value::Null)
    );
    let mut stream = read(&user, id, None).await;
    assert_eq!(stream.next().await.unwrap().name, "started");
    stream.wait_for_comment().await;
    let finished = store
        .settle_call(
            prompt_service::domain::PromptId(id),
            THROUGH_OTHERS,
            answer("Because."),
        )
        .await
        .unwrap();
    assert!(finished.is_some());
    let events = stream.rest().await;
    assert_eq!(names(&events), ["delta", "completed"]);
    assert_eq!(text_of(&events), "Because.");
    assert!(stream.comments > 0);
}

#[tokio::test]
async fn a_prompt_deleted_while_it_is_answered_ends_its_streams() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let id = begin_elsewhere(&*app.folder.store().await, &user, Duration::from_secs(600)).await;
    let mut stream = read(&user, id, None).await;
    assert_eq!(stream.next().await.unwrap().name, "started");
    let path = format!("/api/prompts/{id}");
    assert_eq!(user.delete(&path).send().await.status, 204);
    let events = stream.rest().await;
    assert_eq!(names(&events), ["failed"]);
    assert_eq!(events[0].data["code"], "prompt_deleted");
    assert_eq!(events[0].data["id"], id);
}

#[tokio::test]
async fn a_reader_of_an_answer_of_another_process_does_not_delay_a_stop() {
    let mut app = spawn_app(|config| config.server.shutdown_grace = 2 * DEADLINE).await;
    let user = app.user("alice").await;
    let id = begin_elsewhere(&*app.folder.store().await, &user, Duration::from_secs(600)).await;
    let mut stream = read(&user, id, None).await;
    assert_eq!(stream.next().await.unwrap().name, "started");
    app.begin_stop();
    assert!(stream.next().await.is_none(), "cut, without an end");
    // Sooner than the grace is over.
    app.stopped().await;
}

#[tokio::test]
async fn the_call_of_a_dead_process_fails_and_is_reported_to_sockets_and_streams() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let bearer = format!("Bearer {}", user.access);
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap();
    socket.next_json().await;
    let id = begin_elsewhere(&*app.folder.store().await, &user, Duration::ZERO).await;
    let events = read(&user, id, None).await.rest().await;
    assert_eq!(names(&events), ["started", "failed"]);
    let failed = json!({ "detail": "The service stopped while the prompt was being answered.", "code": "interrupted", "id": id });
    assert_eq!(events[1].data, failed);
    let event = socket.next_json().await;
    assert_eq!(
        event,
        json!({ "type": "prompt.message", "event": "prompt_failed", "data": failed })
    );
    let shown = user.get(&format!("/api/prompts/{id}")).send().await.json();
    assert_eq!(
        (&shown["status"], &shown["error"]),
        (&json!("failed"), &json!("interrupted"))
    );
    assert_eq!(app.metric("calls_lapsed_total").await, Some(1.0));
}

#[tokio::test]
async fn calls_beyond_the_days_limit_are_refused_and_kept_as_failed() {
    within_a_day().await;
    let app = spawn_app(|config| config.calls.daily_limit = Some(2)).await;
    let user = app.user("alice").await;
    user.prompt("one").await;
    let events = post(&user, &json!({ "prompt": "two" })).await.rest().await;
    assert_eq!(events.last().unwrap().name, "completed");
    for body in [
        json!({ "prompt": "three" }),
        json!({ "prompt": "four", "stream": true }),
    ] {
        let refused = user.post("/api/prompts").json(&body).send().await;
        assert_eq!(refused.status, 503, "{refused:?}");
        assert_eq!(refused.json()["code"], "upstream_unavailable");
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=86_400).contains(&wait), "{wait}");
        let id = refused.json()["id"].as_i64().unwrap();
        let shown = user.get(&format!("/api/prompts/{id}")).send().await.json();
        assert_eq!(shown["status"], "failed");
        assert_eq!(shown["error"], "upstream_unavailable");
    }
    assert_eq!(user.similar("three", 9).await.len(), 2);
}

#[tokio::test]
async fn responses_show_the_time_that_the_service_added() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let answer = user.try_prompt("hello").await;
    let timing = answer.header("server-timing").unwrap();
    assert!(timing.starts_with("upstream;dur=0."), "{timing}");
    assert!(timing.contains(", service;dur="), "{timing}");
    post(&user, &json!({ "prompt": "hello" }))
        .await
        .rest()
        .await;
    for kind in ["answer", "stream"] {
        let series = format!("prompt_overhead_seconds_count{{kind=\"{kind}\"}}");
        eventually!(app.metric(&series).await == Some(1.0));
    }
    eventually!(app.metric("calls_running").await == Some(0.0));
}

#[tokio::test]
async fn many_streams_at_once_all_end_well() {
    let app = spawn_app(|_| ()).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..8 {
        let user = app.user(&format!("user{n}")).await;
        tasks.spawn(async move {
            for m in 0..25 {
                let events = post(&user, &json!({ "prompt": format!("{n} {m}") }))
                    .await
                    .rest()
                    .await;
                assert_eq!(text_of(&events), format!("[mock] You said: {n} {m}"));
            }
            user.all_prompts().await.len()
        });
    }
    assert_eq!(tasks.join_all().await, [25; 8]);
}
