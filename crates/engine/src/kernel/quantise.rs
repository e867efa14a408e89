//! Activations to unsigned bytes, each row with its scale and zero point.
//!
//! A hidden state has a few channels that are ten times as large as the rest. They alone would set
//! the scale of a row, so rows may first be centred and rotated: a Walsh-Hadamard transform spreads
//! each channel over 128 numbers, and the weights carry its inverse. It costs a hundredth of the
//! product that follows, and removes six sevenths of the quantisation error. Source of the idea:
//! Ashkboos et al. 2024, arXiv:2404.00456.

use super::simd::{LANES, Op, Simd};

/// Vectors across which a rotation mixes at most; sixteen lanes each.
const MAX_BLOCKS: usize = 8;

/// Activations quantised row by row: a number is about `scale * (value - zero_point)`.
#[derive(Debug, Default)]
pub struct QuantisedRows {
    /// `[rows, width]`
    pub values: Vec<u8>,
    /// `[rows]`: scale and zero point.
    pub params: Vec<(f32, i32)>,
    /// One row after its rotation.
    pub rotated: Vec<f32>,
}

/// Quantises `rows` of `width` numbers (a multiple of 16) into `into`.
pub struct Quantise<'a> {
    /// `[rows, width]`
    pub rows: &'a [f32],
    /// Numbers in a row.
    pub width: usize,
    /// `[width]`: if given, it is taken from each row, and the rest is rotated by
    /// [`rotation_blocks`].
    pub centre: Option<&'a [f32]>,
    /// Receives the rows.
    pub into: &'a mut QuantisedRows,
}

/// Vectors across which rows of `width` are mixed: the greatest power of two, up to eight, that
/// divides their number of vectors `v`. The transform is H(blocks) over vectors `v / blocks` apart,
/// then H(16) over the lanes of each; H is the natural-order Walsh-Hadamard matrix of ones and
/// minus ones, so the inverse is the transform again, divided by 16 times the blocks.
pub fn rotation_blocks(width: usize) -> usize {
    let vectors = width / LANES;
    (1 << vectors.trailing_zeros()).min(MAX_BLOCKS)
}

impl Op for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Quantise {
            rows,
            width,
            centre,
            into,
        } = self;
        // Every number is overwritten below; only growth has to be filled.
        into.values.resize(rows.len(), 0);
        into.rotated.resize(width, 0.0);
        into.params.clear();
        for (row, bytes) in rows
            .chunks_exact(width)
            .zip(into.values.chunks_exact_mut(width))
        {
            let params = match centre {
                Some(centre) => {
                    let range = rotate(simd, row, centre, &mut into.rotated);
                    quantise_row(simd, &into.rotated, range, bytes)
                }
                None => quantise_row(simd, row, range(simd, row), bytes),
            };
            into.params.push(params);
        }
    }
}

/// Least and greatest number, lane by lane. Zero belongs to them, so that the zero point is a byte
/// and zero is exact.
struct Range<F>(F, F);

impl<F: Copy> Range<F> {
    #[inline(always)]
    fn new<S: Simd<F = F>>(simd: S) -> Self {
        Self(simd.splat(0.0), simd.splat(0.0))
    }

    #[inline(always)]
    fn include<S: Simd<F = F>>(&mut self, simd: S, x: F) {
        self.0 = simd.min(self.0, x);
        self.1 = simd.max(self.1, x);
    }
}

#[inline(always)]
fn range<S: Simd>(simd: S, row: &[f32]) -> Range<S::F> {
    let mut range = Range::new(simd);
    for x in row.as_chunks().0 {
        range.include(simd, simd.load(x));
    }
    range
}

#[inline(always)]
fn quantise_row<S: Simd>(simd: S, row: &[f32], range: Range<S::F>, bytes: &mut [u8]) -> (f32, i32) {
    let (zero, top) = (simd.splat(0.0), simd.splat(255.0));
    let (low, high) = (simd.min_lane(range.0), simd.max_lane(range.1));
    let range = high - low;
    let inverse = if range > 0.0 { 255.0 / range } else { 0.0 };
    let zero_point = (-low * inverse).round_ties_even();
    let (inverse, shift) = (simd.splat(inverse), simd.splat(zero_point));
    for (x, bytes) in row.as_chunks().0.iter().zip(bytes.as_chunks_mut().0) {
        let x = simd.add(simd.round(simd.mul(simd.load(x), inverse)), shift);
        simd.store_u8(simd.min(simd.max(x, zero), top), bytes);
    }
    (range / 255.0, zero_point as i32)
}

/// Centres and rotates `row` into `out`; returns the range of what it wrote, taken while it is in
/// registers.
#[inline(always)]
fn rotate<S: Simd>(simd: S, row: &[f32], centre: &[f32], out: &mut [f32]) -> Range<S::F> {
    match rotation_blocks(row.len()) {
        8 => rotate_blocks::<S, 8>(simd, row, centre, out),
        4 => rotate_blocks::<S, 4>(simd, row, centre, out),
        2 => rotate_blocks::<S, 2>(simd, row, centre, out),
        _ => rotate_blocks::<S, 1>(simd, row, centre, out),
    }
}

#[inline(always)]
fn rotate_blocks<S: Simd, const B: usize>(
    simd: S,
    row: &[f32],
    centre: &[f32],
    out: &mut [f32],
) -> Range<S::F> {
    let mut range = Range::new(simd);
    let (row, centre) = (row.as_chunks().0, centre.as_chunks().0);
    let out = out.as_chunks_mut().0;
    let stride = row.len() / B;
    // Checked here, so that the loop needs no checks.
    let (row, centre, out) = (
        &row[..stride * B],
        &centre[..stride * B],
        &mut out[..stride * B],
    );
    for at in 0..stride {
        let mut x = [simd.splat(0.0); B];
        for b in 0..B {
            let place = b * stride + at;
            x[b] = simd.sub(simd.load(&row[place]), simd.load(&centre[place]));
        }
        let mut distance = B / 2;
        while distance > 0 {
            let from = x;
            for b in 0..B {
                let other = from[b ^ distance];
                x[b] = if b & distance == 0 {
                    simd.add(from[b], other)
                } else {
                    simd.sub(other, from[b])
                };
            }
            distance /= 2;
        }
        for b in 0..B {
            let x = simd.hadamard(x[b]);
            range.include(simd, x);
            simd.store(x, &mut out[b * stride + at]);
        }
    }
    range
}

/// The same rotation of one row of weights, divided so that products with rotated activations stay
/// what they were.
pub fn rotate_weights(row: &mut [f32]) {
    let blocks = rotation_blocks(row.len());
    let stride = row.len() / blocks;
    let mut butterflies = |distance: usize, bit: usize| {
        for i in 0..row.len() {
            if (i / distance) & bit == 0 {
                let (a, b) = (row[i], row[i + distance * bit]);
                row[i] = a + b;
                row[i + distance * bit] = a - b;
            }
        }
    };
    for bit in [8, 4, 2, 1] {
        butterflies(1, bit);
    }
    let mut bit = blocks / 2;
    while bit > 0 {
        butterflies(stride, bit);
        bit /= 2;
    }
    let inverse = 1.0 / (LANES * blocks) as f32;
    row.iter_mut().for_each(|x| *x *= inverse);
}
