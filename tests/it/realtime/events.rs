//! What arrives on an open socket.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use super::{announce, assert_next, open, open_by_cookie, open_with, ticket};
use crate::support::{Socket, spawn_app};

/// The next text on the socket, unparsed.
async fn next_text(socket: &mut Socket) -> String {
    loop {
        match socket.next().await {
            Some(Message::Text(text)) => return text.as_str().to_owned(),
            Some(Message::Ping(_)) => {}
            other => panic!("no text but {other:?}"),
        }
    }
}

#[tokio::test]
async fn an_event_is_the_created_prompt_on_every_socket_of_its_user_and_on_no_other() {
    let app = spawn_app(|_| {}).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let (session, _) = app.login_session("alice").await;
    let by_ticket = format!(
        "{}?ticket={}",
        super::PATH,
        ticket(&app, &alice.access).await
    );
    let mut alices = [
        open(&app, &alice.access).await,
        open(&app, &alice.access).await,
        open_with(&app, &by_ticket, &[]).await,
        open_by_cookie(&app, &session).await,
    ];
    let mut bobs = open(&app, &bob.access).await;
    for prompt in [
        "plain",
        "quotes \" and \\ and / and \u{1} and \u{7f} and \u{2028} and",
        "naïve 東京 👩‍👩‍👧 \u{10ffff}",
        "{\"type\":\"prompt.message\"}",
    ] {
        let event = announce(&alice, prompt).await;
        for socket in &mut alices {
            assert_eq!(next_text(socket).await, event);
        }
        let data = serde_json::from_str::<Value>(&event).unwrap()["data"].clone();
        let keys: HashSet<&str> = data
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            HashSet::from(["id", "prompt", "response", "created_at", "model"])
        );
        assert_eq!(data["prompt"], prompt);
    }
    // The first event that Bob gets is his own, so none of hers went to him. The same holds for
    // her.
    let event = announce(&bob, "mine").await;
    assert_next(&mut bobs, &event).await;
    let event = announce(&alice, "hers again").await;
    for socket in &mut alices {
        assert_next(socket, &event).await;
    }
}

#[tokio::test]
async fn only_prompts_that_ask_for_it_are_announced() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut socket = open(&app, &alice.access).await;
    alice.prompt("no flag").await;
    let body = json!({ "prompt": "flag off", "websocket": false });
    let off = alice.post("/api/prompts/").json(&body).send().await;
    assert_eq!(off.status, 201, "{off:?}");
    let refused = json!({ "prompt": "", "websocket": true });
    let refused = alice.post("/api/prompts/").json(&refused).send().await;
    assert_eq!(refused.status, 400, "{refused:?}");
    let event = announce(&alice, "flag on").await;
    assert_next(&mut socket, &event).await;
}

#[tokio::test]
async fn events_arrive_in_the_order_of_the_answers_at_all_sockets_alike() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut sockets = [
        open(&app, &alice.access).await,
        open(&app, &alice.access).await,
    ];
    let mut posted = Vec::new();
    for i in 0..20 {
        posted.push(announce(&alice, &format!("number {i}")).await);
    }
    for event in &posted {
        for socket in &mut sockets {
            assert_next(socket, event).await;
        }
    }
    // Posted at once: in any order, but in the same order on every socket, and each once.
    let mut posts = JoinSet::new();
    for i in 0..20 {
        let client = alice.client.clone();
        posts.spawn(async move {
            let body = json!({ "prompt": format!("racer {i}"), "websocket": true });
            client.post("/api/prompts/").json(&body).send().await.text()
        });
    }
    let posted: HashSet<String> = posts
        .join_all()
        .await
        .iter()
        .map(|body| super::event_of(body))
        .collect();
    let mut seen = [Vec::new(), Vec::new()];
    for (socket, seen) in sockets.iter_mut().zip(&mut seen) {
        for _ in 0..20 {
            seen.push(next_text(socket).await);
        }
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].iter().cloned().collect::<HashSet<_>>(), posted);
}

#[tokio::test]
async fn frames_of_unknown_kind_are_ignored_and_pings_answered() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut socket = open(&app, &alice.access).await;
    for text in [
        "",
        "hello",
        "{}",
        "[]",
        "null",
        "{\"type\": \"echo\", \"text\": \"hello\"}",
        "{\"type\": \"auth\"}",
        "{\"type\": \"auth\", \"token\": 5}",
        "{\"type\": 1}",
        "\u{feff}{\"type\"",
    ] {
        socket.send_text(text).await;
    }
    socket.send(Message::binary(vec![0, 255, 1])).await;
    socket.send(Message::Pong(vec![1].into())).await;
    for payload in [&b""[..], b"are you there", &[0xff; 125]] {
        socket.send(Message::Ping(payload.to_vec().into())).await;
        // The pong is the first message since, so there was no reply to the frames before it.
        assert_eq!(
            socket.next().await,
            Some(Message::Pong(payload.to_vec().into()))
        );
    }
    let event = announce(&alice, "an event").await;
    assert_next(&mut socket, &event).await;
}

#[tokio::test]
async fn the_largest_event_arrives_whole() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut socket = open(&app, &alice.access).await;
    // Letters of two, three and four bytes, so that frames of any length split some letter.
    let prompt: String = "é東👩x".chars().cycle().take(32_000).collect();
    let event = announce(&alice, &prompt).await;
    assert!(event.len() > 128 << 10);
    assert_eq!(next_text(&mut socket).await, event);
    let event = announce(&alice, "and a small one after it").await;
    assert_eq!(next_text(&mut socket).await, event);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_five_hundred_sockets_gets_each_of_several_events() {
    raise_open_files();
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut opening = JoinSet::new();
    for _ in 0..500 {
        let (addr, path) = (app.addr, format!("{}?token={}", super::PATH, alice.access));
        opening.spawn(async move {
            let mut socket = Socket::connect(addr, &path, &[]).await.unwrap();
            socket.next_json().await;
            socket
        });
    }
    let mut sockets = opening.join_all().await;
    assert_eq!(app.metric("websockets_open").await, Some(500.0));
    let mut events = Vec::new();
    for i in 0..5 {
        events.push(announce(&alice, &format!("event {i}")).await);
    }
    for socket in &mut sockets {
        for event in &events {
            assert_eq!(next_text(socket).await, *event);
        }
    }
    assert_eq!(app.metric("websocket_events_total").await, Some(2500.0));
    let mut closing = JoinSet::new();
    for socket in sockets {
        closing.spawn(socket.close());
    }
    closing.join_all().await;
    eventually!(app.metric("websockets_open").await == Some(0.0));
}

/// Both ends of all the sockets are in this process; systems commonly start with room for 1,024
/// files and allow more.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}
