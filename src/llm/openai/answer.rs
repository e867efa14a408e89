//! Reads an answer from the connection, within limits of time and size.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};

use super::attempt::AnswerLimits;
use super::fault::{Fault, FaultKind};
use super::reader::{AnswerReader, Received, as_chunk};
use crate::llm::{AnswerSink, Completion, Content};

/// How much of an error's body is read, and for how long. The message is in it, and a connection
/// can be used again only after the end of the body.
const ERROR_BYTES: usize = 16 * 1024;
const ERROR_TIME: Duration = Duration::from_millis(500);
/// How long the end of a stream may take after its `[DONE]`, so that its connection can be used
/// again.
const END_TIME: Duration = Duration::from_millis(10);
/// The same while the usage is unknown. Some servers send it after `[DONE]`.
const LATE_USAGE_TIME: Duration = Duration::from_millis(100);
/// How long the usage and `[DONE]` may take after the reason, or after anything later that belongs
/// to the answer. The upstream has them ready, so this time is for the network. The answer is
/// whole, and the caller waits for it.
const AFTER_REASON_TIME: Duration = Duration::from_secs(5);

/// Hands over a streamed answer, and notes when it began.
pub struct Handover<'a> {
    sink: Option<&'a mut dyn AnswerSink>,
    is_streamed: bool,
    /// Whether the answer is one to a chat request.
    is_chat: bool,
    /// Choices that are wanted.
    pub choices: u32,
    first_at: Option<Instant>,
    has_text: bool,
}

impl<'a> Handover<'a> {
    /// Hands the answer to `sink`. A prompt's answer is streamed if there is one.
    pub fn new(content: Content<'_>, sink: Option<&'a mut dyn AnswerSink>) -> Self {
        let (is_streamed, is_chat, choices) = match content {
            Content::Prompt(_) => (sink.is_some(), false, 1),
            Content::Chat(request) => (request.is_streamed(), true, request.choices()),
        };
        Self {
            sink: sink.filter(|_| is_streamed),
            is_streamed,
            is_chat,
            choices,
            first_at: None,
            has_text: false,
        }
    }

    /// Whether the answer is streamed.
    pub fn is_streamed(&self) -> bool {
        self.is_streamed
    }

    /// Whether the answer is one to a chat request, of which everything is kept.
    pub fn is_chat(&self) -> bool {
        self.is_chat
    }

    /// When the first piece was handed over. There is no retry after it, because the caller has it.
    pub fn first_at(&self) -> Option<Instant> {
        self.first_at
    }

    /// Hands over an object of a streamed answer to a chat request.
    fn object(&mut self, json: &[u8]) {
        let Some(sink) = &mut self.sink else {
            return;
        };
        if self.first_at.is_none() {
            self.first_at = Some(Instant::now());
            // A server that does not stream sends one whole answer.
            if let Some(chunk) = as_chunk(json) {
                return sink.chunk(&one_line(&chunk));
            }
        }
        sink.chunk(&one_line(json));
    }

    /// Hands a piece of text over, unless it is empty.
    fn text(&mut self, piece: &str) {
        if let (false, Some(sink)) = (piece.is_empty(), &mut self.sink) {
            self.first_at.get_or_insert_with(Instant::now);
            self.has_text = true;
            sink.text(piece);
        }
    }
}

/// Reads an answer with `reader`, and passes each piece of text on as it comes. Calls `on_piece`
/// after each piece of the body.
///
/// # Errors
/// What went wrong; see [`FaultKind`].
pub async fn read(
    mut body: Incoming,
    limits: &AnswerLimits,
    reader: &mut AnswerReader,
    handover: &mut Handover<'_>,
    mut on_piece: impl FnMut(&AnswerReader, Received),
) -> Result<Completion, Fault> {
    if body.size_hint().lower() > reader.room as u64 {
        return Err(FaultKind::TooLong.into());
    }
    // When the next bytes are due, and the kind of failure if they do not come.
    let silence = || {
        (
            Instant::now() + limits.token_timeout,
            FaultKind::TokenTimeout,
        )
    };
    let mut until = match handover.is_streamed() {
        true => (limits.first_token_by, FaultKind::FirstTokenTimeout),
        false => silence(),
    };
    // When the end of the body is due, once the answer is complete.
    let mut end_by = None;
    let ended: Result<(), Fault> = loop {
        let due = end_by.map_or(until, |by| (by, FaultKind::TokenTimeout));
        let due = match limits.whole_by.0 <= due.0 {
            true => limits.whole_by,
            false => due,
        };
        let piece = match next(&mut body, due).await {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(()),
            Err(fault) => break Err(fault),
        };
        let fed = reader.feed(&piece, &mut |json| handover.object(json));
        handover.text(reader.new_text());
        let received = match fed {
            Ok(received) => received,
            Err(kind) => break Err(kind.into()),
        };
        on_piece(reader, received);
        if reader.gathered.is_done {
            end(&mut body, reader, handover).await;
            break Ok(());
        }
        if !reader.gathered.has_reason() {
            end_by = None;
            // The first sign of life must not shorten the wait for the first text.
            let keeps_longer = !handover.has_text && until.0 > silence().0;
            if !keeps_longer && (received.is_alive || !handover.is_streamed()) {
                until = silence();
            }
        } else if received.is_news || end_by.is_none() {
            end_by = Some(Instant::now() + AFTER_REASON_TIME);
        }
    };
    let on_object = &mut |json: &[u8]| handover.object(json);
    match (reader.finish(ended.is_err(), on_object), ended) {
        // The answer is complete, however its body ended.
        (Ok((answer, rest)), _) => {
            handover.text(&rest);
            Ok(answer)
        }
        (Err(_), Err(fault)) => Err(fault),
        (Err(kind), Ok(())) => Err(kind.into()),
    }
}

/// An object as one line. A line end in JSON can only stand between two of its parts.
fn one_line(json: &[u8]) -> Cow<'_, [u8]> {
    let is_end = |byte: &u8| matches!(byte, b'\n' | b'\r');
    if !json.iter().any(is_end) {
        return json.into();
    }
    let blank = |byte: &u8| if is_end(byte) { b' ' } else { *byte };
    json.iter().map(blank).collect::<Vec<u8>>().into()
}

/// Waits a moment for the rest after `[DONE]`: the end of the body, perhaps the usage. The answer
/// is complete without them.
async fn end(body: &mut Incoming, reader: &mut AnswerReader, handover: &mut Handover<'_>) {
    let most = match reader.gathered.answer.completion_tokens.is_some() {
        true => END_TIME,
        false => LATE_USAGE_TIME,
    };
    let rest = async {
        while let Some(Ok(frame)) = body.frame().await {
            if frame.into_data().is_ok_and(|data| {
                let on_object = &mut |json: &[u8]| handover.object(json);
                reader.feed(&data, on_object).is_err()
            }) {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(most, rest).await;
}

/// The beginning of an error's body.
pub async fn read_error(mut body: Incoming) -> Vec<u8> {
    let mut read = Vec::new();
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            let data = frame.into_data().unwrap_or_default();
            let room = ERROR_BYTES - read.len();
            read.extend_from_slice(&data[..data.len().min(room)]);
            if data.len() >= room {
                break;
            }
        }
    };
    // If the body has not ended, the connection is closed. That is the only loss.
    let _ = tokio::time::timeout(ERROR_TIME, reading).await;
    read
}

/// The next piece of a body; `None` at its end. Trailers are skipped.
async fn next(body: &mut Incoming, until: (Instant, FaultKind)) -> Result<Option<Bytes>, Fault> {
    let (deadline, kind) = until;
    loop {
        let frame = tokio::time::timeout_at(deadline.into(), body.frame()).await;
        match frame.map_err(|_| kind)? {
            None => return Ok(None),
            Some(Err(_)) => return Err(FaultKind::Truncated.into()),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}
