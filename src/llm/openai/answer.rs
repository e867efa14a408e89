//! Reading an answer off the connection, whole or streamed, within limits of time and size.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};

use super::attempt::Limits;
use super::fault::{Fault, Kind};
use super::sse::Decoder;
use super::wire::{self, Answer, Collector};

/// JSON around the text of a whole answer.
const JSON_AROUND: usize = 64 * 1024;
/// A byte of text may be written with six, as `\u0001`.
const JSON_PER_TEXT: usize = 6;
/// Bytes that a stream may have for each byte of text: servers send a few hundred with every token. What is sent beyond that brings
/// nothing; the total deadline bounds it too.
const STREAM_PER_TEXT: usize = 512;
/// An error's body is read this far, and this long, so that its connection can be used again.
const DRAIN_BYTES: usize = 16 * 1024;
const DRAIN_TIME: Duration = Duration::from_millis(100);
/// How long the end of a stream may take after its `[DONE]`, for the same reason.
const END_TIME: Duration = Duration::from_millis(10);
/// How long `[DONE]`, and the usage before it, may take after the `finish_reason`: they are ready with it, so this is for the network.
/// The answer is whole, and its reader waits.
const GOODBYE_TIME: Duration = Duration::from_secs(5);

/// Where the text of a streamed answer goes, and what is known of it.
pub struct Deltas<'a> {
    on_delta: Option<&'a mut (dyn FnMut(&str) + Send)>,
    first_at: Option<Instant>,
}

impl<'a> Deltas<'a> {
    /// Hands text to `on_delta`; `None` for an answer that is wanted whole.
    pub fn new(on_delta: Option<&'a mut (dyn FnMut(&str) + Send)>) -> Self {
        Self {
            on_delta,
            first_at: None,
        }
    }

    /// Whether the answer is wanted in pieces.
    pub fn are_wanted(&self) -> bool {
        self.on_delta.is_some()
    }

    /// When the first piece was handed over. Once there was one, nothing may be tried again: the caller has it.
    pub fn first_at(&self) -> Option<Instant> {
        self.first_at
    }

    /// Hands a piece of text over, unless it is empty.
    pub fn hand_over(&mut self, delta: &str) {
        if let (false, Some(on_delta)) = (delta.is_empty(), &mut self.on_delta) {
            self.first_at.get_or_insert_with(Instant::now);
            on_delta(delta);
        }
    }
}

/// Reads a whole answer.
///
/// # Errors
/// What went wrong; see [`Kind`].
pub async fn read_whole(mut body: Incoming, limits: &Limits) -> Result<Answer, Fault> {
    let most = limits.text_bytes * JSON_PER_TEXT + JSON_AROUND;
    if body.size_hint().lower() > most as u64 {
        return Err(Kind::TooLong.into());
    }
    let mut json = Vec::new();
    while let Some(piece) = next(&mut body, silence(limits)).await? {
        if json.len() + piece.len() > most {
            return Err(Kind::TooLong.into());
        }
        json.extend_from_slice(&piece);
    }
    let answer = wire::whole(&json)?;
    if answer.text.len() > limits.text_bytes {
        return Err(Kind::TooLong.into());
    }
    Ok(answer)
}

/// Reads a streamed answer, handing each piece of text over as it comes. `on_token` is told of the first sign of a model at work.
///
/// # Errors
/// What went wrong; see [`Kind`].
pub async fn read_stream(
    mut body: Incoming,
    limits: &Limits,
    deltas: &mut Deltas<'_>,
    mut on_token: impl FnMut(),
) -> Result<Answer, Fault> {
    let mut decoder = Decoder::new(limits.text_bytes * JSON_PER_TEXT + JSON_AROUND);
    let mut collector = Collector::default();
    let mut room = limits.text_bytes.saturating_mul(STREAM_PER_TEXT) + JSON_AROUND;
    // Comments keep a connection open, not a model at work: events alone put the deadline off.
    let mut until = (limits.first_token_by, Kind::FirstTokenTimeout);
    let (mut has_token, mut bye_by) = (false, None);
    while !collector.is_done() {
        let piece = match next(&mut body, earlier(until, limits)).await {
            Ok(Some(piece)) => piece,
            Ok(None) => break,
            // Everything said, and only the goodbye missing, late or cut: that is whole.
            Err(_) if collector.has_reason() => break,
            Err(fault) => return Err(fault),
        };
        room = room.checked_sub(piece.len()).ok_or(Kind::TooLong)?;
        let mut has_event = false;
        decoder.feed(&piece, |data| {
            let progress = collector.take(data)?;
            has_event = true;
            if progress.is_token && !has_token {
                has_token = true;
                on_token();
            }
            deltas.hand_over(progress.delta);
            if collector.text_bytes() > limits.text_bytes {
                return Err(Fault::from(Kind::TooLong));
            }
            Ok(())
        })?;
        if collector.has_reason() {
            let bye_by = *bye_by.get_or_insert_with(|| Instant::now() + GOODBYE_TIME);
            until = (bye_by, Kind::TokenTimeout);
        } else if has_token && has_event {
            until = silence(limits);
        }
    }
    if collector.is_done() {
        let end = tokio::time::timeout(END_TIME, body.frame());
        // Whether it came or not, the answer is whole; this is for the connection alone.
        let _ = end.await;
    } else if let Some(rest) = decoder.finish()
        && rest.trim_ascii() == b"[DONE]"
    {
        collector.take(&rest)?;
    }
    Ok(collector.finish()?)
}

/// Reads the body of an error and forgets it.
pub async fn drain(mut body: Incoming) {
    let reading = async {
        let mut room = DRAIN_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            match room.checked_sub(length) {
                Some(rest) => room = rest,
                None => break,
            }
        }
    };
    // A connection that is not at its end is closed, which is all there is to lose.
    let _ = tokio::time::timeout(DRAIN_TIME, reading).await;
}

/// When an answer that has begun counts as silent.
fn silence(limits: &Limits) -> (Instant, Kind) {
    let until = (Instant::now() + limits.token_timeout, Kind::TokenTimeout);
    earlier(until, limits)
}

/// The earlier of a deadline and the one for everything.
fn earlier(until: (Instant, Kind), limits: &Limits) -> (Instant, Kind) {
    if limits.whole_by.0 <= until.0 {
        limits.whole_by
    } else {
        until
    }
}

/// The next piece of a body; `None` at its end. Trailers are skipped.
async fn next(body: &mut Incoming, until: (Instant, Kind)) -> Result<Option<Bytes>, Fault> {
    let (deadline, kind) = until;
    loop {
        let frame = tokio::time::timeout_at(deadline.into(), body.frame()).await;
        match frame.map_err(|_| kind)? {
            None => return Ok(None),
            Some(Err(_)) => return Err(Kind::Truncated.into()),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}
