use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::{block_on, pieces};
use crate::api::ws::connection::{Connection, ConnectionEvent};

/// Bytes that fit between the two ends: more than either side ever sends here.
const ROOM: usize = 1 << 20;
/// The most bytes that a client sends here.
const MOST_SENT: usize = 128 << 10;
/// The largest message that the service accepts.
const MOST_MESSAGE: usize = 64 << 10;

/// The bytes that a client sends on an open socket. The first byte cuts them.
///
/// Where it is cut makes no difference. No message is larger than the bound. Whatever comes, the
/// service itself speaks WebSocket as the standard has it, and closes.
pub fn web_socket(data: &[u8]) {
    let [cuts, sent @ ..] = data else {
        return;
    };
    if sent.len() > MOST_SENT {
        return;
    }
    let whole = listen(&[sent]);
    let in_pieces = listen(&pieces(sent, *cuts));
    assert_eq!(whole, in_pieces, "cut and whole");
}

/// The messages that the service received, and why no more came.
fn listen(pieces: &[&[u8]]) -> Vec<String> {
    let (mut client, server) = duplex(ROOM);
    let mut connection = at_once(Connection::new(server));
    let mut heard = Vec::new();
    let mut is_open = true;
    for piece in pieces {
        at_once(client.write_all(piece)).expect("there is room");
        is_open = is_open && step(&mut connection, &mut heard);
    }
    at_once(client.shutdown()).expect("a pipe in memory");
    if is_open && step(&mut connection, &mut heard) {
        panic!("the client is gone, and the service waits for it: {heard:?}");
    }
    let frame = CloseFrame {
        code: 1001.into(),
        reason: Utf8Bytes::from_static("going away"),
    };
    block_on(connection.close(Some(frame), Duration::from_secs(5)));
    hear_out(client);
    heard
}

/// The output of a future that need not wait. Not within a runtime, which makes a task that
/// does much wait for others.
fn at_once<F: Future>(future: F) -> F::Output {
    future.now_or_never().expect("there is nothing to wait for")
}

/// Handles all messages that came. Replies to texts, as the service does. Returns whether more may
/// come.
fn step(connection: &mut Connection<DuplexStream>, heard: &mut Vec<String>) -> bool {
    while let Some(step) = connection.step().now_or_never() {
        let message = match step {
            Ok(ConnectionEvent::Sent) => continue,
            Ok(ConnectionEvent::Received(message)) => message,
            Err(error) => Some(Err(error)),
        };
        match message {
            Some(Ok(message)) => {
                assert!(message.len() <= MOST_MESSAGE);
                heard.push(format!("{message:?}"));
                if message.is_text() {
                    connection.send(Message::text("heard"));
                }
                if message.is_close() {
                    return false;
                }
            }
            Some(Err(error)) => {
                heard.push(error.to_string());
                return false;
            }
            None => {
                heard.push("no more".to_owned());
                return false;
            }
        }
    }
    true
}

/// Reads as a client what the service sent.
fn hear_out(client: DuplexStream) {
    let mut client = block_on(WebSocketStream::from_raw_socket(client, Role::Client, None));
    while let Some(message) = block_on(client.next()) {
        match message {
            Ok(_)
            | Err(
                Error::ConnectionClosed
                | Error::AlreadyClosed
                | Error::Io(_)
                | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake),
            ) => {}
            Err(error) => panic!("the service sent what a client does not understand: {error}"),
        }
    }
}
