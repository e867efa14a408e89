use futures_util::FutureExt;

use super::first_line;
use crate::api::extract::Query;
use crate::api::prompts::{decode_cursor, encode_cursor};
use crate::domain::{PromptId, UserId};
use crate::memory_budget::{MemoryBudget, Owner};
use crate::services::prompts::stream::{
    ResponseStream, StreamEnd, StreamEvent, StreamOffset, StreamReader,
};

/// Where a client resumes reading. The first line is used as the cursor of a list, as a query, and
/// as the `Last-Event-ID` of a stream. The rest is the text of the stream.
///
/// Only what this service writes is accepted as a cursor or an offset. A stream resumes from each
/// of its offsets with the text after it, and starts again from an offset into another text.
pub fn places(data: &[u8]) {
    let (line, text) = first_line(data);
    if let Ok(line) = std::str::from_utf8(line) {
        cursors(line);
    }
    let offset = std::str::from_utf8(line).ok().and_then(|line| {
        let offset = line.parse::<StreamOffset>().ok()?;
        assert_eq!(offset.to_string(), line);
        Some(offset)
    });
    stream(&String::from_utf8_lossy(text), offset);
}

fn cursors(line: &str) {
    if let Some(id) = decode_cursor(line) {
        assert_eq!(encode_cursor(id), line);
    }
    let id = line.bytes().fold(0_i64, |id, byte| {
        id.wrapping_mul(257).wrapping_add(i64::from(byte))
    });
    let id = PromptId(id);
    assert_eq!(decode_cursor(&encode_cursor(id)), Some(id));
    if let Ok(limit) = Query::parse(line).integer("limit", 20, 1..=100) {
        assert!((1..=100).contains(&limit));
    }
}

fn stream(text: &str, foreign: Option<StreamOffset>) {
    let memory = MemoryBudget::new(16 << 20).hold(Owner::default(), 0);
    let stream = ResponseStream::new(UserId(1), PromptId(1), memory);
    let mut offsets = Vec::new();
    // Read while the text arrives, then once more as a whole.
    let mut reader_along = stream.read(None);
    let middle = text.floor_char_boundary(text.len() / 2);
    for half in [&text[..middle], &text[middle..]] {
        stream.push(half);
        while let Some(Some(event)) = reader_along.next().now_or_never() {
            assert!(matches!(
                event,
                StreamEvent::Started(_) | StreamEvent::Delta(_)
            ));
            offsets.push(reader_along.offset());
        }
    }
    assert_eq!(reader_along.offset().bytes(), text.len());
    stream.end(StreamEnd::Deleted(PromptId(1)));
    drop(stream);
    assert_eq!(rest(reader_along), (false, String::new()));
    for offset in offsets {
        let written = offset.to_string().parse::<StreamOffset>();
        assert_eq!(written, Ok(offset));
        assert_eq!(
            resume(text, offset),
            (false, text[offset.bytes()..].to_owned())
        );
    }
    if let Some(offset) = foreign {
        let (is_restarted, rest) = resume(text, offset);
        let expected = if is_restarted {
            text
        } else {
            text.get(offset.bytes()..)
                .expect("an accepted offset lies in the text")
        };
        assert_eq!(rest, expected);
    }
}

/// What a client reads of a text from `offset` on, and whether the text starts again.
fn resume(text: &str, offset: StreamOffset) -> (bool, String) {
    let memory = MemoryBudget::new(16 << 20).hold(Owner::default(), 0);
    let stream = ResponseStream::new(UserId(1), PromptId(1), memory);
    stream.push(text);
    let reader = stream.read(Some(offset));
    rest(reader)
}

/// All that a reader returns without waiting: whether the text starts again, and the text.
fn rest(mut reader: StreamReader) -> (bool, String) {
    let (mut is_restarted, mut text) = (false, String::new());
    while let Some(Some(event)) = reader.next().now_or_never() {
        match event {
            StreamEvent::Started(_) => is_restarted = true,
            StreamEvent::Delta(piece) => text.push_str(&piece),
            StreamEvent::Ended(_) => break,
        }
    }
    (is_restarted, text)
}
