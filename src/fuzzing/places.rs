use futures_util::FutureExt;

use super::first_line;
use crate::api::extract::Query;
use crate::api::prompts::{decode_cursor, encode_cursor};
use crate::domain::{PromptId, UserId};
use crate::memory_budget::{MemoryBudget, Owner};
use crate::services::prompts::live::{End, Event, Live, Place, Reader};

/// Positions at which a client goes on reading. The first line serves as the cursor of a list, as a
/// query, and
/// as the `Last-Event-ID` of a stream. The rest is the text that the stream has.
///
/// Only what this service writes is a cursor or a place. A stream goes on from each of its places
/// with what follows there, and from a place in another text it begins anew.
pub fn places(data: &[u8]) {
    let (line, text) = first_line(data);
    if let Ok(line) = std::str::from_utf8(line) {
        cursors(line);
    }
    let place = std::str::from_utf8(line).ok().and_then(|line| {
        let place = line.parse::<Place>().ok()?;
        assert_eq!(place.to_string(), line);
        Some(place)
    });
    stream(&String::from_utf8_lossy(text), place);
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

fn stream(text: &str, foreign: Option<Place>) {
    let memory = MemoryBudget::new(16 << 20).hold(Owner::default(), 0);
    let live = Live::new(UserId(1), PromptId(1), memory);
    let mut places = Vec::new();
    // It is read while it is written, then once more as a whole.
    let mut along = live.read(None);
    let middle = text.floor_char_boundary(text.len() / 2);
    for half in [&text[..middle], &text[middle..]] {
        live.push(half);
        while let Some(Some(event)) = along.next().now_or_never() {
            assert!(matches!(event, Event::Started(_) | Event::Delta(_)));
            places.push(along.place());
        }
    }
    assert_eq!(along.place().bytes(), text.len());
    live.end(End::Deleted);
    drop(live);
    assert_eq!(rest(along), (false, String::new()));
    for place in places {
        let written = place.to_string().parse::<Place>();
        assert_eq!(written, Ok(place));
        assert_eq!(
            resume(text, place),
            (false, text[place.bytes()..].to_owned())
        );
    }
    if let Some(place) = foreign {
        let (is_anew, rest) = resume(text, place);
        let expected = if is_anew {
            text
        } else {
            text.get(place.bytes()..)
                .expect("a place that was taken is one")
        };
        assert_eq!(rest, expected);
    }
}

/// What a client reads of a finished text from `place` on, and whether it must begin again.
fn resume(text: &str, place: Place) -> (bool, String) {
    let memory = MemoryBudget::new(16 << 20).hold(Owner::default(), 0);
    let live = Live::new(UserId(1), PromptId(1), memory);
    live.push(text);
    let reader = live.read(Some(place));
    rest(reader)
}

/// All that a reader reads without waiting: whether it begins anew, and its text.
fn rest(mut reader: Reader) -> (bool, String) {
    let (mut is_anew, mut text) = (false, String::new());
    while let Some(Some(event)) = reader.next().now_or_never() {
        match event {
            Event::Started(_) => is_anew = true,
            Event::Delta(piece) => text.push_str(&piece),
            Event::Completed(_) | Event::Failed(_) | Event::Deleted(_) => break,
        }
    }
    (is_anew, text)
}
