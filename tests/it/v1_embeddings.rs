//! `POST /v1/embeddings`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prompt_service::config::Config;
use prompt_service::embed::{Encode, Engine};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{App, Response, User, spawn_app};

const MODEL: &str = "all-MiniLM-L6-v2";

/// A service without a throttle.
async fn unthrottled() -> App {
    spawn_app(|config| config.v1_throttle = "off".parse().unwrap()).await
}

async fn try_embed(user: &User, body: &Value) -> Response {
    user.post("/v1/embeddings").json(body).send().await
}

async fn embed(user: &User, input: Value) -> Value {
    let answer = try_embed(user, &json!({ "model": MODEL, "input": input })).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// The vectors of a response, whose places are those of the texts.
fn vectors(answer: &Value) -> Vec<Vec<f32>> {
    let data = answer["data"].as_array().unwrap();
    let places = data.iter().map(|item| item["index"].as_u64().unwrap());
    assert!(places.eq(0..data.len() as u64));
    let numbers = |item: &Value| serde_json::from_value(item["embedding"].clone()).unwrap();
    data.iter().map(numbers).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A text of more tokens than the model reads.
fn long(number: usize) -> String {
    format!("{number} {}", "many words make a long text ".repeat(60))
}

#[tokio::test]
async fn a_text_gets_the_vector_by_which_a_post_of_it_is_found() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    let (text, query) = ("How do I boil an egg?", "cooking for beginners");
    let (answer, asked) = (
        embed(&user, json!(text)).await,
        embed(&user, json!(query)).await,
    );
    let (of_text, of_query) = (&vectors(&answer)[0], &vectors(&asked)[0]);
    let engine = Engine::bundled().unwrap();
    let ids = engine.tokenize(text);
    let expected = engine.embed(&[&ids], &mut engine.scratch());
    assert_eq!(of_text[..], expected[0].0[..]);
    let usage = json!({ "prompt_tokens": ids.len(), "total_tokens": ids.len() });
    assert_eq!(
        (&answer["object"], &answer["model"], &answer["usage"]),
        (&json!("list"), &json!(MODEL), &usage)
    );
    user.prompt(text).await;
    let found = user.search(query, 1).await.json();
    let score = found["results"][0]["score"].as_f64().unwrap() as f32;
    // Stored vectors have half the precision.
    assert!((score - dot(of_text, of_query)).abs() < 2e-3, "{score}");
    assert_eq!(
        user.all_prompts().await.len(),
        1,
        "the texts are not stored"
    );
}

#[tokio::test]
async fn a_list_gets_the_vectors_of_its_texts_one_by_one() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    let texts = ["one", "two\0", " ", "ünïcödé 漢字", "one", &long(1)];
    let whole = embed(&user, json!(texts)).await;
    let mut tokens = 0;
    for (text, vector) in texts.iter().zip(vectors(&whole)) {
        let single = embed(&user, json!(text)).await;
        assert_eq!(vectors(&single), [vector], "{text:?}");
        tokens += single["usage"]["prompt_tokens"].as_u64().unwrap();
    }
    assert_eq!(whole["usage"]["prompt_tokens"], tokens);
    let longest = embed(&user, json!([long(1)])).await;
    assert_eq!(
        longest["usage"]["total_tokens"], 256,
        "what the model reads"
    );
}

#[tokio::test]
async fn base64_has_the_same_numbers() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    let expected = vectors(&embed(&user, json!(["one", "two"])).await);
    let body = json!({ "model": MODEL, "input": ["one", "two"], "encoding_format": "base64" });
    let answer = try_embed(&user, &body).await.json();
    for (item, expected) in answer["data"].as_array().unwrap().iter().zip(&expected) {
        let bytes = STANDARD
            .decode(item["embedding"].as_str().unwrap())
            .unwrap();
        let numbers: Vec<f32> = bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(numbers, *expected);
    }
}

#[tokio::test]
async fn fewer_dimensions_are_the_first_ones_at_length_1() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    let whole = vectors(&embed(&user, json!("a text")).await).remove(0);
    for dimensions in [1, 64, 384] {
        let body = json!({ "model": MODEL, "input": "a text", "dimensions": dimensions });
        let short = vectors(&try_embed(&user, &body).await.json()).remove(0);
        let first = &whole[..dimensions];
        assert_eq!(short.len(), dimensions);
        assert!((dot(&short, &short) - 1.0).abs() < 1e-5);
        let length = dot(first, first).sqrt();
        assert!(
            (dot(&short, first) - length).abs() < 1e-5,
            "the same direction"
        );
    }
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused_with_the_member_that_is_wrong() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    for (param, status, change) in [
        ("model", 404, json!({ "model": "text-embedding-3-small" })),
        ("model", 400, json!({ "model": null })),
        ("input", 400, json!({ "input": null })),
        ("input", 400, json!({ "input": "" })),
        ("input", 400, json!({ "input": [] })),
        ("input", 400, json!({ "input": ["a", ""] })),
        ("input", 400, json!({ "input": vec!["a"; 2049] })),
        ("input", 400, json!({ "input": [15339, 1917] })),
        ("input", 400, json!({ "input": [[15339], [1917]] })),
        ("encoding_format", 400, json!({ "encoding_format": "int8" })),
        ("dimensions", 400, json!({ "dimensions": 0 })),
        ("dimensions", 400, json!({ "dimensions": 385 })),
        ("dimensions", 400, json!({ "dimensions": "64" })),
    ] {
        let mut body = json!({ "model": MODEL, "input": "a", "user": "u-1", "unknown": [1] });
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        let answer = try_embed(&user, &body).await;
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, error["param"].as_str()),
            (status, Some(param)),
            "{change}"
        );
        assert_eq!(error["type"], "invalid_request_error");
        let is_unknown = error["code"] == "model_not_found";
        assert_eq!(is_unknown, status == 404, "{error}");
        let names_the_setting = error["message"]
            .as_str()
            .unwrap()
            .contains("check_embedding_ctx_length=False");
        assert_eq!(names_the_setting, change.to_string().contains("1917"));
    }
    let no_json = user.post("/v1/embeddings").body("application/json", "{");
    assert_eq!(no_json.send().await.status, 400);
    let no_caller = app.post("/v1/embeddings").json(&json!({}));
    assert_eq!(no_caller.send().await.status, 401);
}

#[tokio::test]
async fn an_api_key_needs_the_scope_and_the_model() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    let body = json!({ "model": MODEL, "input": "a" });
    for (key, status, code) in [
        (json!({ "scopes": ["embeddings"] }), 200, Value::Null),
        (
            json!({ "scopes": ["embeddings"], "models": ["all-*"] }),
            200,
            Value::Null,
        ),
        (
            json!({ "scopes": ["chat", "read", "write"] }),
            403,
            json!("scope"),
        ),
        (
            json!({ "scopes": ["embeddings"], "models": ["gpt-*"] }),
            404,
            json!("model_not_found"),
        ),
    ] {
        let mut key = key;
        key["name"] = json!("key");
        let made = user.api_key_with(&key).await;
        let answer = made.client.post("/v1/embeddings").json(&body).send().await;
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (status, &code),
            "{key}"
        );
    }
}

#[tokio::test]
async fn a_body_larger_than_the_setting_is_refused() {
    let app = spawn_app(|config| config.server.max_v1_body = 1 << 20).await;
    let user = app.user("alice").await;
    let body = json!({ "model": MODEL, "input": "a".repeat(1 << 20) });
    assert_eq!(try_embed(&user, &body).await.status, 413);
    let fitting = json!({ "model": MODEL, "input": "a ".repeat(500_000) });
    assert_eq!(try_embed(&user, &fitting).await.status, 200);
}

#[tokio::test]
async fn the_longest_list_gets_all_its_vectors_and_is_counted_once() {
    let app = spawn_app(|config: &mut Config| config.v1_throttle = "2/day".parse().unwrap()).await;
    let user = app.user("alice").await;
    let texts: Vec<String> = (0..2048).map(|n| format!("text {n}")).collect();
    let answer = try_embed(&user, &json!({ "model": MODEL, "input": texts })).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("2"));
    assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some("1"));
    let all = vectors(&answer.json());
    assert_eq!(all.len(), 2048);
    let one = vectors(&embed(&user, json!("text 2047")).await);
    assert_eq!(all[2047], one[0]);
    // Counted before the body is looked at.
    let refused = user.post("/v1/embeddings").body("application/json", "{");
    let refused = refused.send().await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("0"));
    assert!(refused.header("retry-after-ms").is_some());
    let counted = app
        .metric("embedding_duration_seconds_count{purpose=\"v1\"}")
        .await;
    assert_eq!(counted, Some(2049.0));
}

#[tokio::test]
async fn a_search_of_another_user_is_served_beside_a_long_list() {
    let app = unthrottled().await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let id = bob.prompt("How do I boil an egg?").await;
    let texts: Vec<String> = (0..400).map(long).collect();
    let body = json!({ "model": MODEL, "input": texts });
    let bulk = alice.post("/v1/embeddings").json(&body);
    let mut tasks = JoinSet::new();
    tasks.spawn(bulk.send());
    let done = "embedding_duration_seconds_count{purpose=\"v1\"}";
    eventually!(app.metric(done).await > Some(0.0));
    assert_eq!(bob.similar("eggs", 1).await, [id]);
    let embedded = app.metric(done).await.unwrap();
    assert!(embedded < 400.0, "the search was served in between");
    let answer = tasks.join_next().await.unwrap().unwrap();
    assert_eq!(vectors(&answer.json()).len(), 400);
}

#[tokio::test]
async fn a_caller_that_leaves_stops_the_rest() {
    let app = unthrottled().await;
    let user = app.user("alice").await;
    let texts: Vec<String> = (0..2000).map(long).collect();
    let body = json!({ "model": MODEL, "input": texts });
    let mut tasks = JoinSet::new();
    tasks.spawn(user.post("/v1/embeddings").json(&body).send());
    let done = "embedding_duration_seconds_count{purpose=\"v1\"}";
    eventually!(app.metric(done).await > Some(0.0));
    tasks.abort_all();
    let left = "embedding_saved_total{how=\"caller_left\"}";
    eventually!(app.metric(left).await > Some(0.0));
    eventually!(app.metric("request_memory_bytes").await == Some(0.0));
    let embedded = app.metric(done).await.unwrap();
    assert!(embedded < 2000.0, "{embedded}");
}
