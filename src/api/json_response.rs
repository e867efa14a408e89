//! JSON answers that hold memory until their clients have taken them.

use axum::body::Body;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;

use crate::memory_budget::Reservation;

/// Bytes that belong together with what they hold in the account of memory in flight.
struct ReservedBytes {
    bytes: Vec<u8>,
    _memory: Reservation,
}

impl AsRef<[u8]> for ReservedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes that `memory` holds until the last of them is on its way to the client. What it holds
/// beyond them is given back.
pub fn reserved_bytes(bytes: Vec<u8>, mut memory: Reservation) -> Bytes {
    memory.resize(bytes.capacity());
    Bytes::from_owner(ReservedBytes {
        bytes,
        _memory: memory,
    })
}

/// An answer of JSON that `memory` holds.
pub fn json_response(status: StatusCode, value: &impl Serialize, memory: Reservation) -> Response {
    let json = serde_json::to_vec(value).expect("a struct of texts and numbers is JSON");
    let body = Body::from(reserved_bytes(json, memory));
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// Bytes that a text takes as a JSON string, quotes included.
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
    fn memory_is_held_until_the_last_piece_is_gone() {
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
        fn the_length_of_a_text_in_json_is_known_without_writing_it(text in any::<String>(), odd in "[\u{0}-\u{7f}]{0,99}") {
            for text in [text, odd] {
                prop_assert_eq!(json_len(&text), serde_json::to_string(&text).unwrap().len());
            }
        }
    }
}
