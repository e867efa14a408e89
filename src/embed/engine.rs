//! A tokenizer and the model it belongs to.

use std::path::Path;

use super::pipeline::Encode;
use super::tokenizer::Tokenizer;
use super::{Error, Model, Scratch};
use crate::domain::{Embedding, ModelId};

/// A tokenizer with its model: what the pipeline's workers run.
pub struct Engine {
    tokenizer: Tokenizer,
    model: Model,
}

impl Engine {
    /// The engine this program carries.
    ///
    /// # Errors
    /// `Malformed`, which a test of this crate excludes.
    pub fn bundled() -> Result<Self, Error> {
        Ok(Self {
            tokenizer: Tokenizer::bundled(),
            model: Model::bundled()?,
        })
    }

    /// The engine of a sentence-transformers folder: its `tokenizer.json` and what [`Model::from_dir`] reads.
    ///
    /// # Errors
    /// Those of [`Model::from_dir`]; `Malformed` or `Unsupported` for the tokenizer.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path, source })?;
        let tokenizer = Tokenizer::from_json(&bytes).map_err(|error| Error::Malformed {
            file: "tokenizer.json".to_owned(),
            reason: error.to_string(),
        })?;
        let model = Model::from_dir(dir)?;
        if tokenizer.vocabulary_size() > model.vocabulary_size() {
            let reason = "it has more tokens than the model has word embeddings".to_owned();
            return Err(Error::Malformed {
                file: "tokenizer.json".to_owned(),
                reason,
            });
        }
        Ok(Self { tokenizer, model })
    }

    /// Changes whenever the vectors do.
    pub fn model_id(&self) -> &ModelId {
        self.model.id()
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
        self.tokenizer.encode(text, self.model.max_tokens())
    }

    fn embed(&self, batch: &[&[u32]], scratch: &mut Scratch) -> Vec<Embedding> {
        self.model.embed(batch, scratch)
    }
}
