//! How often a user may post.

use std::time::Duration;

use prompt_service::config::Config;
use tokio::task::JoinSet;

use crate::support::{Client, Response, spawn_app};

fn rates(text: &'static str) -> impl FnOnce(&mut Config) {
    move |config| config.prompt_throttle = text.parse().unwrap()
}

fn retry_after(answer: &Response) -> u64 {
    assert_eq!(answer.status, 429, "{answer:?}");
    answer.header("retry-after").unwrap().parse().unwrap()
}

#[tokio::test]
async fn exactly_the_rate_is_let_through_when_many_clients_race() {
    for (text, limit) in [("1/day", 1), ("5/h,7/day", 5)] {
        let app = spawn_app(rates(text)).await;
        let user = app.user("alice").await;
        let mut clients = JoinSet::new();
        for n in 0..32 {
            // Each with a connection of its own.
            let client = Client::new(app.addr).with_bearer(&user.access);
            clients.spawn(async move {
                let body = serde_json::json!({ "prompt": format!("client {n}") });
                client.post("/api/prompts/").json(&body).send().await.status
            });
        }
        let statuses = clients.join_all().await;
        let count = |status| statuses.iter().filter(|one| **one == status).count();
        assert_eq!((count(201), count(429)), (limit, 32 - limit), "{text}");
        assert_eq!(user.all_prompts().await.len(), limit);
        let throttled = app
            .metric("throttled_requests_total{throttle=\"prompts\"}")
            .await;
        assert_eq!(throttled, Some(32.0 - limit as f64));
    }
}

#[tokio::test]
async fn the_default_is_one_a_second_and_ten_a_minute() {
    let app = spawn_app(rates("1/s,10/min")).await;
    let user = app.user("alice").await;
    let first = user.try_prompt("one").await;
    assert_eq!(first.status, 201);
    assert_eq!(
        first.header("ratelimit-policy"),
        Some("\"second\";q=1;w=1, \"minute\";q=10;w=60")
    );
    assert_eq!(first.header("ratelimit"), Some("\"second\";r=0;t=1"));
    // A second one within the second is refused. Until there is one, none may be kept waiting for
    // the minute.
    let app = spawn_app(rates("1/s")).await;
    let user = app.user("alice").await;
    let mut answers = Vec::new();
    eventually!({
        answers.push(user.try_prompt("again").await);
        answers.last().unwrap().status == 429
    });
    let refused = answers.pop().unwrap();
    assert_eq!(retry_after(&refused), 1);
    assert_eq!(
        refused.json(),
        serde_json::json!({ "detail": "Request was throttled. Expected available in 1 second." })
    );
    // The wait that the answer asks for, not one for a result.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        user.try_prompt("after the wait").await.status,
        201,
        "a retry after as long succeeds"
    );
}

#[tokio::test]
async fn request_refused_by_one_rate_is_not_counted_by_another() {
    let app = spawn_app(rates("1/s,100/day")).await;
    let user = app.user("alice").await;
    let (mut accepted, mut refused) = (0, 0);
    eventually!({
        let answer = user.try_prompt("again").await;
        if answer.status == 201 {
            accepted += 1;
        } else {
            assert_eq!(retry_after(&answer), 1);
            refused += 1;
        }
        accepted > 1 && refused > 20
    });
    // When the second has passed, the day is the tighter one.
    let standing = async || {
        let answer = user.get("/api/prompts/").send().await;
        answer.header("ratelimit").unwrap().to_owned()
    };
    eventually!(standing().await.starts_with("\"day\";"));
    let (standing, left) = (standing().await, 100 - accepted);
    let expected = format!("\"day\";r={left};t=");
    assert!(standing.starts_with(&expected), "{standing}: {left}");
}

#[tokio::test]
async fn longer_rate_refuses_until_its_window_has_room() {
    let app = spawn_app(rates("1/s,3/day")).await;
    let user = app.user("alice").await;
    for _ in 0..3 {
        eventually!(user.try_prompt("again").await.status == 201);
    }
    let answer = user.try_prompt("a fourth").await;
    let wait = retry_after(&answer);
    assert!((86_000..=86_400).contains(&wait), "{wait}");
    let detail = format!("Request was throttled. Expected available in {wait} seconds.");
    assert_eq!(answer.json()["detail"], detail.as_str());
    let standing = answer.header("ratelimit").unwrap();
    assert!(standing.starts_with("\"day\";r=0;t="), "{standing}");
    assert_eq!(
        answer.header("ratelimit-policy"),
        Some("\"second\";q=1;w=1, \"day\";q=3;w=86400")
    );
}

#[tokio::test]
async fn only_posts_of_one_user_are_counted() {
    let app = spawn_app(rates("2/day")).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let left = async || {
        let answer = alice.get("/api/prompts/").send().await;
        assert_eq!(answer.status, 200);
        answer
            .header("ratelimit")
            .unwrap()
            .split(';')
            .nth(1)
            .unwrap()
            .to_owned()
    };
    for _ in 0..5 {
        assert_eq!(left().await, "r=2");
        alice.search("reading is free", 5).await;
        assert_eq!(alice.get("/api/prompts/1/").send().await.status, 404);
        assert_eq!(alice.delete("/api/prompts/1/").send().await.status, 404);
        assert_eq!(app.post("/api/prompts/").send().await.status, 401);
    }
    // Counted before it is looked at.
    let bad = alice
        .post("/api/prompts/")
        .body("application/json", "{")
        .send()
        .await;
    assert_eq!((bad.status, left().await.as_str()), (400, "r=1"));
    let blank = alice.try_prompt(" ").await;
    assert_eq!((blank.status, left().await.as_str()), (400, "r=0"));
    assert_eq!(alice.try_prompt("too late").await.status, 429);
    assert_eq!(bob.try_prompt("each has its own").await.status, 201);
    assert_eq!(
        alice.all_prompts().await.len(),
        0,
        "a throttled user reads on"
    );
}

#[tokio::test]
async fn the_throttle_comes_before_the_body_and_after_the_method() {
    let app = spawn_app(rates("1/day")).await;
    let user = app.user("alice").await;
    assert_eq!(user.try_prompt("the one").await.status, 201);
    let answer = user
        .post("/api/prompts/")
        .body("text/plain", "x")
        .send()
        .await;
    assert_eq!(answer.status, 429, "rather than 415");
    let answer = user
        .client
        .request(hyper::Method::PUT, "/api/prompts/")
        .send()
        .await;
    assert_eq!(answer.status, 405);
    let answer = user
        .post("/api/prompts/")
        .header("accept", "text/html")
        .send()
        .await;
    assert_eq!(answer.status, 406);
}

#[tokio::test]
async fn throttle_that_is_off_limits_nothing_and_adds_no_headers() {
    let app = spawn_app(rates("off")).await;
    let user = app.user("alice").await;
    for n in 0..20 {
        let answer = user.try_prompt(&format!("number {n}")).await;
        assert_eq!(answer.status, 201);
        assert_eq!(
            (
                answer.header("ratelimit"),
                answer.header("ratelimit-policy")
            ),
            (None, None)
        );
    }
}
