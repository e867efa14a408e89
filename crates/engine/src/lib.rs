//! Sentence embeddings: text to vector, in the process.
//!
//! A [`tokenizer`] divides the text, and a [`Model`] runs this project's BERT forward pass over
//! int8 weights. A small encoder spends its time in a few dozen matrix products that fit the
//! caches. The overhead of a general inference runtime is larger than the cost of these products;
//! `benches/engine/` measures the difference.
//!
//! It is a crate of its own so that it alone is compiled at the highest level of optimisation. The
//! rest of the service waits for the network and the disk, and compiles faster at a lower level.

mod aligned;
mod embedding;
mod engine;
pub mod expected;
mod folder;
mod kernel;
mod model;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod packed_tests;
mod safetensors;
pub mod scan;
pub mod tokenizer;
mod weights;

use std::io;
use std::path::PathBuf;

pub use embedding::{Embedding, ModelId};
pub use engine::{Encode, Engine};
pub use kernel::Kernel;
pub use model::{Model, Scratch};

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model is missing or unreadable.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A file is damaged, or its content does not fit its name.
    #[error("{file} is not usable: {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// The fault, as a sentence without its subject.
        reason: String,
    },
    /// The model is correct, but this engine does not run its kind.
    #[error("this kind of model is not supported: {reason}")]
    Unsupported {
        /// Why.
        reason: String,
    },
}
