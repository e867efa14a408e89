//! `/ws/prompts/`: who may open a socket, what arrives on it, and when and why it closes.

mod abuse;
mod events;
mod handshake;
mod lifetime;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{App, DEADLINE, Socket, User};

/// Where sockets are opened.
const PATH: &str = "/ws/prompts/";

/// Opens a socket by an `Authorization` header and takes its first frame.
async fn open(app: &App, access: &str) -> Socket {
    let bearer = format!("Bearer {access}");
    open_with(app, PATH, &[("authorization", &bearer)]).await
}

/// Opens a socket and takes its first frame.
async fn open_with(app: &App, path: &str, headers: &[(&str, &str)]) -> Socket {
    let mut socket = app.socket(path, headers).await.unwrap_or_else(|refusal| {
        panic!("refused: {refusal:?}");
    });
    let hello = socket.next_json().await;
    assert_eq!(hello["message"], "WebSocket connected", "{hello}");
    assert!(hello["user_id"].is_i64(), "{hello}");
    socket
}

/// Opens a socket by a session cookie, as a page of the service's own origin does.
async fn open_by_cookie(app: &App, secret: &str) -> Socket {
    let (cookie, origin) = (format!("session={secret}"), format!("http://{}", app.addr));
    open_with(app, PATH, &[("cookie", &cookie), ("origin", &origin)]).await
}

/// The close code with which the service closes the socket, which it must do in time, whatever it
/// sends before.
async fn close_code(socket: &mut Socket) -> u16 {
    timeout(DEADLINE, socket.close_code())
        .await
        .expect("the socket closes in time")
}

/// A ticket bought with this access token.
async fn ticket(app: &App, access: &str) -> String {
    let answer = app.post("/api/auth/ws-ticket/").bearer(access).send().await;
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()["ticket"].as_str().unwrap().to_owned()
}

/// Posts a prompt of which the sockets are told: the event they must get, as its text.
async fn announce(user: &User, prompt: &str) -> String {
    let body = json!({ "prompt": prompt, "websocket": true });
    let answer = user.post("/api/prompts/").json(&body).send().await;
    assert_eq!(answer.status, 201, "{answer:?}");
    event_of(&answer.text())
}

/// The event that tells of a 201 with this body.
fn event_of(body: &str) -> String {
    format!(r#"{{"type":"prompt.message","event":"prompt_completed","data":{body}}}"#)
}

/// Asserts that the next event on the socket is this one; so nothing that was sent before it was
/// for this socket.
async fn assert_next(socket: &mut Socket, event: &str) {
    let event: Value = serde_json::from_str(event).unwrap();
    assert_eq!(socket.next_json().await, event);
}

/// Asserts that the socket is open and receives, by an event of its own.
async fn assert_open(socket: &mut Socket, user: &User) {
    let event = announce(user, "still there").await;
    assert_next(socket, &event).await;
}
