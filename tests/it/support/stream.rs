//! A reader of server-sent events.

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{HeaderMap, Response as Answer};
use serde_json::Value;
use tokio::time::timeout;

use super::DEADLINE;

/// One event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamEvent {
    /// Its name.
    pub name: String,
    /// What to give as `Last-Event-ID`.
    pub id: String,
    /// Its data.
    pub data: Value,
}

/// An open stream.
pub struct Stream {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    body: Incoming,
    unread: Vec<u8>,
    /// Comments seen.
    pub comments: usize,
}

impl Stream {
    pub(super) fn new(answer: Answer<Incoming>) -> Self {
        let (head, body) = answer.into_parts();
        Self {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            unread: Vec::new(),
            comments: 0,
        }
    }

    /// The next event, past comments; `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<StreamEvent> {
        let block = self.next_block().await?;
        let field = |name: &str| {
            let line = block.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {block:?}"))
                .to_owned()
        };
        Some(StreamEvent {
            name: field("event: "),
            id: field("id: "),
            data: serde_json::from_str(&field("data: ")).unwrap(),
        })
    }

    /// The next event as it was sent, past comments; `None` at the end of the stream.
    pub async fn next_block(&mut self) -> Option<String> {
        loop {
            let end_of_block = |bytes: &[u8]| bytes.windows(2).position(|pair| pair == b"\n\n");
            while let Some(end) = end_of_block(&self.unread) {
                let rest = self.unread.split_off(end + 2);
                let block = std::mem::replace(&mut self.unread, rest);
                let block = String::from_utf8(block).unwrap();
                if block.starts_with(':') {
                    self.comments += 1;
                    continue;
                }
                return Some(block);
            }
            let frame = timeout(DEADLINE, self.body.frame()).await;
            let Some(Ok(frame)) = frame.expect("something arrives in time") else {
                assert_eq!(self.unread, b"", "the stream ends after an event");
                return None;
            };
            self.unread.extend_from_slice(&frame.into_data().unwrap());
        }
    }

    /// All events that are left.
    pub async fn rest(&mut self) -> Vec<StreamEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }

    /// All events that are left, as they were sent.
    pub async fn rest_blocks(&mut self) -> Vec<String> {
        let mut blocks = Vec::new();
        while let Some(block) = self.next_block().await {
            blocks.push(block);
        }
        blocks
    }

    /// Reads until a comment comes.
    pub async fn wait_for_comment(&mut self) {
        let seen = self.comments;
        while self.comments == seen {
            let frame = timeout(DEADLINE, self.body.frame()).await;
            let frame = frame.expect("something arrives in time").unwrap().unwrap();
            let data = frame.into_data().unwrap();
            let text = std::str::from_utf8(&data).unwrap();
            self.comments += usize::from(text == ":\n\n");
            assert!(text.starts_with(':'), "{text:?}");
        }
    }
}

/// The text that the deltas among `events` make.
pub fn text_of(events: &[StreamEvent]) -> String {
    let deltas = events.iter().filter(|event| event.name == "delta");
    deltas
        .map(|event| event.data["text"].as_str().unwrap())
        .collect()
}

/// The names of `events`, with runs of deltas as one.
pub fn names(events: &[StreamEvent]) -> Vec<&str> {
    let mut names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
    names.dedup();
    names
}
