//! Sentence embeddings for requests: the [`pipeline`] feeds the engine (`crates/engine`): bounded,
//! fair, in batches, never on the async threads.

mod background;
pub mod pipeline;

pub use background::BackgroundEmbedder;
pub use pipeline::{Class, Embedded, Embedder, EmbedderSettings, Permit, read_part};
pub use prompt_service_engine::{Encode, Engine, Error, Kernel, Model, Scratch, tokenizer};
