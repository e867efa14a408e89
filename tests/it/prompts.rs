//! Prompts: posting, listing, reading, deleting, and what a caller that disconnects leaves behind.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{App, Gate, Reply, Response, Upstream, User, spawn_app, spawn_app_in};

/// A post as the bytes on the wire.
fn post_bytes(user: &User, prompt: &str) -> Vec<u8> {
    let body = json!({ "prompt": prompt }).to_string();
    let head = format!(
        "POST /api/prompts/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        user.access,
        body.len()
    );
    [head, body].concat().into_bytes()
}

async fn list(user: &User, query: &str) -> Response {
    user.get(&format!("/api/prompts/{query}")).send().await
}

#[tokio::test]
async fn a_posted_prompt_is_answered_listed_shown_and_found() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let answer = user.try_prompt("  hello wörld \n").await;
    assert_eq!(answer.status, 201);
    let created = answer.json();
    let keys: Vec<&String> = created.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["created_at", "id", "model", "prompt", "response"]);
    assert_eq!(created["prompt"], "hello wörld");
    assert_eq!(created["response"], "[mock] You said: hello wörld");
    assert_eq!(created["model"], "mock");
    let at = created["created_at"].as_str().unwrap();
    assert!(
        at.len() == 27 && at.ends_with('Z') && at.as_bytes()[19] == b'.',
        "{at}"
    );

    let mut stored = created.clone();
    stored["status"] = json!("completed");
    stored["error"] = Value::Null;
    stored["finish_reason"] = json!("stop");
    stored["usage"] = Value::Null;
    stored["duration_ms"] = json!(0);
    stored["source"] = json!("api");
    stored["cost_usd"] = json!(0.0);
    let shown = user
        .get(&format!("/api/prompts/{}/", created["id"]))
        .send()
        .await;
    assert_eq!((shown.status, shown.json()), (200, stored.clone()));
    let listed = list(&user, "").await;
    assert_eq!(listed.json(), json!({ "results": [stored], "next": null }));
    let found = user.search("hello wörld", 5).await.json();
    assert_eq!(found["query"], "hello wörld");
    let found = found["results"][0].as_object().unwrap();
    for key in ["id", "prompt", "response", "created_at"] {
        assert_eq!(found[key], created[key], "{key}");
    }
    assert!(found["score"].as_f64().unwrap() > 0.999, "{found:?}");
}

#[tokio::test]
async fn pages_hold_every_prompt_once_while_new_ones_arrive() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let mut expected = Vec::new();
    for n in 0..45 {
        expected.push(user.prompt(&format!("prompt {n}")).await);
    }
    expected.reverse();
    let (mut seen, mut pages, mut query) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = list(&user, &query).await;
        assert_eq!(page.status, 200);
        pages.push(page.ids().len());
        seen.extend(page.ids());
        user.prompt("a newcomer, which belongs to no page after the first")
            .await;
        match page.json()["next"].as_str() {
            Some(next) => query = format!("?cursor={next}"),
            None => break,
        }
    }
    assert_eq!(pages, [20, 20, 5]);
    assert_eq!(seen, expected);
    assert_eq!(user.all_prompts().await.len(), 48);
    for (query, length) in [("?limit=1", 1), ("?limit=48", 48), ("?limit=100", 48)] {
        assert_eq!(list(&user, query).await.ids().len(), length);
    }
    assert_eq!(
        list(&user, "?limit=48").await.json()["next"],
        Value::Null,
        "no page is empty"
    );
}

#[tokio::test]
async fn a_page_of_long_texts_ends_early_and_the_next_one_goes_on() {
    let app = spawn_app(|config| config.max_prompt_chars = 400_000).await;
    let user = app.user("alice").await;
    let mut ids = Vec::new();
    // Prompt and answer: 0.6 MB each for the long ones.
    for length in [300_000, 300_000, 10, 300_000] {
        ids.insert(0, user.prompt(&"x".repeat(length)).await);
    }
    let page = list(&user, "?limit=100").await;
    assert_eq!(page.ids(), ids[..2]);
    assert!(page.body.len() < 1 << 20, "{}", page.body.len());
    assert!(page.json()["next"].is_string());
    let all = user.all_prompts().await;
    let listed: Vec<i64> = all.iter().map(|one| one["id"].as_i64().unwrap()).collect();
    assert_eq!(listed, ids);
}

#[tokio::test]
async fn bad_values_are_reported_by_field() {
    let app = spawn_app(|config| config.max_prompt_chars = 10).await;
    let user = app.user("alice").await;
    for (query, fields) in [
        ("?limit=0", &["limit"][..]),
        ("?limit=101", &["limit"]),
        ("?limit=ten", &["limit"]),
        ("?limit=", &["limit"]),
        ("?cursor=garbage", &["cursor"]),
        ("?cursor=", &["cursor"]),
        ("?cursor=5&limit=-1", &["cursor", "limit"]),
    ] {
        assert_field_errors(&list(&user, query).await, fields, query);
    }
    for query in ["?q=x&k=0", "?q=x&k=101", "?q=x&k=x", "?q=x&k=1.5"] {
        let answer = list(&user, &format!("similar/{query}")).await;
        assert_field_errors(&answer, &["k"], query);
    }
    for query in ["", "?q=", "?prompt=&q="] {
        let answer = list(&user, &format!("similar/{query}")).await;
        assert_eq!(
            (answer.status, answer.json()),
            (400, json!({ "detail": "Missing ?q=" }))
        );
    }
    for body in [
        json!({}),
        json!({ "prompt": null }),
        json!({ "prompt": "" }),
        json!({ "prompt": "  \n" }),
        json!({ "prompt": ["x"] }),
        json!({ "prompt": true }),
        json!({ "prompt": "a\u{0}b" }),
        json!({ "prompt": "eleven char" }),
        json!({ "prompt": "ëlëvën chär" }),
    ] {
        let answer = user.post("/api/prompts/").json(&body).send().await;
        assert_field_errors(&answer, &["prompt"], &body.to_string());
    }
    let body = json!({ "prompt": "x", "websocket": "maybe" });
    let answer = user.post("/api/prompts/").json(&body).send().await;
    assert_field_errors(&answer, &["websocket"], "maybe");
    let long = list(&user, "similar/?q=eleven+char").await;
    assert_field_errors(&long, &["q"], "eleven characters");
    assert_eq!(user.all_prompts().await.len(), 0);

    // Counted in characters, after trimming: ten of them, in twenty bytes.
    assert_eq!(user.try_prompt(" ëëëëëëëëëë ").await.status, 201);
    assert_eq!(list(&user, "similar/?q=%C3%AB%C3%AB").await.status, 200);
}

fn assert_field_errors(answer: &Response, fields: &[&str], what: &str) {
    assert_eq!(answer.status, 400, "{what}: {answer:?}");
    let body = answer.json();
    let named: Vec<&String> = body.as_object().unwrap().keys().collect();
    assert_eq!(named, fields, "{what}");
    for messages in body.as_object().unwrap().values() {
        let messages = messages.as_array().unwrap();
        assert!(
            !messages.is_empty() && messages.iter().all(Value::is_string),
            "{what}: {body}"
        );
    }
}

#[tokio::test]
async fn another_users_prompt_does_not_exist() {
    let app = spawn_app(|_| ()).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let id = alice.prompt("alice's own").await;
    let path = format!("/api/prompts/{id}/");
    let none = bob.get("/api/prompts/999999/").send().await;
    assert_eq!(
        (none.status, none.json()),
        (404, json!({ "detail": "Not found." }))
    );
    for answer in [bob.get(&path).send().await, bob.delete(&path).send().await] {
        assert_eq!((answer.status, &answer.body), (404, &none.body));
    }
    for id in [
        "0",
        "-1",
        "x",
        "1.0",
        "%31x",
        "99999999999999999999999",
        "%ff",
    ] {
        assert_eq!(
            alice
                .get(&format!("/api/prompts/{id}/"))
                .send()
                .await
                .status,
            404,
            "{id}"
        );
    }
    assert_eq!(bob.all_prompts().await.len(), 0);
    assert_eq!(alice.get(&path).send().await.status, 200);
    assert_eq!(alice.delete(&path).send().await.status, 204);
    assert_eq!(alice.delete(&path).send().await.status, 404);
    assert_eq!(alice.get(&path).send().await.status, 404);
}

#[tokio::test]
async fn ids_are_never_used_again() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let first = user.prompt("one").await;
    assert_eq!(
        user.delete(&format!("/api/prompts/{first}/"))
            .send()
            .await
            .status,
        204
    );
    let app = spawn_app_in(app.stop().await, |_| ()).await;
    let user = User {
        client: app.client().with_bearer(&user.access),
        ..user
    };
    assert!(user.prompt("two").await > first);
}

#[tokio::test]
async fn a_body_may_be_json_or_a_form_and_nothing_else() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let multipart =
        "--b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\nhello form\r\n--b--\r\n";
    for (kind, body) in [
        ("application/json", r#"{"prompt": "hello form"}"#),
        (
            "application/json; charset=utf-8",
            r#"{"prompt": "hello form", "more": [{}]}"#,
        ),
        (
            "application/x-www-form-urlencoded",
            "prompt=hello+form&websocket=false",
        ),
        ("multipart/form-data; boundary=b", multipart),
    ] {
        let answer = user.post("/api/prompts/").body(kind, body).send().await;
        assert_eq!(answer.status, 201, "{kind}: {answer:?}");
        assert_eq!(answer.json()["prompt"], "hello form", "{kind}");
    }
    for (kind, body, status) in [
        ("text/plain", "hello", 415),
        ("application/xml", "<prompt/>", 415),
        ("application/json", "{\"prompt\": \"sesame", 400),
        ("application/json", "[\"sesame\"]", 400),
        ("application/json", "\u{feff}{}", 400),
        ("multipart/form-data", multipart, 400),
        ("multipart/form-data; boundary=b", "--b\r\nsesame", 400),
    ] {
        let answer = user.post("/api/prompts/").body(kind, body).send().await;
        assert_eq!(answer.status, status, "{kind} {body}: {answer:?}");
        assert!(
            !answer.json().to_string().contains("sesame"),
            "input is not quoted: {answer:?}"
        );
    }
    let large = json!({ "prompt": "x".repeat(1 << 20) });
    let answer = user.post("/api/prompts/").json(&large).send().await;
    assert_eq!(
        (answer.status, answer.json()["detail"].is_string()),
        (413, true)
    );
}

#[tokio::test]
async fn every_answer_has_a_request_id_and_an_answer_to_a_known_user_its_rates() {
    let app = spawn_app(|config| config.prompt_throttle = "5/s,10/min".parse().unwrap()).await;
    let user = app.user("alice").await;
    let own = user
        .get("/api/prompts/")
        .header("x-request-id", "Trace-1.2_3")
        .send()
        .await;
    assert_eq!(own.header("x-request-id"), Some("Trace-1.2_3"));
    let mut made = BTreeSet::new();
    for bad in ["", "two words", "a,b", &"a".repeat(65)] {
        let answer = app.get("/nowhere").header("x-request-id", bad).send().await;
        let id = answer.header("x-request-id").unwrap();
        assert!(
            id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{id}"
        );
        made.insert(id.to_owned());
    }
    assert_eq!(made.len(), 4, "each request has its own");

    let posted = user.try_prompt("hello").await;
    let listed = list(&user, "").await;
    let missing = user.get("/api/prompts/999999/").send().await;
    let refused = list(&user, "?limit=0").await;
    for answer in [own, posted, listed, missing, refused] {
        let policy = answer.header("ratelimit-policy");
        assert_eq!(
            policy,
            Some("\"second\";q=5;w=1, \"minute\";q=10;w=60"),
            "{answer:?}"
        );
        let left = answer.header("ratelimit").unwrap();
        assert!(
            left.starts_with("\"second\";r=") || left.starts_with("\"minute\";r="),
            "{left}"
        );
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
    }
    let stranger = app.get("/api/prompts/").send().await;
    assert_eq!(
        (stranger.status, stranger.header("ratelimit-policy")),
        (401, None)
    );
}

/// Long enough that the model works on it for a while: the model's whole window of tokens.
fn long_prompt(n: usize) -> String {
    format!(
        "{n} {}",
        "the quick brown fox jumps over the lazy dog ".repeat(60)
    )
    .trim()
    .to_owned()
}

#[tokio::test]
async fn a_caller_that_hangs_up_loses_nothing() {
    const POSTS: usize = 12;
    let upstream = Upstream::start().await;
    let gate = Gate::new();
    let held = Reply::default().wait(&gate).and(Reply::answer("at last"));
    upstream.plan_many(POSTS, &held);
    let app = spawn_app(|config| {
        let mut upstream = crate::llm::config(&upstream);
        // One user has half of them at most.
        upstream.max_in_flight = 2 * POSTS;
        config.upstream = Some(upstream);
    })
    .await;
    let user = app.user("alice").await;
    let mut connections = Vec::new();
    for n in 0..POSTS {
        let mut connection = TcpStream::connect(app.addr).await.unwrap();
        connection
            .write_all(&post_bytes(&user, &long_prompt(n)))
            .await
            .unwrap();
        connections.push(connection);
    }
    eventually!(upstream.requests().len() == POSTS);
    for connection in connections {
        // Not even a farewell: the peer's next packet is answered by a reset.
        connection.set_zero_linger().unwrap();
    }
    eventually!(app.metric("http_connections").await <= Some(3.0));
    gate.open();
    // Nobody hears of their ends; searches find them a moment after they are listed as completed.
    eventually!(user.similar("the quick brown fox", 100).await.len() == POSTS);
    let prompts: BTreeSet<String> = user
        .all_prompts()
        .await
        .iter()
        .map(|prompt| prompt["prompt"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(prompts, (0..POSTS).map(long_prompt).collect());
    assert_listed_and_found_alike(&user, POSTS).await;
}

#[tokio::test]
async fn a_caller_that_hangs_up_at_once_is_served_wholly_or_not_at_all() {
    const POSTS: usize = 40;
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    // It may be that none of the others is begun.
    assert_eq!(user.try_prompt("patient").await.status, 201);
    for n in 0..POSTS {
        let mut connection = TcpStream::connect(app.addr).await.unwrap();
        connection
            .write_all(&post_bytes(&user, &format!("hasty {n}")))
            .await
            .unwrap();
        if n % 2 == 0 {
            connection.set_zero_linger().unwrap();
        }
    }
    // A post that was begun ends before the service ends. So no further prompt appears after the
    // restart.
    let app = spawn_app_in(app.stop().await, |_| ()).await;
    let user = User {
        client: app.client().with_bearer(&user.access),
        ..user
    };
    let prompts: Vec<String> = user
        .all_prompts()
        .await
        .iter()
        .map(|prompt| prompt["prompt"].to_string())
        .collect();
    let distinct: BTreeSet<&String> = prompts.iter().collect();
    assert_eq!(distinct.len(), prompts.len(), "none was stored twice");
    assert_listed_and_found_alike(&user, prompts.len()).await;
}

/// There are `count` completed prompts, and a search finds each once.
async fn assert_listed_and_found_alike(user: &User, count: usize) {
    let listed: BTreeSet<i64> = user
        .all_prompts()
        .await
        .iter()
        .filter(|prompt| prompt["status"] == "completed")
        .map(|prompt| prompt["id"].as_i64().unwrap())
        .collect();
    let found = user.similar("the quick brown fox", 100).await;
    assert_eq!((listed.len(), found.len()), (count, count));
    assert_eq!(
        listed,
        found.into_iter().collect(),
        "each is found, and found once"
    );
}

#[tokio::test]
async fn what_was_answered_with_201_outlives_a_service_that_dies() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let posts = (0..24).map(|n| {
        let post = user
            .post("/api/prompts/")
            .json(&json!({ "prompt": format!("number {n}") }));
        async move { post.try_send().await.ok() }
    });
    let mut posts: tokio::task::JoinSet<Option<Response>> = posts.collect();
    let mut acknowledged = Vec::new();
    while acknowledged.len() < 8 {
        acknowledged.extend(posts.join_next().await.unwrap().unwrap());
    }
    // The others are in the middle of it.
    let folder = app.kill().await;
    while let Some(answer) = posts.join_next().await {
        acknowledged.extend(answer.unwrap());
    }
    let app: App = spawn_app_in(folder, |_| ()).await;
    let user = User {
        client: app.client().with_bearer(&user.access),
        ..user
    };
    let listed = user.all_prompts().await;
    for answer in acknowledged.iter().filter(|answer| answer.status == 201) {
        let id = &answer.json()["id"];
        assert!(
            listed.iter().any(|prompt| prompt["id"] == *id),
            "{id} was acknowledged and is gone"
        );
    }
    // The calls that ran when the service died have expired, or will, and are not searchable.
    let is_completed = |prompt: &&Value| prompt["status"] == "completed";
    let completed = listed.iter().filter(is_completed).count();
    assert_listed_and_found_alike(&user, completed).await;
}

#[tokio::test]
async fn a_user_who_keeps_as_many_prompts_as_allowed_deletes_some_to_post_again() {
    let app = spawn_app(|config| config.calls.max_prompts_per_user = Some(2)).await;
    let (user, other) = (app.user("alice").await, app.user("bob").await);
    let keyed = || {
        user.post("/api/prompts")
            .header("Idempotency-Key", "k")
            .json(&json!({ "prompt": "with a key" }))
            .send()
    };
    let first = user.prompt("first").await;
    let kept = keyed().await;
    assert_eq!(kept.status, 201);

    for body in [
        json!({ "prompt": "more" }),
        json!({ "prompt": "more", "stream": true }),
    ] {
        let refused = user.post("/api/prompts").json(&body).send().await;
        assert_eq!(refused.status, 403);
        assert_eq!(refused.json()["code"], "quota_exceeded");
        assert_eq!(refused.header("retry-after"), None);
        assert!(
            refused.json()["detail"]
                .as_str()
                .unwrap()
                .contains("Delete some")
        );
    }
    let replayed = keyed().await;
    assert_eq!((replayed.status, replayed.json()), (201, kept.json()));
    other.prompt("anothers bound is another").await;
    assert_eq!(user.all_prompts().await.len(), 2);

    let gone = user.delete(&format!("/api/prompts/{first}")).send().await;
    assert_eq!(gone.status, 204);
    user.prompt("again").await;
    assert_eq!(user.try_prompt("more").await.status, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_posts_keep_no_more_prompts_than_allowed() {
    let app = spawn_app(|config| config.calls.max_prompts_per_user = Some(5)).await;
    let user = Arc::new(app.user("alice").await);
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let user = Arc::clone(&user);
        tasks.spawn(async move { user.try_prompt("at once").await.status });
    }
    let mut statuses = tasks.join_all().await;
    statuses.sort_unstable();
    assert_eq!(statuses, [[201; 5].as_slice(), &[403; 15]].concat());
    assert_eq!(user.all_prompts().await.len(), 5);
}
