//! API keys: their life, what they may be used for, and what is known of them.

use std::time::Duration;

use prompt_service::credentials::ApiKeyText;
use prompt_service::domain::{ApiKeyId, Timestamp, UserId};
use serde_json::{Value, json};

use crate::support::{DEADLINE, Gate, Reply, Upstream, User, spawn_app};

/// The answer to a listing of prompts with this bearer token.
async fn status(user: &User, text: &str) -> (u16, Value) {
    let answer = user
        .client
        .with_bearer(text)
        .get("/api/prompts")
        .send()
        .await;
    let code = if answer.status == 200 {
        Value::Null
    } else {
        answer.json()["messages"][0]["message"].clone()
    };
    (answer.status, code)
}

#[tokio::test]
async fn life_of_a_key() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({
        "name": " nightly report ", "scopes": ["write", "read"], "models": ["gpt-*", "llama3.2"],
        "rates": "2/s,100/day", "budget_usd": 20.5, "budget_period": "week",
        "expires_at": "2999-01-01T01:00:00+01:00",
    });
    let made = user.post("/api/keys").json(&body).send().await;
    assert_eq!(made.status, 201, "{made:?}");
    let made = made.json();
    let (id, text) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    let key = ApiKeyText::parse(text).unwrap();
    assert_eq!(key.id().as_str(), id);
    let expected = json!({
        "id": id, "name": "nightly report", "hint": format!("ps_{id}…{}", key.last_four()),
        "scopes": ["read", "write"], "models": ["gpt-*", "llama3.2"], "rates": "2/second,100/day",
        "budget_usd": 20.5, "budget_period": "week", "expires_at": "2999-01-01T00:00:00.000000Z",
        "created_at": made["created_at"], "last_used_at": null,
    });
    let mut shown = made.clone();
    shown.as_object_mut().unwrap().remove("key");
    assert_eq!(shown["previous_expires_at"].take(), Value::Null);
    shown.as_object_mut().unwrap().remove("previous_expires_at");
    assert_eq!(shown, expected);

    let path = format!("/api/keys/{id}");
    assert_eq!(user.get(&path).send().await.json(), expected);
    let second = user.api_key("second").await;
    let list = user.get("/api/keys").send().await.json();
    let ids: Vec<&Value> = list["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| &key["id"])
        .collect();
    assert_eq!(ids, [&json!(second.id), &json!(id)]);
    assert!(!list.to_string().contains(text) && !list.to_string().contains("hash"));
    let plain = user.get(&second.path()).send().await.json();
    assert_eq!(plain["scopes"], json!(["chat", "read"]));
    assert_eq!(
        (&plain["models"], &plain["rates"]),
        (&json!([]), &Value::Null)
    );
    assert_eq!(plain["expires_at"], Value::Null);

    let change =
        json!({ "name": "weekly", "rates": null, "budget_usd": "7.000000000001", "models": [] });
    let changed = user.client.patch(&path).json(&change).send().await;
    assert_eq!(changed.status, 200, "{changed:?}");
    // Exact: not as a parser of binary numbers reads it.
    assert!(changed.text().contains("\"budget_usd\":7.000000000001,"));
    let changed = changed.json();
    assert_eq!(
        (&changed["name"], &changed["rates"]),
        (&json!("weekly"), &Value::Null)
    );
    assert_eq!(
        (&changed["budget_period"], &changed["models"]),
        (&json!("week"), &json!([]))
    );
    assert_eq!(
        (&changed["scopes"], &changed["expires_at"]),
        (&expected["scopes"], &expected["expires_at"])
    );

    let default = json!({ "budget_period": null });
    let changed = user.client.patch(&path).json(&default).send().await.json();
    assert_eq!(changed["budget_period"], "month");
    let unbound = user
        .client
        .patch(&second.path())
        .json(&default)
        .send()
        .await;
    assert_eq!(unbound.status, 200, "{unbound:?}");
    assert_eq!(unbound.json()["budget_period"], Value::Null);

    assert_eq!(status(&user, text).await, (200, Value::Null));
    assert_eq!(user.delete(&path).send().await.status, 204);
    assert_eq!(
        status(&user, text).await,
        (401, json!("API key is revoked"))
    );
    for gone in [
        user.get(&path),
        user.delete(&path),
        user.client.patch(&path),
        user.post(&format!("{path}/rotate")),
    ] {
        assert_eq!(gone.send().await.status, 404);
    }
    let list = user.get("/api/keys").send().await.json();
    assert_eq!(list["results"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn faults_of_a_key_are_named_by_field() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    for (body, field) in [
        (json!({ "name": null }), "name"),
        (json!({ "name": " " }), "name"),
        (json!({ "name": "a\nb" }), "name"),
        (json!({ "name": "x".repeat(101) }), "name"),
        (json!({ "name": ["x"] }), "name"),
        (json!({ "name": 7 }), "name"),
        (json!({ "name": "x", "scopes": [] }), "scopes"),
        (json!({ "name": "x", "scopes": ["admin"] }), "scopes"),
        (json!({ "name": "x", "scopes": [1] }), "scopes"),
        (json!({ "name": "x", "scopes": "chat,read" }), "scopes"),
        (json!({ "name": "x", "scopes": { "chat": true } }), "scopes"),
        (json!({ "name": "x", "models": ["a*b"] }), "models"),
        (json!({ "name": "x", "models": 7 }), "models"),
        (json!({ "name": "x", "rates": "often" }), "rates"),
        (json!({ "name": "x", "rates": "" }), "rates"),
        (json!({ "name": "x", "rates": ["1/s"] }), "rates"),
        (json!({ "name": "x", "budget_usd": 0 }), "budget_usd"),
        (json!({ "name": "x", "budget_usd": -1 }), "budget_usd"),
        (json!({ "name": "x", "budget_usd": 1e9 }), "budget_usd"),
        (json!({ "name": "x", "budget_usd": "1,50" }), "budget_usd"),
        (json!({ "name": "x", "budget_usd": true }), "budget_usd"),
        (
            json!({ "name": "x", "budget_usd": 5, "budget_period": "year" }),
            "budget_period",
        ),
        (
            json!({ "name": "x", "budget_period": "day" }),
            "budget_period",
        ),
        (
            json!({ "name": "x", "budget_usd": null, "budget_period": "day" }),
            "budget_period",
        ),
        (
            json!({ "name": "x", "expires_at": "tomorrow" }),
            "expires_at",
        ),
        (
            json!({ "name": "x", "expires_at": "2020-01-01T00:00:00Z" }),
            "expires_at",
        ),
    ] {
        for (request, at) in [
            (user.post("/api/keys"), "POST"),
            (user.client.patch(&key.path()), "PATCH"),
        ] {
            let answer = request.json(&body).send().await;
            assert_eq!(answer.status, 400, "{at} {body}: {answer:?}");
            let answer = answer.json();
            let fields: Vec<&String> = answer.as_object().unwrap().keys().collect();
            assert_eq!(fields, [field], "{at} {body}: {answer}");
        }
    }
    let unnamed = user.post("/api/keys").json(&json!({})).send().await;
    assert_eq!(
        unnamed.json(),
        json!({ "name": ["This field is required."] })
    );
    for grace in [
        json!("soon"),
        json!("31d"),
        json!(2_592_001),
        json!(-1),
        json!([]),
    ] {
        let rotate = user.post(&format!("{}/rotate", key.path()));
        let answer = rotate.json(&json!({ "grace": grace })).send().await;
        assert_eq!(answer.status, 400, "{grace}: {answer:?}");
        assert!(answer.json()["grace"].is_array(), "{grace}");
    }
    assert_eq!(status(&user, &key.text).await.0, 200, "nothing was changed");
}

#[tokio::test]
async fn bodies_are_json_alone() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    for request in [
        user.post("/api/keys"),
        user.client.patch(&key.path()),
        user.post(&format!("{}/rotate", key.path())),
    ] {
        let form = request.body("application/x-www-form-urlencoded", "name=ci&grace=0");
        assert_eq!(form.send().await.status, 415);
    }
    assert_eq!(status(&user, &key.text).await.0, 200);
}

#[tokio::test]
async fn rotated_key_works_until_its_grace_is_over() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    let rotate = async |body: Value| {
        let path = format!("{}/rotate", key.path());
        let answer = user.post(&path).json(&body).send().await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    };
    let second = rotate(json!({})).await;
    let text = second["key"].as_str().unwrap();
    assert_eq!(second["id"], key.id.as_str());
    let until = Timestamp::parse_rfc3339(second["previous_expires_at"].as_str().unwrap());
    let left = until.unwrap().since(Timestamp::now());
    let day = Duration::from_secs(86_400);
    assert!(left <= day && left > day - DEADLINE, "{left:?}");
    assert_eq!(status(&user, &key.text).await.0, 200);
    assert_eq!(status(&user, text).await.0, 200);

    // A second rotation without a grace ends both.
    let third = rotate(json!({ "grace": 0 })).await;
    assert_eq!(third["previous_expires_at"], Value::Null);
    for ended in [key.text.as_str(), text] {
        let invalid = (401, json!("API key is invalid"));
        assert_eq!(status(&user, ended).await, invalid);
    }
    let text = third["key"].as_str().unwrap();
    assert_eq!(status(&user, text).await.0, 200);

    // A short grace ends by itself.
    rotate(json!({ "grace": "1s" })).await;
    assert_eq!(status(&user, text).await.0, 200);
    eventually!(status(&user, text).await == (401, json!("API key is expired")));
}

#[tokio::test]
async fn key_expires_at_its_time() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let soon = Timestamp::now().plus(Duration::from_secs(2));
    let body = json!({ "name": "short", "expires_at": soon.to_string() });
    let key = user.api_key_with(&body).await;
    assert_eq!(status(&user, &key.text).await.0, 200);
    eventually!(status(&user, &key.text).await == (401, json!("API key is expired")));
    assert!(Timestamp::now() >= soon);
    let rotate = user.post(&format!("{}/rotate", key.path())).send().await;
    assert_eq!(rotate.status, 400, "{rotate:?}");
    let later = json!({ "expires_at": null });
    let changed = user.client.patch(&key.path()).json(&later).send().await;
    assert_eq!(changed.status, 200, "{changed:?}");
    assert_eq!(status(&user, &key.text).await.0, 200);
}

#[tokio::test]
async fn keys_of_a_disabled_account_are_refused_until_it_is_enabled() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    assert_eq!(status(&user, &key.text).await.0, 200);
    let store = app.folder.store().await;
    let id = UserId(user.id);
    store.set_active(id, false, Timestamp::now()).await.unwrap();
    let list = || key.client.get("/api/prompts").send();
    let disabled = std::time::Instant::now();
    eventually!(list().await.status == 401);
    assert!(disabled.elapsed() < Duration::from_secs(2));
    assert_eq!(list().await.json()["code"], "user_inactive");
    store.set_active(id, true, Timestamp::now()).await.unwrap();
    eventually!(list().await.status == 200);
    // Another password ends access tokens, and leaves the keys.
    let now = Timestamp::now().plus(Duration::from_secs(5));
    store.set_password(id, "!", now).await.unwrap();
    eventually!(user.get("/api/prompts").send().await.status == 401);
    assert_eq!(list().await.status, 200);
}

#[tokio::test]
async fn what_the_store_keeps_of_a_key_is_no_key() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    let store = app.folder.store().await;
    let record = store
        .api_key(ApiKeyId::parse(&key.id).unwrap())
        .await
        .unwrap();
    let hash: String = record
        .unwrap()
        .key_hash
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let cut = &hash[..38];
    for text in [
        hash.clone(),
        format!("ps_{hash}"),
        format!("ps_{}{cut}", key.id),
    ] {
        let answer = user
            .client
            .with_bearer(&text)
            .get("/api/prompts")
            .send()
            .await;
        assert_eq!(answer.status, 401, "{text}: {answer:?}");
        assert_eq!(answer.json()["code"], "token_not_valid", "{text}");
    }
    assert_eq!(status(&user, &key.text).await.0, 200);
}

#[tokio::test]
async fn last_use_is_written_once_a_minute() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    let last_use = async || user.get(&key.path()).send().await.json()["last_used_at"].clone();
    assert_eq!(last_use().await, Value::Null);
    assert_eq!(status(&user, &key.text).await.0, 200);
    eventually!(last_use().await != Value::Null);
    let first = last_use().await;
    for _ in 0..20 {
        assert_eq!(status(&user, &key.text).await.0, 200);
    }
    let folder = app.stop().await;
    let store = folder.store().await;
    let record = store
        .api_key(ApiKeyId::parse(&key.id).unwrap())
        .await
        .unwrap();
    let last = record.unwrap().key.last_used_at.unwrap();
    assert_eq!(json!(last.to_string()), first);
}

#[tokio::test]
async fn no_log_line_and_no_metric_has_a_key_or_its_hash() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let key = user.api_key("a secret name").await;
    assert_eq!(status(&user, &key.text).await.0, 200);
    let rotated = user
        .post(&format!("{}/rotate", key.path()))
        .send()
        .await
        .json();
    let rotated = rotated["key"].as_str().unwrap();
    assert_eq!(status(&user, rotated).await.0, 200);
    assert_eq!(user.delete(&key.path()).send().await.status, 204);
    assert_eq!(status(&user, rotated).await.0, 401);
    let path = format!("/ws/prompts/?token={rotated}");
    let socket = app.socket(&path, &[]).await;
    assert_eq!(socket.err().unwrap().status, 401);
    let log = app.log.text() + &app.get("/metrics").send().await.text();
    assert!(log.contains("\"route\":\"/api/keys/{id}/rotate\""));
    for text in [&key.text, rotated] {
        let text = ApiKeyText::parse(text).unwrap();
        let hash: String = text
            .hash()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        // Neither the whole, nor the secret in the middle, nor the hash.
        for part in [text.expose(), &text.expose()[11..43], &hash] {
            assert!(!log.contains(part));
        }
    }
    assert!(!log.contains("a secret name"));
}

#[tokio::test]
async fn stream_ends_when_its_key_is_revoked() {
    let upstream = Upstream::start().await;
    let gate = Gate::new();
    upstream.plan(
        Reply::stream_head()
            .delta("one ")
            .wait(&gate)
            .delta("two")
            .end(),
    );
    let app = spawn_app(|config| config.upstream = Some(crate::llm::config(&upstream))).await;
    let user = app.user("alice").await;
    let key = user.api_key("a key").await;
    let body = json!({ "prompt": "Count.", "stream": true });
    let mut stream = key.client.post("/api/prompts").json(&body).open().await;
    assert_eq!(stream.status, 200);
    assert!(stream.next().await.is_some());
    assert_eq!(user.delete(&key.path()).send().await.status, 204);
    eventually!(stream.next().await.is_none());
    gate.open();
}

#[tokio::test]
async fn rates_of_a_key_hold_beside_those_of_its_user() {
    let app = spawn_app(|config| config.prompt_throttle = "5/day".parse().unwrap()).await;
    let user = app.user("alice").await;
    let key = user
        .api_key_with(&json!({ "name": "few", "rates": "2/h" }))
        .await;
    let policy = r#""day";q=5;w=86400, "key-hour";q=2;w=3600"#;
    let looked = key.client.get("/api/prompts").send().await;
    // Both are unused, and the day's is the longer window.
    let left = looked.header("ratelimit");
    assert_eq!((looked.status, left), (200, Some(r#""day";r=5;t=86400"#)));
    assert_eq!(looked.header("ratelimit-policy"), Some(policy));
    let post = async |client: &crate::support::Client| {
        client
            .post("/api/prompts")
            .json(&json!({ "prompt": "hello" }))
            .send()
            .await
    };
    let first = post(&key.client).await;
    assert_eq!(first.status, 201, "{first:?}");
    assert_eq!(first.header("ratelimit-policy"), Some(policy));
    assert!(
        first
            .header("ratelimit")
            .unwrap()
            .starts_with(r#""key-hour";r=1;t="#)
    );
    assert_eq!(post(&key.client).await.status, 201);
    for _ in 0..3 {
        let refused = post(&key.client).await;
        assert_eq!(refused.status, 429, "{refused:?}");
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((3000..=3600).contains(&wait), "{wait}");
        assert!(
            refused.json()["detail"]
                .as_str()
                .unwrap()
                .starts_with("Request was throttled.")
        );
    }
    // The refused posts used up nothing of the user's five: three are left.
    let own = post(&user.client).await;
    assert_eq!(
        (own.status, own.header("ratelimit-policy")),
        (201, Some(r#""day";q=5;w=86400"#))
    );
    assert!(
        own.header("ratelimit")
            .unwrap()
            .starts_with(r#""day";r=2;t="#)
    );
    let other = user.api_key("many").await;
    assert_eq!(post(&other.client).await.status, 201);
    // A change of the rates counts within two seconds, in this process at once.
    let more = json!({ "rates": "3/h" });
    assert_eq!(
        user.client
            .patch(&key.path())
            .json(&more)
            .send()
            .await
            .status,
        200
    );
    assert_eq!(post(&key.client).await.status, 201);
    let refused = post(&other.client).await;
    assert_eq!(refused.status, 429, "by the user's rates: {refused:?}");
}
