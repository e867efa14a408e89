//! JSON responses that keep their reservation of memory until they are sent.

use axum::body::Body;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;

use crate::memory_budget::Reservation;

/// Bytes and their reservation in the memory budget.
struct ReservedBytes {
    bytes: Vec<u8>,
    _memory: Reservation,
}

impl AsRef<[u8]> for ReservedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Makes bytes that keep `memory` reserved until the last of them is handed to the connection. What
/// is reserved beyond their size is released.
pub fn reserved_bytes(bytes: Vec<u8>, mut memory: Reservation) -> Bytes {
    memory.resize(bytes.capacity());
    Bytes::from_owner(ReservedBytes {
        bytes,
        _memory: memory,
    })
}

/// A JSON response that keeps `memory` reserved.
pub fn json_response(status: StatusCode, value: &impl Serialize, memory: Reservation) -> Response {
    let json = serde_json::to_vec(value).expect("a struct of texts and numbers is JSON");
    written_response(status, json, memory)
}

/// A response of written JSON that keeps `memory` reserved.
pub fn written_response(status: StatusCode, json: Vec<u8>, memory: Reservation) -> Response {
    let body = Body::from(reserved_bytes(json, memory));
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// The length of a text as a JSON string in bytes, quotes included.
pub fn json_len(text: &str) -> usize {
    let escaped = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(escaped).sum::<usize>() + 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory_budget::{MemoryBudget, Owner};

    #[test]
    fn memory_is_reserved_until_the_last_piece_is_dropped() {
        let budget = MemoryBudget::new(8000);
        let memory = budget.reserve(Owner::default(), 400).unwrap();
        let bytes = reserved_bytes(vec![b'x'; 100], memory);
        assert_eq!(budget.held(), 100);
        let last_piece = bytes.slice(99..);
        drop(bytes);
        assert_eq!(budget.held(), 100);
        drop(last_piece);
        assert_eq!(budget.held(), 0);
    }

    proptest! {
        #[test]
        fn json_len_is_the_length_of_the_written_json(text in any::<String>(), odd in "[\u{0}-\u{7f}]{0,99}") {
            for text in [text, odd] {
                prop_assert_eq!(json_len(&text), serde_json::to_string(&text).unwrap().len());
            }
        }
    }
}
