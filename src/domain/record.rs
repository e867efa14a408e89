//! Rows whole, as they are carried from one place to another.

use half::f16;

use super::{ModelId, Prompt, PromptId, UserId};

/// A vector in its stored form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorRecord {
    /// What made it.
    pub model: ModelId,
    /// `[dimension]` IEEE 754 half-precision numbers, little-endian, 2 bytes each.
    pub f16_bytes: Vec<u8>,
}

impl VectorRecord {
    /// Whether these are `dimension` numbers of unit length, as far as half precision tells.
    pub fn is_unit(&self, dimension: usize) -> bool {
        let (halves, rest) = self.f16_bytes.as_chunks::<2>();
        let square = |half: &[u8; 2]| f16::from_le_bytes(*half).to_f32().powi(2);
        let square: f32 = halves.iter().map(square).sum();
        halves.len() == dimension && rest.is_empty() && (square - 1.0).abs() < 0.01
    }
}

/// Everything that is kept of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRecord {
    /// What its owner sees of it.
    pub prompt: Prompt,
    /// Its vector, if it has one; only a completed prompt has.
    pub vector: Option<VectorRecord>,
}

/// The highest ids that were ever given out; 0 where none was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastIds {
    /// Among accounts.
    pub user: UserId,
    /// Among prompts.
    pub prompt: PromptId,
}

impl LastIds {
    /// No id was given out yet.
    pub const NONE: Self = Self {
        user: UserId(0),
        prompt: PromptId(0),
    };

    /// The higher of both, each for itself.
    pub fn max(self, other: Self) -> Self {
        Self {
            user: self.user.max(other.user),
            prompt: self.prompt.max(other.prompt),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::Embedding;

    fn record(numbers: &[f32]) -> VectorRecord {
        VectorRecord {
            model: ModelId(Arc::from("a")),
            f16_bytes: Embedding(numbers.into()).to_f16_bytes(),
        }
    }

    #[test]
    fn a_unit_vector_is_told_from_others() {
        assert!(record(&[0.6, -0.8]).is_unit(2));
        assert!(!record(&[0.6, -0.8]).is_unit(3));
        assert!(!record(&[0.6, 0.6]).is_unit(2));
        assert!(!record(&[0.0, 0.0]).is_unit(2));
        assert!(!record(&[f32::NAN, 1.0]).is_unit(2));
        assert!(!record(&[f32::INFINITY, 1.0]).is_unit(2));
        let mut odd = record(&[0.6, -0.8]);
        odd.f16_bytes.push(0);
        assert!(!odd.is_unit(2));
    }
}
