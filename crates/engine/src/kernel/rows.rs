//! Work on whole rows of hidden states: layer normalisation, embedding lookup, pooling.

use super::linear::{lanes, lanes_mut};
use super::simd::{LANES, Op, Simd};

/// Parameters of one layer normalisation, each `[width]`.
#[derive(Clone, Copy, Debug)]
pub struct NormWeights<'a> {
    pub gain: &'a [f32],
    pub bias: &'a [f32],
    pub epsilon: f32,
}

/// Normalises each row in place: zero mean, unit variance, then gain and bias. Source: Ba et al.
/// 2016, arXiv:1607.06450.
pub struct LayerNorm<'a> {
    pub rows: &'a mut [f32],
    pub weights: NormWeights<'a>,
}

impl Op for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.weights.gain.len()) {
            normalise(simd, row, self.weights);
        }
    }
}

#[inline(always)]
fn normalise<S: Simd>(simd: S, row: &mut [f32], weights: NormWeights<'_>) {
    let per_item = 1.0 / row.len() as f32;
    let mut sum = simd.splat(0.0);
    for x in row.as_chunks().0 {
        sum = simd.add(sum, simd.load(x));
    }
    let mean = simd.splat(simd.sum(sum) * per_item);
    // The second pass over a row in L1 costs little, and the one-pass formula cancels.
    let mut squares = simd.splat(0.0);
    for x in row.as_chunks().0 {
        let x = simd.sub(simd.load(x), mean);
        squares = simd.mul_add(x, x, squares);
    }
    let deviation = (simd.sum(squares) * per_item + weights.epsilon).sqrt();
    let inverse = simd.splat(1.0 / deviation);
    for (at, x) in row.as_chunks_mut().0.iter_mut().enumerate() {
        let gain = simd.load(lanes(weights.gain, at * LANES));
        let bias = simd.load(lanes(weights.bias, at * LANES));
        let centred = simd.mul(simd.sub(simd.load(x), mean), inverse);
        simd.store(simd.mul_add(centred, gain, bias), x);
    }
}

/// Word embedding table, `[words, width]`.
#[derive(Clone, Copy, Debug)]
pub enum Words<'a> {
    /// Signed bytes and a scale for each word.
    Int8 { values: &'a [i8], scale: &'a [f32] },
    /// IEEE 754 half-precision bits.
    Half(&'a [u16]),
}

/// First hidden state of one text: word plus position, normalised.
pub struct Embed<'a> {
    /// Token ids, each below the table's length.
    pub ids: &'a [u32],
    pub words: Words<'a>,
    /// `[positions, width]`, at least as many as there are ids; the segment embedding is in it.
    pub positions: &'a [f32],
    pub norm: NormWeights<'a>,
    /// `[ids, width]`
    pub out: &'a mut [f32],
}

impl Op for Embed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.norm.gain.len();
        let positions = self.positions.chunks_exact(width);
        for ((id, position), row) in self
            .ids
            .iter()
            .zip(positions)
            .zip(self.out.chunks_exact_mut(width))
        {
            let start = *id as usize * width;
            for at in (0..width).step_by(LANES) {
                let position = simd.load(lanes(position, at));
                let sum = match self.words {
                    Words::Int8 { values, scale } => simd.mul_add(
                        simd.load_i8(lanes(values, start + at)),
                        simd.splat(scale[*id as usize]),
                        position,
                    ),
                    Words::Half(values) => {
                        simd.add(simd.load_half(lanes(values, start + at)), position)
                    }
                };
                simd.store(sum, lanes_mut(row, at));
            }
            normalise(simd, row, self.norm);
        }
    }
}

/// Averages the rows of one text and scales the result to unit length. One row given is `cls`
/// pooling. Source: Reimers & Gurevych 2019, arXiv:1908.10084, section 3 (MEAN).
pub struct MeanPool<'a> {
    /// `[rows, width]`, at least one row
    pub rows: &'a [f32],
    /// `[width]`
    pub out: &'a mut [f32],
}

impl Op for MeanPool<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.out.len();
        let mut squares = simd.splat(0.0);
        for at in (0..width).step_by(LANES) {
            let mut sum = simd.splat(0.0);
            for row in self.rows.chunks_exact(width) {
                sum = simd.add(sum, simd.load(lanes(row, at)));
            }
            squares = simd.mul_add(sum, sum, squares);
            simd.store(sum, lanes_mut(self.out, at));
        }
        // The number of rows cancels in the normalisation.
        let length = simd.sum(squares).sqrt();
        let inverse = simd.splat(if length > 0.0 { 1.0 / length } else { 0.0 });
        for x in self.out.as_chunks_mut().0 {
            simd.store(simd.mul(simd.load(x), inverse), x);
        }
    }
}
