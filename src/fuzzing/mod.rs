//! What strangers send, as functions of bytes for the fuzzer: one for each kind. A function panics
//! if the code does not keep a promise about these bytes.
//!
//! `fuzz/` runs the functions under libFuzzer. The tests of this module run them on a stable
//! toolchain over the committed corpora. No build of the service has this module.

mod chat_answers;
mod chat_requests;
mod env_files;
mod json_lines;
mod places;
mod request_bodies;
mod request_heads;
#[cfg(test)]
mod tests;
mod tokenizer;
mod tokens;
mod upstream_answers;
mod upstream_errors;
mod web_socket;

use std::sync::LazyLock;

pub use chat_answers::chat_answers;
pub use chat_requests::chat_requests;
pub use env_files::env_files;
pub use json_lines::json_lines;
pub use places::places;
pub use request_bodies::request_bodies;
pub use request_heads::request_heads;
pub use tokenizer::tokenizer;
pub use tokens::tokens;
pub use upstream_answers::upstream_answers;
pub use upstream_errors::upstream_errors;
pub use web_socket::web_socket;

/// Cuts bytes into pieces, as a network does. `choice` decides where: 0 does not cut at all, and
/// others cut into pieces of various lengths, among them single bytes.
fn pieces(mut data: &[u8], choice: u8) -> Vec<&[u8]> {
    let most = 1_u64 << (choice % 8);
    let mut state = u64::from(choice);
    let mut pieces = Vec::new();
    while !data.is_empty() && choice > 0 {
        // Knuth's generator of random numbers, MMIX. Its upper bits are the good ones.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let length = usize::try_from(1 + (state >> 33) % most).expect("at most 128");
        let (piece, rest) = data.split_at(length.min(data.len()));
        pieces.push(piece);
        data = rest;
    }
    pieces.extend((!data.is_empty()).then_some(data));
    pieces
}

/// The first line, and what comes after its end.
fn first_line(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (data, b""),
    }
}

/// Runs a future that waits for nothing outside of this process.
fn block_on<F: Future>(future: F) -> F::Output {
    static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime of one thread needs nothing that a system may not have")
    });
    RUNTIME.block_on(future)
}
