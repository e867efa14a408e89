//! A client of chat completions. It does as little as possible, so that it takes little of the
//! measured time.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::http::{Body, Connection};
use super::upstream::now;

/// What is measured: an address with a key.
#[derive(Clone)]
pub struct Target {
    /// What the table calls it.
    pub name: String,
    /// Where it listens.
    pub addr: SocketAddr,
    /// The bearer token.
    pub key: String,
}

/// What a client saw of one call.
pub struct Seen {
    /// From the request to the whole answer, or to the first piece.
    pub total: Duration,
    /// The part of it that was not the upstream's.
    pub added: Duration,
    /// Pieces of a streamed answer.
    pub pieces: usize,
    /// Between two of them.
    pub longest_silence: Duration,
    /// The longest time that a piece was on its way.
    pub latest: Duration,
}

/// A kept connection to a target.
pub struct Client {
    connection: Connection,
    target: Target,
}

impl Client {
    /// Connects.
    pub async fn open(target: &Target) -> Self {
        let stream = TcpStream::connect(target.addr).await.expect("it listens");
        Self {
            connection: Connection::new(stream),
            target: target.clone(),
        }
    }

    /// Sends a request; returns the moment at which it was sent, and the body of the answer.
    async fn ask(&mut self, model: &str, prompt: &str, is_streamed: bool) -> (u64, Body) {
        let messages = json!([{ "role": "user", "content": prompt }]);
        let body = json!({ "model": model, "messages": messages, "stream": is_streamed });
        let body = body.to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.target.addr,
            self.target.key,
            body.len()
        );
        let sent = now();
        let written = self.connection.stream.write_all(request.as_bytes()).await;
        written.expect("the other side takes a request");
        let head = self.connection.read_head().await.expect("an answer");
        if head.split(' ').nth(1) != Some("200") {
            let mut body = Body::of(&head);
            let said = self.connection.read_part(&mut body).await;
            let said = String::from_utf8_lossy(&said.unwrap_or_default()).into_owned();
            panic!("{}: {head}{said}", self.target.name);
        }
        (sent, Body::of(&head))
    }

    /// Asks for a whole answer.
    pub async fn whole(&mut self, model: &str, prompt: &str) -> Seen {
        let (sent, mut reading) = self.ask(model, prompt, false).await;
        let mut body = Vec::new();
        while let Some(part) = self.connection.read_part(&mut reading).await {
            body.extend_from_slice(&part);
        }
        let got = now();
        let answer: Value = serde_json::from_slice(&body).expect("JSON");
        let text = answer["choices"][0]["message"]["content"].as_str();
        let (asked, answered) = stamps(text.expect("a text"));
        let added = Duration::from_nanos((asked - sent) + (got - answered));
        Seen {
            total: Duration::from_nanos(got - sent),
            added,
            pieces: 1,
            longest_silence: Duration::ZERO,
            latest: added,
        }
    }

    /// Asks for a stream and reads it to its end. The times are those of the first piece.
    pub async fn stream(&mut self, model: &str, prompt: &str) -> Seen {
        let (sent, mut body) = self.ask(model, prompt, true).await;
        let (mut lines, mut last, mut first) = (Vec::new(), None, None);
        let (mut pieces, mut is_done) = (0, false);
        let (mut longest_silence, mut latest) = (Duration::ZERO, Duration::ZERO);
        while let Some(part) = self.connection.read_part(&mut body).await {
            lines.extend_from_slice(&part);
            let got = now();
            while let Some(length) = lines.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = lines.drain(..=length).collect();
                is_done |= line.starts_with(b"data: [DONE]");
                let Some(text) = piece(&line) else { continue };
                for stamp in text.split_whitespace() {
                    let (asked, answered) = stamps(stamp);
                    pieces += 1;
                    latest = latest.max(Duration::from_nanos(got - answered));
                    first.get_or_insert_with(|| {
                        let added = (asked - sent) + (got - answered);
                        (
                            Duration::from_nanos(got - sent),
                            Duration::from_nanos(added),
                        )
                    });
                }
                let silence = Duration::from_nanos(got - last.replace(got).unwrap_or(got));
                longest_silence = longest_silence.max(silence);
            }
        }
        assert!(is_done, "{}: a stream without its end", self.target.name);
        let (total, added) = first.expect("a piece");
        Seen {
            total,
            added,
            pieces,
            longest_silence,
            latest,
        }
    }
}

/// The text of a line of an event.
fn piece(line: &[u8]) -> Option<String> {
    let data: Value = serde_json::from_slice(line.strip_prefix(b"data: ")?).ok()?;
    let text = data["choices"][0]["delta"]["content"].as_str();
    text.map(str::to_owned)
}

/// When the upstream was asked, and when it sent.
fn stamps(text: &str) -> (u64, u64) {
    let (asked, sent) = text.trim().split_once('-').expect("two stamps");
    let number = |text: &str| text.parse().expect("nanoseconds");
    (number(asked), number(sent))
}
