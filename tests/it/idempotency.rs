//! `Idempotency-Key`: a repeated post is answered as the first, whatever happened in between.

use std::time::Duration;

use prompt_service::domain::{PromptId, PromptSource, PromptStatus, Timestamp, UserId};
use prompt_service::store::{
    Begun, CallBudgets, CallOutcome, CallStore, Holder, KeyClaim, KeyState, NewCall,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::support::{Response, User, names, spawn_app, text_of};

async fn post(user: &User, key: &str, body: &Value) -> Response {
    let request = user.post("/api/prompts").header("idempotency-key", key);
    request.json(body).send().await
}

/// What the service makes of a key and a prompt that is not announced.
fn claim(key: &str, prompt: &str) -> KeyClaim {
    KeyClaim {
        key_hash: Sha256::digest(key.as_bytes()).into(),
        fingerprint: Sha256::digest([&[0][..], prompt.as_bytes()].concat()).into(),
    }
}

/// A call of another process with a key.
fn elsewhere(user: &User, key: &str, prompt: &str, lease: Duration) -> NewCall {
    NewCall {
        user_id: UserId(user.id),
        source: PromptSource::Api,
        chat: None,
        is_kept: true,
        prompt: prompt.to_owned(),
        model: "other".to_owned(),
        created_at: Timestamp(1_000_000),
        announce: false,
        key: Some(claim(key, prompt)),
        holder: Holder {
            replica: [9; 16],
            call: 1,
        },
        lease,
        max_prompts: None,
        api_key_id: None,
        budgets: CallBudgets::default(),
        daily: None,
    }
}

async fn begin(store: &dyn CallStore, call: NewCall) -> PromptId {
    match store.begin_call(call).await.unwrap() {
        Begun::Started(prompt) => prompt.id,
        other @ (Begun::OverLimit(_) | Begun::Known(_)) => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_repeated_post_is_answered_as_the_first_and_stored_once() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello" });
    let first = post(&user, "k1", &body).await;
    assert_eq!(first.status, 201);
    assert_eq!(first.header("idempotent-replayed"), None);
    assert!(first.header("server-timing").is_some());
    // White space around the prompt does not change what the request means.
    for again in [
        body.clone(),
        json!({ "prompt": " hello\n", "websocket": false }),
    ] {
        let again = post(&user, "k1", &again).await;
        assert_eq!(again.status, 201);
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!(again.header("server-timing"), None);
        assert_eq!(again.body, first.body);
    }
    assert_eq!(user.all_prompts().await.len(), 1);
    let other = post(&user, "k2", &body).await;
    assert_ne!(other.json()["id"], first.json()["id"]);
    assert_eq!(app.metric("idempotent_replays_total").await, Some(2.0));
}

#[tokio::test]
async fn a_key_belongs_to_one_request_of_one_user() {
    let app = spawn_app(|_| ()).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let body = json!({ "prompt": "hello" });
    let first = post(&alice, "k", &body).await;
    for other in [
        json!({ "prompt": "Hello" }),
        json!({ "prompt": "hello", "websocket": true }),
    ] {
        let reused = post(&alice, "k", &other).await;
        assert_eq!(reused.status, 422, "{other}");
        assert_eq!(reused.json()["code"], "idempotency_key_reused");
    }
    let of_bob = post(&bob, "k", &json!({ "prompt": "Hello" })).await;
    assert_eq!(of_bob.status, 201);
    assert_eq!(of_bob.header("idempotent-replayed"), None);
    assert_ne!(of_bob.json()["id"], first.json()["id"]);
    assert_eq!(alice.all_prompts().await.len(), 1);
}

#[tokio::test]
async fn malformed_keys_are_refused_and_nothing_is_stored() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for bad in ["", "two words", &"x".repeat(256)] {
        let refused = post(&user, bad, &json!({ "prompt": "hello" })).await;
        assert_eq!(refused.status, 400, "{bad:?}");
        let detail = refused.json()["detail"].clone();
        assert_eq!(
            detail,
            "An Idempotency-Key has 1 to 255 visible ASCII characters."
        );
    }
    let invalid = post(&user, "k", &json!({ "prompt": "" })).await;
    assert_eq!(invalid.status, 400);
    assert_eq!(user.all_prompts().await.len(), 0);
    // The key of a request that was refused is free.
    assert_eq!(
        post(&user, "k", &json!({ "prompt": "hello" })).await.status,
        201
    );
}

#[tokio::test]
async fn replays_use_up_no_throttle_and_new_requests_do() {
    let app = spawn_app(|config| config.prompt_throttle = "2/h".parse().unwrap()).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello" });
    assert_eq!(post(&user, "k1", &body).await.status, 201);
    for _ in 0..3 {
        let again = post(&user, "k1", &body).await;
        assert_eq!(again.status, 201);
        assert!(
            again.header("ratelimit").unwrap().contains("r=1"),
            "{again:?}"
        );
        assert_eq!(
            post(&user, "k1", &json!({ "prompt": "other" }))
                .await
                .status,
            422
        );
    }
    // A request with a key that breaks the rules is counted as ever.
    assert_eq!(
        post(&user, "k2", &json!({ "prompt": "" })).await.status,
        400
    );
    assert_eq!(post(&user, "k3", &body).await.status, 429);
    assert_eq!(
        post(&user, "k4", &json!({ "prompt": "" })).await.status,
        429
    );
    let again = post(&user, "k1", &body).await;
    assert_eq!(
        again.status, 201,
        "known keys are answered though the throttle is closed"
    );
}

#[tokio::test]
async fn a_streamed_post_is_replayed_as_a_stream_or_whole() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello" });
    let stream = async || {
        let request = user.post("/api/prompts").header("idempotency-key", "k");
        let request = request.header("accept", "text/event-stream");
        let mut stream = request.json(&body).open().await;
        let replayed = stream.headers.contains_key("idempotent-replayed");
        (stream.rest().await, replayed)
    };
    let (first, replayed) = stream().await;
    assert!(!replayed);
    let (again, replayed) = stream().await;
    assert!(replayed);
    assert_eq!(names(&again), ["started", "delta", "completed"]);
    assert_eq!(text_of(&again), text_of(&first));
    assert_eq!(again.last(), first.last());
    let whole = post(&user, "k", &body).await;
    assert_eq!(whole.status, 201);
    assert_eq!(whole.json(), first.last().unwrap().data);
    assert_eq!(user.all_prompts().await.len(), 1);
}

#[tokio::test]
async fn a_key_in_flight_is_a_conflict_until_its_answer_is_there() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let store = app.folder.store().await;
    let call = elsewhere(&user, "k", "hello", Duration::from_secs(600));
    let holder = call.holder;
    let id = begin(&*store, call).await;
    let body = json!({ "prompt": "hello" });
    for stream in [false, true] {
        let body = json!({ "prompt": "hello", "stream": stream });
        let conflict = post(&user, "k", &body).await;
        assert_eq!(conflict.status, 409);
        assert_eq!(conflict.json()["code"], "idempotency_key_in_use");
        assert_eq!(conflict.header("retry-after"), Some("1"));
    }
    store
        .settle_call(id, holder, CallOutcome::completed("Because.", "other"))
        .await
        .unwrap()
        .unwrap();
    let replayed = post(&user, "k", &body).await;
    assert_eq!(replayed.status, 201);
    assert_eq!(replayed.json()["response"], "Because.");
}

#[tokio::test]
async fn the_call_of_a_dead_process_is_taken_over_in_its_own_row() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let store = app.folder.store().await;
    for (key, noticed) in [("k1", true), ("k2", false)] {
        let id = begin(&*store, elsewhere(&user, key, "hello", Duration::ZERO)).await;
        if noticed {
            let status = async || {
                store
                    .prompt(UserId(user.id), id)
                    .await
                    .unwrap()
                    .unwrap()
                    .status
            };
            eventually!(status().await == PromptStatus::Failed);
        }
        let retried = post(&user, key, &json!({ "prompt": "hello" })).await;
        assert_eq!(retried.status, 201, "{retried:?}");
        assert_eq!(retried.header("idempotent-replayed"), None);
        assert_eq!(retried.json()["id"], id.0);
        assert_eq!(retried.json()["response"], "[mock] You said: hello");
        assert_eq!(retried.json()["created_at"], "1970-01-01T00:00:01.000000Z");
        let again = post(&user, key, &json!({ "prompt": "hello" })).await;
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
        assert_eq!(again.body, retried.body);
    }
    let all = user.all_prompts().await;
    assert_eq!(all.len(), 2);
    assert!(all.iter().all(|prompt| prompt["status"] == "completed"));
    assert_eq!(user.similar("hello", 9).await.len(), 2);
}

#[tokio::test]
async fn a_taken_over_call_is_throttled_and_another_body_is_refused() {
    let app = spawn_app(|config| config.prompt_throttle = "1/h".parse().unwrap()).await;
    let user = app.user("alice").await;
    let store = app.folder.store().await;
    begin(&*store, elsewhere(&user, "k", "hello", Duration::ZERO)).await;
    assert_eq!(
        post(&user, "k", &json!({ "prompt": "other" })).await.status,
        422
    );
    assert_eq!(
        post(&user, "k0", &json!({ "prompt": "x" })).await.status,
        201
    );
    assert_eq!(
        post(&user, "k", &json!({ "prompt": "hello" })).await.status,
        429
    );
}

#[tokio::test]
async fn a_failed_outcome_releases_the_key() {
    let app = spawn_app(|config| config.calls.daily_limit = Some(0)).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello" });
    let first = post(&user, "k", &body).await;
    assert_eq!(first.status, 503);
    let second = post(&user, "k", &body).await;
    assert_eq!(second.status, 503);
    assert_ne!(first.json()["id"], second.json()["id"]);
    let other = post(&user, "k", &json!({ "prompt": "other" })).await;
    assert_eq!(other.status, 503);
}

#[tokio::test]
async fn the_key_of_a_deleted_prompt_brings_nothing_back() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello" });
    let id = post(&user, "k", &body).await.json()["id"].as_i64().unwrap();
    let gone = user.delete(&format!("/api/prompts/{id}")).send().await;
    assert_eq!(gone.status, 204);
    let again = post(&user, "k", &body).await;
    assert_eq!(again.status, 410);
    assert_eq!(again.json()["code"], "prompt_deleted");
    assert!(!again.text().contains("hello"));
    assert_eq!(user.all_prompts().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_posts_with_one_key_store_one_prompt() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for round in 0..3 {
        let mut tasks = JoinSet::new();
        for n in 0..64 {
            let mut request = user.post("/api/prompts");
            request = request.header("idempotency-key", &format!("k{round}"));
            if n % 8 == 0 {
                request = request.header("accept", "text/event-stream");
            }
            let request = request.json(&json!({ "prompt": format!("round {round}") }));
            tasks.spawn(request.send());
        }
        let (mut first, mut replayed) = (0, 0);
        for answer in tasks.join_all().await {
            match (answer.status, answer.header("idempotent-replayed")) {
                (200 | 201, None) => first += 1,
                (200 | 201, Some(_)) => replayed += 1,
                (409, _) => assert_eq!(answer.json()["code"], "idempotency_key_in_use"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(first, 1, "{replayed} replayed");
        assert_eq!(user.all_prompts().await.len(), round + 1);
    }
}

#[tokio::test]
async fn keys_survive_a_restart_and_are_stored_hashed() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({ "prompt": "hello" });
    let first = post(&user, "very-telling-key", &body).await;
    let folder = app.kill().await;
    let claim = claim("very-telling-key", "hello");
    let state = folder
        .store()
        .await
        .key_state(UserId(user.id), &claim)
        .await;
    assert!(matches!(state.unwrap(), Some(KeyState::Completed(_))));
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap_or_default();
        let found = bytes
            .windows(16)
            .any(|window| window == b"very-telling-key");
        assert!(!found);
    }
    let app = crate::support::spawn_app_in(folder, |_| ()).await;
    let (access, _) = app.login("alice").await;
    let request = app.post("/api/prompts").bearer(&access);
    let request = request.header("idempotency-key", "very-telling-key");
    let again = request.json(&body).send().await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(again.body, first.body);
}
