//! Stopping and starting: requests in flight finish, sockets are closed with a reason, and one
//! folder has one service.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{App, DEADLINE, User, on_postgres, spawn_app, spawn_app_in, try_spawn_app_in};

/// A post whose body has not arrived completely: the connection, and the rest of the body.
async fn half_a_post(app: &App, user: &User, prompt: &str) -> (TcpStream, String) {
    let body = json!({ "prompt": prompt }).to_string();
    let (now, later) = body.split_at(5);
    let head = format!(
        "POST /api/prompts/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{now}",
        user.access,
        body.len()
    );
    let mut connection = TcpStream::connect(app.addr).await.unwrap();
    connection.write_all(head.as_bytes()).await.unwrap();
    (connection, later.to_owned())
}

/// Everything that arrives until the service closes the connection.
async fn rest_of(mut connection: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A connection that is cut off may end with an error or without one.
    let _ = timeout(DEADLINE, connection.read_to_end(&mut bytes))
        .await
        .expect("the connection ends");
    String::from_utf8(bytes).unwrap()
}

/// How many posts of the user the throttle has counted: each as soon as its head has arrived.
async fn posts_counted(user: &User) -> u32 {
    let answer = user.get("/api/prompts/").send().await;
    let left = answer
        .header("ratelimit")
        .unwrap()
        .split("r=")
        .nth(1)
        .unwrap()
        .to_owned();
    100 - left.split(';').next().unwrap().parse::<u32>().unwrap()
}

#[tokio::test]
async fn request_in_flight_finishes_after_the_listener_closed() {
    let mut app = spawn_app(|config| config.prompt_throttle = "100/day".parse().unwrap()).await;
    let user = app.user("alice").await;
    let (mut connection, later) = half_a_post(&app, &user, "in flight").await;
    eventually!(posts_counted(&user).await == 1);
    app.begin_stop();
    eventually!(
        TcpStream::connect(app.addr).await.is_err(),
        "the listener closes"
    );
    assert!(app.is_running(), "the service waits for the request");
    connection.write_all(later.as_bytes()).await.unwrap();
    let answer = rest_of(connection).await;
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{answer}");
    assert!(
        answer.ends_with('}') && answer.contains("[mock] You said: in flight"),
        "{answer}"
    );

    let app = spawn_app_in(app.stopped().await, |_| ()).await;
    let user = User {
        client: app.client().with_bearer(&user.access),
        ..user
    };
    assert_eq!(user.all_prompts().await.len(), 1);
    assert_eq!(user.similar("in flight", 5).await.len(), 1);
}

#[tokio::test]
async fn request_that_never_arrives_is_cut_off_at_the_end_of_the_grace_period() {
    let mut app = spawn_app(|config| {
        config.prompt_throttle = "100/day".parse().unwrap();
        config.server.shutdown_grace = Duration::from_millis(200);
    })
    .await;
    let user = app.user("alice").await;
    let (connection, _) = half_a_post(&app, &user, "never comes").await;
    eventually!(posts_counted(&user).await == 1);
    app.begin_stop();
    let folder = app.stopped().await;
    drop(connection);
    let app = spawn_app_in(folder, |_| ()).await;
    let user = User {
        client: app.client().with_bearer(&user.access),
        ..user
    };
    assert_eq!(user.all_prompts().await.len(), 0);
}

#[tokio::test]
async fn while_draining_the_service_is_not_ready_and_still_serves() {
    let mut app = spawn_app(|config| config.server.shutdown_delay = 2 * DEADLINE).await;
    let user = app.user("alice").await;
    assert_eq!(app.get("/readyz").send().await.status, 200);
    app.begin_stop();
    eventually!(app.get("/readyz").send().await.status == 503);
    let answer = app.get("/readyz").send().await;
    assert_eq!(
        (&answer.json()["status"], answer.header("retry-after")),
        (&json!("stopping"), Some("1"))
    );
    assert_eq!(app.get("/healthz").send().await.status, 200);
    // On new connections too.
    let client = crate::support::Client::new(app.addr).with_bearer(&user.access);
    let answer = client
        .post("/api/prompts/")
        .json(&json!({ "prompt": "late" }))
        .send()
        .await;
    assert_eq!(answer.status, 201);
    let bearer = format!("Bearer {}", user.access);
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap();
    assert_eq!(socket.next_json().await["user_id"], user.id);
    app.kill().await;
}

#[tokio::test]
async fn sockets_are_closed_as_going_away() {
    let mut app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let bearer = format!("Bearer {}", user.access);
    let mut sockets = Vec::new();
    for _ in 0..5 {
        let mut socket = app
            .socket("/ws/prompts/", &[("authorization", &bearer)])
            .await
            .unwrap();
        socket.next_json().await;
        sockets.push(socket);
    }
    app.begin_stop();
    for mut socket in sockets {
        assert_eq!(socket.close_code().await, 1001);
        socket.close().await;
    }
    app.stopped().await;
}

#[tokio::test]
async fn idle_connections_do_not_delay_the_stop() {
    let app = spawn_app(|config| config.server.shutdown_grace = 10 * DEADLINE).await;
    // One that was used and kept open, and one that never sent anything.
    assert_eq!(app.get("/healthz").send().await.status, 200);
    let silent = TcpStream::connect(app.addr).await.unwrap();
    eventually!(app.metric("http_connections").await >= Some(2.0));
    app.stop().await;
    assert_eq!(rest_of(silent).await, "");
}

#[tokio::test]
async fn metrics_are_served_until_the_end() {
    let mut app = spawn_app(|config| {
        config.prompt_throttle = "100/day".parse().unwrap();
        config.server.metrics_addr = "127.0.0.1:0".parse().ok();
    })
    .await;
    let user = app.user("alice").await;
    let metrics = crate::support::Client::new(app.metrics_addr.unwrap());
    let (mut connection, later) = half_a_post(&app, &user, "in flight").await;
    eventually!(posts_counted(&user).await == 1);
    app.begin_stop();
    eventually!(TcpStream::connect(app.addr).await.is_err());
    assert_eq!(metrics.get("/metrics").send().await.status, 200);
    assert_eq!(metrics.get("/readyz").send().await.status, 503);
    connection.write_all(later.as_bytes()).await.unwrap();
    assert!(rest_of(connection).await.starts_with("HTTP/1.1 201"));
    app.stopped().await;
}

#[tokio::test]
async fn folder_is_used_by_one_service_at_a_time() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let second = try_spawn_app_in(app.folder.clone(), |_| ()).await;
    let error = format!("{:#}", second.err().expect("the second is refused"));
    let folder = app.folder.path().display();
    let expected = if on_postgres() {
        "DATABASE_URL: another prompt-service uses this database; stop it, or set REDIS_URL on all of them to run several".to_owned()
    } else {
        format!(
            "DATA_DIR: {folder}: another prompt-service is using this folder; stop it or set DATA_DIR to another"
        )
    };
    assert_eq!(error, expected);
    assert_eq!(user.try_prompt("the first serves on").await.status, 201);
    let app = spawn_app_in(app.stop().await, |_| ()).await;
    let user = User {
        client: app.client().with_bearer(&user.access),
        ..user
    };
    assert_eq!(user.similar("the first serves on", 5).await.len(), 1);
}

#[tokio::test]
async fn port_in_use_is_named_by_its_setting_and_the_folder_is_unlocked() {
    let app = spawn_app(|_| ()).await;
    let taken = app.addr;
    let folder = crate::support::Folder::new();
    let refused = try_spawn_app_in(folder.clone(), |config| config.server.bind_addr = taken).await;
    let error = format!("{:#}", refused.err().expect("the port is taken"));
    assert!(
        error.starts_with(&format!("BIND_ADDR: cannot listen on {taken}: ")),
        "{error}"
    );
    let refused = try_spawn_app_in(folder.clone(), |config| {
        config.server.metrics_addr = Some(taken)
    })
    .await;
    let error = format!("{:#}", refused.err().expect("the port is taken"));
    assert!(error.starts_with("METRICS_ADDR: "), "{error}");
    let other = spawn_app_in(folder, |_| ()).await;
    assert_eq!(other.get("/readyz").send().await.status, 200);
}
