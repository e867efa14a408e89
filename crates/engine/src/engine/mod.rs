//! A tokenizer and the model it belongs to.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::folder;
use super::tokenizer::Tokenizer;
use super::{Error, Model, Scratch};
use crate::embedding::{Embedding, ModelId};

/// A tokenizer and a model, as the workers use them. Several threads call it at once.
pub trait Encode: Send + Sync + 'static {
    /// A worker's memory, created on its thread and kept between batches.
    type Scratch;

    /// Creates a worker's memory.
    fn scratch(&self) -> Self::Scratch;

    /// The ids of a text, cut to the length that the model takes.
    fn tokenize(&self, text: &str) -> Vec<u32>;

    /// One vector for each text, in their order. A text's vector does not depend on its neighbours.
    fn embed(&self, batch: &[&[u32]], scratch: &mut Self::Scratch) -> Vec<Embedding>;
}

/// A tokenizer with its model: what the pipeline's workers run.
pub struct Engine {
    id: ModelId,
    tokenizer: Tokenizer,
    /// Whether texts are lowercased before the tokenizer sees them.
    lower_case: bool,
    model: Model,
}

impl Engine {
    /// The engine inside this program.
    ///
    /// # Errors
    /// `Malformed`, which a test of this crate excludes.
    pub fn bundled() -> Result<Self, Error> {
        let model = Model::bundled()?;
        Ok(Self {
            id: model.id().clone(),
            tokenizer: Tokenizer::bundled(),
            lower_case: false,
            model,
        })
    }

    /// The engine of a sentence-transformers folder: its `tokenizer.json` and the files that
    /// [`Model::from_dir`] reads. One text is embedded, so that unusable weights are found here and
    /// not in the store.
    ///
    /// # Errors
    /// The errors of [`Model::from_dir`]; `Malformed` or `Unsupported` for the tokenizer.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let folder::TokenizerFile { bytes, lower_case } = folder::tokenizer(dir)?;
        let malformed = |file: &str, reason: &str| Error::Malformed {
            file: file.to_owned(),
            reason: reason.to_owned(),
        };
        let tokenizer = Tokenizer::from_json(&bytes)
            .map_err(|error| malformed("tokenizer.json", &error.to_string()))?;
        let model = Model::from_dir(dir)?;
        if tokenizer.vocabulary_size() > model.vocabulary_size() {
            let reason = "it has more tokens than the model has word embeddings";
            return Err(malformed("tokenizer.json", reason));
        }
        let engine = Self {
            id: id(model.id(), &bytes, lower_case),
            tokenizer,
            lower_case,
            model,
        };
        let ids = engine.tokenize("a text");
        let vectors = engine.embed(&[&ids], &mut engine.scratch());
        if !vectors.iter().all(is_unit) {
            let reason = "it does not turn a text into a vector of finite length";
            return Err(malformed("model.safetensors", reason));
        }
        Ok(engine)
    }

    /// Changes whenever the vectors change.
    pub fn model_id(&self) -> &ModelId {
        &self.id
    }

    /// Numbers in a vector.
    pub fn dimension(&self) -> usize {
        self.model.dimension()
    }
}

impl Encode for Engine {
    type Scratch = Scratch;

    fn scratch(&self) -> Scratch {
        Scratch::default()
    }

    fn tokenize(&self, text: &str) -> Vec<u32> {
        let most = self.model.max_tokens();
        if self.lower_case {
            return self.tokenizer.encode(&text.to_lowercase(), most);
        }
        self.tokenizer.encode(text, most)
    }

    fn embed(&self, batch: &[&[u32]], scratch: &mut Scratch) -> Vec<Embedding> {
        self.model.embed(batch, scratch)
    }
}

/// `my-model/int8-1-53aa5117-9f86d081`: the model's id, and the start of the SHA-256 of the
/// tokenizer.
fn id(model: &ModelId, tokenizer: &[u8], lower_case: bool) -> ModelId {
    let digest = Sha256::new()
        .chain_update(tokenizer)
        .chain_update([u8::from(lower_case)])
        .finalize();
    let start: String = digest[..4]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    ModelId(Arc::from(format!("{model}-{start}")))
}

fn is_unit(vector: &Embedding) -> bool {
    let length: f32 = vector.0.iter().map(|x| x * x).sum();
    (length - 1.0).abs() < 1e-3
}

#[cfg(test)]
mod tests;
