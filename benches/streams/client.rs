//! A client of the service or of the upstream itself. It does as little as possible, so that it
//! takes little of the measured time.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::upstream::now;

/// What a client saw of one stream.
pub struct Seen {
    /// From the request to its arrival at the upstream.
    pub asking: Duration,
    /// How long each piece was on its way.
    pub pieces: Vec<Duration>,
    /// Between two pieces.
    pub longest_silence: Duration,
    /// The length of the text.
    pub bytes: usize,
}

/// What a client saw of one whole answer.
pub struct Whole {
    /// Time that was not the upstream's.
    pub added: Duration,
    /// The service's own time as it says.
    pub told: Option<Duration>,
}

/// What ends a stream of the service's, and one of the upstream's.
const END_HERE: &[u8] = b"event: completed";
const END_UPSTREAM: &[u8] = b"data: [DONE]";

/// A kept connection.
pub struct Connection {
    stream: TcpStream,
    /// Without, this is the upstream's protocol.
    access: Option<String>,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects.
    pub async fn open(target: SocketAddr, access: Option<String>) -> Self {
        let stream = TcpStream::connect(target).await.expect("it listens");
        stream.set_nodelay(true).expect("an option of TCP");
        Self {
            stream,
            access,
            buffer: Vec::new(),
        }
    }

    /// Sends a request with a body. Returns the moment at which it was sent.
    pub async fn send(&mut self, path: &str, body: &Value) -> u64 {
        let body = body.to_string();
        let bearer = self.access.as_ref();
        let bearer = bearer.map_or(String::new(), |token| {
            format!("authorization: Bearer {token}\r\n")
        });
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\n{bearer}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let sent = now();
        let written = self.stream.write_all(request.as_bytes()).await;
        written.expect("the other side takes a request");
        sent
    }

    /// The head and the body of an answer that has a length.
    pub async fn receive(&mut self) -> (String, Value) {
        let answer = read_head(&mut self.stream, &mut self.buffer).await;
        let (head, body) = answer.expect("an answer");
        let status = head.split(' ').nth(1).unwrap_or_default();
        assert!(matches!(status, "200" | "201"), "{head}");
        (head, serde_json::from_slice(&body).expect("JSON"))
    }

    async fn ask(&mut self, prompt: &str, is_streamed: bool) -> u64 {
        let messages = json!([{ "role": "user", "content": prompt }]);
        match self.access {
            None => {
                let body = json!({ "messages": messages, "stream": is_streamed });
                self.send("/v1/chat/completions", &body).await
            }
            Some(_) => {
                let body = json!({ "prompt": prompt, "stream": is_streamed });
                self.send("/api/prompts", &body).await
            }
        }
    }

    /// Asks for a whole answer.
    pub async fn whole(&mut self, prompt: &str) -> Whole {
        let sent = self.ask(prompt, false).await;
        let (head, body) = self.receive().await;
        let got = now();
        let text = match self.access {
            None => &body["choices"][0]["message"]["content"],
            Some(_) => &body["response"],
        };
        let (asked, answered) = stamps(text.as_str().expect("a text"));
        let told = head.split_once("service;dur=").map(|(_, rest)| {
            let digits = rest.split("\r\n").next().unwrap_or_default();
            Duration::from_secs_f64(digits.parse::<f64>().expect("a number") / 1000.0)
        });
        Whole {
            added: Duration::from_nanos((asked - sent) + (got - answered)),
            told,
        }
    }

    /// Asks for a stream and reads it to its end; the connection cannot be used again. Calls
    /// `begun` when the first piece has come.
    pub async fn stream(&mut self, prompt: &str, begun: impl FnOnce()) -> Seen {
        let sent = self.ask(prompt, true).await;
        let mut begun = Some(begun);
        let mut seen = Seen {
            asking: Duration::ZERO,
            pieces: Vec::new(),
            longest_silence: Duration::ZERO,
            bytes: 0,
        };
        let mut last = None;
        loop {
            while let Some(length) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=length).collect();
                if line.starts_with(END_HERE) || line.starts_with(END_UPSTREAM) {
                    return seen;
                }
                let Some(text) = piece(&line) else { continue };
                let got = now();
                seen.bytes += text.len();
                for stamp in text.split_whitespace() {
                    let (asked, answered) = stamps(stamp);
                    if let Some(begun) = begun.take() {
                        begun();
                        seen.asking = Duration::from_nanos(asked - sent);
                    }
                    seen.pieces.push(Duration::from_nanos(got - answered));
                }
                let silence = Duration::from_nanos(got - last.replace(got).unwrap_or(got));
                seen.longest_silence = seen.longest_silence.max(silence);
            }
            if read_more(&mut self.stream, &mut self.buffer).await == 0 {
                return seen;
            }
        }
    }
}

/// The text of a line of an event, in either protocol. Each piece is within one chunk, so lines are
/// whole.
fn piece(line: &[u8]) -> Option<String> {
    let data: Value = serde_json::from_slice(line.strip_prefix(b"data: ")?).ok()?;
    let text = data["text"].as_str();
    let text = text.or_else(|| data["choices"][0]["delta"]["content"].as_str());
    text.map(str::to_owned)
}

/// When the upstream was asked, and when it sent.
fn stamps(text: &str) -> (u64, u64) {
    let (asked, sent) = text.trim().split_once('-').expect("two stamps");
    let number = |text: &str| text.parse().expect("nanoseconds");
    (number(asked), number(sent))
}

async fn read_more(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> usize {
    stream.read_buf(buffer).await.unwrap_or(0)
}

/// The head and the body of a message that has a length; `None` at the end of the connection.
pub async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if read_more(stream, buffer).await == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
    let length = head.split_once("content-length:").map_or(0, |(_, rest)| {
        let digits = rest.split("\r\n").next().unwrap_or_default();
        digits.trim().parse().expect("a length")
    });
    while buffer.len() < end + length {
        if read_more(stream, buffer).await == 0 {
            return None;
        }
    }
    let body = buffer[end..end + length].to_vec();
    buffer.drain(..end + length);
    Some((head, body))
}
