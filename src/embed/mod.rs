//! Sentence embeddings: text to vector, in the process.
//!
//! A [`tokenizer`] cuts the text, a [`Model`] runs a BERT forward pass of our own over int8 weights, and the [`pipeline`] feeds it:
//! bounded, fair, in batches, never on the async threads. A small encoder spends its time in a few dozen matrix products that fit
//! the caches, where a general inference runtime loses more to its generality than the products cost; `benches/engine/`
//! measures the difference.

mod background;
mod engine;
mod folder;
mod kernel;
mod model;
#[cfg(test)]
mod packed_tests;
pub mod pipeline;
mod safetensors;
mod slab;
#[cfg(test)]
mod tests;
pub mod tokenizer;
mod weights;

use std::io;
use std::path::PathBuf;

pub use background::BackgroundEmbedder;
pub use engine::Engine;
pub use kernel::Kernel;
pub use model::{Model, Scratch};
pub use pipeline::{Class, Embedder, Encode, Permit, Settings};

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model is missing or unreadable.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is damaged, or not what its name says.
    #[error("{file} is not usable: {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong, as a sentence without its subject.
        reason: String,
    },
    /// The model is sound, but not of a kind this engine runs.
    #[error("this kind of model is not supported: {reason}")]
    Unsupported {
        /// What about it.
        reason: String,
    },
}
