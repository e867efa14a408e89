//! The whole service with a Redis: what its clients and operators see when Redis stops and returns.
//!
//! Each replica has its own accounts here. The first account of each is the same user for all,
//! since they share a key.

use prompt_service::config::{Config, RedisConfig, Secret};
use serde_json::json;

use crate::support::redis::RedisServer;
use crate::support::{App, DEADLINE, Folder, Socket, spawn_app, try_spawn_app_in};

async fn replica(redis: RedisConfig, rates: &str) -> App {
    let rates = rates.parse().unwrap();
    spawn_app(move |config| {
        share(config, redis);
        config.prompt_throttle = rates;
    })
    .await
}

fn share(config: &mut Config, redis: RedisConfig) {
    config.redis = Some(redis);
    config.accounts.secret_key = Some(Secret::new("one key for all replicas of this test"));
}

async fn open(app: &App, access: &str) -> Socket {
    let bearer = format!("Bearer {access}");
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap_or_else(|refusal| panic!("refused: {refusal:?}"));
    socket.next_json().await;
    socket
}

async fn redis_part(app: &App) -> serde_json::Value {
    let answer = app.get("/readyz").send().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["parts"]["redis"].clone()
}

#[tokio::test]
async fn replicas_share_throttle_tickets_events_and_login_limits() {
    assert_shared_over(&RedisServer::start()).await;
}

#[tokio::test]
async fn keys_of_one_script_are_in_one_slot_of_a_cluster() {
    assert_shared_over(&RedisServer::start_cluster()).await;
}

async fn assert_shared_over(server: &RedisServer) {
    let (a, b) = (
        replica(server.config(), "3/h").await,
        replica(server.config(), "3/h").await,
    );
    let (on_a, on_b) = (a.user("alice").await, b.user("alice").await);
    assert_eq!(on_a.id, on_b.id);
    let ticket = a
        .post("/api/auth/ws-ticket/")
        .bearer(&on_a.access)
        .send()
        .await;
    assert_eq!(ticket.status, 201, "{ticket:?}");
    let ticket = ticket.json()["ticket"].as_str().unwrap().to_owned();
    let mut by_ticket = b
        .socket(&format!("/ws/prompts/?ticket={ticket}"), &[])
        .await
        .unwrap();
    by_ticket.next_json().await;
    let mut socket = open(&a, &on_b.access).await;
    let body = json!({ "prompt": "hello", "websocket": true });
    let posted = on_b.post("/api/prompts/").json(&body).send().await;
    assert_eq!(posted.status, 201, "{posted:?}");
    for socket in [&mut socket, &mut by_ticket] {
        assert_eq!(socket.next_json().await["data"], posted.json());
    }
    assert_eq!(on_a.try_prompt("two").await.status, 201);
    assert_eq!(on_b.try_prompt("three").await.status, 201);
    let refused = on_a.try_prompt("four").await;
    assert_eq!(refused.status, 429, "{refused:?}");
    // If reading the state takes too long, the replica returns its own record, which knows less.
    eventually!({
        let looked = on_b.get("/api/auth/me/").send().await;
        looked
            .header("ratelimit")
            .unwrap()
            .starts_with("\"hour\";r=0;")
    });
    for n in 0..10 {
        let app = if n % 2 == 0 { &a } else { &b };
        assert_eq!(app.try_login("alice", "wrong").await.status, 401);
    }
    for app in [&a, &b] {
        let refused = app.try_login("alice", crate::support::PASSWORD).await;
        assert_eq!(refused.status, 429, "{refused:?}");
    }
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn without_redis_prompts_and_searches_go_on_and_the_rest_is_unavailable() {
    let mut server = RedisServer::start();
    let app = replica(server.config(), "3/h").await;
    let user = app.user("alice").await;
    user.prompt("before").await;
    assert_eq!(redis_part(&app).await, "ok");
    assert_eq!(app.metric("backend_up{backend=\"redis\"}").await, Some(1.0));
    let mut socket = open(&app, &user.access).await;
    server.stop();
    eventually!(redis_part(&app).await == "down");
    eventually!(app.metric("backend_up{backend=\"redis\"}").await == Some(0.0));
    let code = tokio::time::timeout(DEADLINE, socket.close_code()).await;
    assert_eq!(code.unwrap(), 1012);
    let bearer = format!("Bearer {}", user.access);
    let refused = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await;
    let Err(refused) = refused else {
        panic!("a socket without events was let in")
    };
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.header("retry-after").is_some());
    let ticket = app
        .post("/api/auth/ws-ticket/")
        .bearer(&user.access)
        .send()
        .await;
    assert_eq!(ticket.status, 503, "{ticket:?}");
    assert!(ticket.header("retry-after").is_some());
    user.prompt("meanwhile").await;
    user.prompt("and again").await;
    assert_eq!(user.try_prompt("too many").await.status, 429);
    assert_eq!(user.similar("meanwhile", 3).await.len(), 3);
    app.login("alice").await;
    let degraded = app
        .metric("degraded_limit_decisions_total{limit=\"prompts\"}")
        .await;
    assert!(degraded.unwrap() >= 3.0);
    server.restart();
    eventually!(redis_part(&app).await == "ok");
    eventually!(
        app.socket("/ws/prompts/", &[("authorization", &bearer)])
            .await
            .is_ok()
    );
    let ticket = app
        .post("/api/auth/ws-ticket/")
        .bearer(&user.access)
        .send()
        .await;
    assert_eq!(ticket.status, 201, "{ticket:?}");
    let warned = |text: &str| {
        let warnings = app.log.lines();
        let is_it = |line: &&serde_json::Value| {
            line["level"] == "WARN" && line["message"].as_str().unwrap_or_default().contains(text)
        };
        warnings.iter().filter(is_it).count()
    };
    eventually!(warned("Redis is back") == 1);
    assert_eq!(warned("Redis is away"), 1);
    app.stop().await;
}

#[tokio::test]
async fn start_without_redis_names_the_setting_and_stops() {
    let mut server = RedisServer::start();
    let config = server.config();
    server.stop();
    let refused = try_spawn_app_in(Folder::new(), |settings| share(settings, config)).await;
    let error = format!("{:#}", refused.err().expect("there is no Redis"));
    assert!(error.starts_with("REDIS_URL: "), "{error}");
    assert!(!error.contains("127.0.0.1"), "{error}");
}

#[tokio::test]
async fn service_stops_in_time_while_redis_is_paused() {
    let server = RedisServer::start();
    let app = replica(server.impatient_config(), "off").await;
    let user = app.user("alice").await;
    let mut socket = open(&app, &user.access).await;
    server.pause();
    // Within the deadline, although Redis does not reply.
    app.stop().await;
    assert_eq!(socket.close_code().await, 1001);
}
