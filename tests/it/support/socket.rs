//! A WebSocket client.

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use hyper::body::Bytes;
use hyper::{HeaderMap, http};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, Message};

use super::{DEADLINE, Response};

/// An open socket.
pub struct Socket {
    stream: WebSocketStream<TcpStream>,
    /// The headers of the response that opened it.
    pub headers: HeaderMap,
}

impl Socket {
    /// Opens a socket. Returns the response as an error if the handshake is refused.
    pub async fn connect(
        addr: SocketAddr,
        path_and_query: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, Response> {
        let stream = TcpStream::connect(addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut request = format!("ws://{addr}{path_and_query}")
            .into_client_request()
            .unwrap();
        for (name, value) in headers {
            let name: http::HeaderName = name.parse().unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        let handshake = tokio_tungstenite::client_async(request, stream);
        match timeout(DEADLINE, handshake).await.unwrap() {
            Ok((stream, answer)) => Ok(Self {
                stream,
                headers: answer.headers().clone(),
            }),
            Err(tungstenite::Error::Http(answer)) => {
                let (head, body) = answer.into_parts();
                Err(Response {
                    status: head.status.as_u16(),
                    headers: head.headers,
                    body: Bytes::from(body.unwrap_or_default()),
                })
            }
            Err(error) => panic!("the handshake broke: {error}"),
        }
    }

    /// The next message of any kind; `None` once the connection has ended.
    pub async fn next(&mut self) -> Option<Message> {
        let next = timeout(DEADLINE, self.stream.next()).await;
        next.expect("something arrives in time")?.ok()
    }

    /// The next text message as JSON, past pings.
    pub async fn next_json(&mut self) -> Value {
        loop {
            match self.next().await {
                Some(Message::Text(text)) => return serde_json::from_str(&text).unwrap(),
                Some(Message::Ping(_) | Message::Pong(_)) => {}
                other => panic!("no text but {other:?}"),
            }
        }
    }

    /// Reads until the server closes, and returns its close code; 1006 if the connection ended
    /// without one.
    pub async fn close_code(&mut self) -> u16 {
        loop {
            match self.next().await {
                None => return 1006,
                Some(Message::Close(frame)) => {
                    return frame.map_or(1005, |frame| frame.code.into());
                }
                Some(_) => {}
            }
        }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: Message) {
        timeout(DEADLINE, self.stream.send(message))
            .await
            .unwrap()
            .unwrap();
    }

    /// Sends a text.
    pub async fn send_text(&mut self, text: &str) {
        self.send(Message::text(text)).await;
    }

    /// Closes from this side, and waits until the server has closed too.
    pub async fn close(mut self) {
        let _ = self.stream.close(None).await;
        while self.next().await.is_some() {}
    }

    /// The connection beneath, for tests that break the protocol.
    pub fn stream(&mut self) -> &mut WebSocketStream<TcpStream> {
        &mut self.stream
    }
}
