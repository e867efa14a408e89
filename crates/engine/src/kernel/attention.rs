//! Softmax attention of one head of one text, in `f32`.

use super::linear::{float_tile, lanes_mut, row_blocks, with_rows};
use super::simd::{LANES, Op, Simd};

/// Working memory of [`Attention`], grown once and kept.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    /// Keys of one head, transposed: `[head, keys]`, the keys padded to whole vectors.
    keys: Vec<f32>,
    /// Scores of one block of queries: `[rows, keys]`.
    scores: Vec<f32>,
}

/// `softmax(q k^T) v` of one head, the softmax taken to base two: the query weights carry log2(e) /
/// sqrt(head width). Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
pub struct Attention<'a> {
    /// `[tokens, head]` each, the head's width a multiple of 16
    pub queries: &'a [f32],
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub head: usize,
    pub scratch: &'a mut AttentionScratch,
    /// Row `t` of the head's result starts at `t * out_stride`.
    pub out: &'a mut [f32],
    pub out_stride: usize,
}

impl Op for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Attention {
            queries,
            keys,
            values,
            head,
            scratch,
            out,
            out_stride,
        } = self;
        let tokens = queries.len() / head;
        if tokens == 0 {
            return;
        }
        let padded = tokens.next_multiple_of(LANES);
        scratch.keys.resize(head * padded, 0.0);
        scratch.scores.resize(S::FLOAT_ROWS * padded, 0.0);
        transpose(keys, head, padded, &mut scratch.keys);
        for (row, count) in row_blocks(tokens, S::FLOAT_ROWS) {
            let queries = &queries[row * head..];
            let scores = &mut scratch.scores[..count * padded];
            let out = &mut out[row * out_stride..];
            with_rows!(count.min(S::FLOAT_ROWS), |R| {
                if R <= S::FLOAT_ROWS {
                    score::<S, R>(simd, queries, head, &scratch.keys, padded, scores);
                    let mut inverse = [0.0; R];
                    for (scores, inverse) in scores.chunks_exact_mut(padded).zip(&mut inverse) {
                        *inverse = softmax(simd, scores, tokens);
                    }
                    mix::<S, R>(
                        simd, scores, padded, tokens, values, head, &inverse, out, out_stride,
                    );
                }
            });
        }
    }
}

/// What an earlier text left in the padding stays: the scores of padding are overwritten before
/// anything reads them.
#[inline(always)]
fn transpose(keys: &[f32], head: usize, padded: usize, into: &mut [f32]) {
    let tokens = keys.len() / head;
    for (d, column) in into.chunks_exact_mut(padded).enumerate() {
        for (into, key) in column[..tokens].iter_mut().zip(keys.chunks_exact(head)) {
            *into = key[d];
        }
    }
}

#[inline(always)]
fn score<S: Simd, const R: usize>(
    simd: S,
    queries: &[f32],
    head: usize,
    keys: &[f32],
    padded: usize,
    scores: &mut [f32],
) {
    let mut at = 0;
    if S::WIDE {
        while at + 3 * LANES <= padded {
            score_tile::<S, R, 3>(simd, queries, head, keys, padded, at, scores);
            at += 3 * LANES;
        }
    }
    while at < padded {
        score_tile::<S, R, 1>(simd, queries, head, keys, padded, at, scores);
        at += LANES;
    }
}

#[inline(always)]
fn score_tile<S: Simd, const R: usize, const P: usize>(
    simd: S,
    queries: &[f32],
    head: usize,
    keys: &[f32],
    padded: usize,
    at: usize,
    scores: &mut [f32],
) {
    let tile = float_tile::<S, R, P>(simd, queries, head, head, &keys[at..], padded);
    for r in 0..R {
        for p in 0..P {
            simd.store(tile[r][p], lanes_mut(scores, r * padded + at + p * LANES));
        }
    }
}

/// Replaces scores by `2^(score - greatest)` and returns one over their sum.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], tokens: usize) -> f32 {
    scores[tokens..].fill(f32::NEG_INFINITY);
    let mut greatest = simd.splat(f32::NEG_INFINITY);
    for x in scores.as_chunks().0 {
        greatest = simd.max(greatest, simd.load(x));
    }
    let greatest = simd.splat(simd.max_lane(greatest));
    let mut sum = simd.splat(0.0);
    for x in scores.as_chunks_mut().0 {
        let power = exp2(simd, simd.sub(simd.load(x), greatest));
        sum = simd.add(sum, power);
        simd.store(power, x);
    }
    1.0 / simd.sum(sum)
}

/// Polynomial for 2^x on `[-0.5, 0.5]`, relative error 8e-8; lowest power first.
const EXP2: [f32; 6] = [
    1.000_000_1,
    0.693_146_94,
    0.240_221_2,
    0.055_507_135,
    0.009_675_542,
    0.001_327_646_8,
];

/// `2^x` for `x <= 0`; below 2^-126 the answer stays 2^-126, which no sum of interest notices.
#[inline(always)]
fn exp2<S: Simd>(simd: S, x: S::F) -> S::F {
    let x = simd.max(x, simd.splat(-126.0));
    let whole = simd.round(x);
    let rest = simd.sub(x, whole);
    let mut power = simd.splat(EXP2[EXP2.len() - 1]);
    for at in (0..EXP2.len() - 1).rev() {
        power = simd.mul_add(power, rest, simd.splat(EXP2[at]));
    }
    simd.mul(power, simd.exp2_whole(whole))
}

#[expect(
    clippy::too_many_arguments,
    reason = "the shapes of one product, used once"
)]
#[inline(always)]
fn mix<S: Simd, const R: usize>(
    simd: S,
    weights: &[f32],
    padded: usize,
    tokens: usize,
    values: &[f32],
    head: usize,
    inverse: &[f32; R],
    out: &mut [f32],
    out_stride: usize,
) {
    let mut at = 0;
    if S::WIDE {
        while at + 2 * LANES <= head {
            let tile = float_tile::<S, R, 2>(simd, weights, padded, tokens, &values[at..], head);
            for r in 0..R {
                for p in 0..2 {
                    let value = simd.mul(tile[r][p], simd.splat(inverse[r]));
                    simd.store(value, lanes_mut(out, r * out_stride + at + p * LANES));
                }
            }
            at += 2 * LANES;
        }
    }
    while at < head {
        let tile = float_tile::<S, R, 1>(simd, weights, padded, tokens, &values[at..], head);
        for r in 0..R {
            let value = simd.mul(tile[r][0], simd.splat(inverse[r]));
            simd.store(value, lanes_mut(out, r * out_stride + at));
        }
        at += LANES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::portable::Portable;

    #[test]
    fn exp2_is_within_a_millionth_of_the_exact_power() {
        for step in 0..=12_600 {
            let x = -(step as f32) / 100.0;
            let got = exp2(Portable, [x; LANES])[0];
            let want = f64::from(x).exp2();
            assert!(
                (f64::from(got) / want - 1.0).abs() < 1e-6,
                "2^{x}: {got} against {want}"
            );
        }
        assert!(exp2(Portable, [f32::NEG_INFINITY; LANES])[0] < 1.2e-38);
    }
}
