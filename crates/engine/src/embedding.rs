//! Sentence embeddings and their stored form.

use std::fmt;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Names the model, the weights and the arithmetic that made a vector. Vectors of different models
/// must not be compared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelId(pub Arc<str>);

impl ModelId {
    /// The name of the model's folder, by which people know it: what comes before the first slash.
    pub fn folder_name(&self) -> &str {
        self.0.split('/').next().unwrap_or_default()
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A sentence embedding: `[dimension]` numbers of unit length, so that a dot product is the cosine
/// similarity. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding(pub Arc<[f32]>);

impl Embedding {
    /// The stored form: `[dimension]` IEEE 754 half-precision numbers, little-endian, 2 bytes each.
    pub fn to_f16_bytes(&self) -> Vec<u8> {
        let mut halves = vec![f16::ZERO; self.0.len()];
        halves.convert_from_f32_slice(&self.0);
        halves.iter().flat_map(|half| half.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_form_is_little_endian_f16() {
        let embedding = Embedding(Arc::from([1.0_f32, -0.5].as_slice()));
        assert_eq!(embedding.to_f16_bytes(), [0x00, 0x3c, 0x00, 0xb8]);
    }
}
