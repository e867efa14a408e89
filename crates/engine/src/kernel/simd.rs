//! The operations that the numerics use: sixteen `f32` lanes and one integer tile, implemented once
//! per instruction set.
//!
//! Everything above this file is ordinary safe Rust, generic over [`Simd`]. Because every
//! implementation has sixteen lanes and reduces them by the same tree, AVX2 and AVX-512 give the
//! same bits; the portable one differs only where the target lacks a fused multiply-add.

/// Lanes of one vector, and output channels of one weight panel.
pub const LANES: usize = 16;

/// One row of an integer tile: `P` panels of sixteen sums.
pub type IntTileRow<const P: usize> = [[i32; LANES]; P];

/// A computation that [`Simd::vectorize`] compiles for one instruction set. `run` must be
/// `#[inline(always)]`, or its body is compiled without the instruction set and is merely slow.
pub trait Op {
    /// What the computation returns.
    type Output;
    /// Does the work with the given instructions.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set. A value is a proof that this processor has it: only detection makes one, so
/// the methods are safe to call.
pub trait Simd: Copy {
    /// Sixteen `f32` numbers.
    type F: Copy;
    /// A quantised activation in the form that the integer tile reads.
    type Activation: Copy;

    /// Most rows of an integer tile whose sums fit the registers.
    const INT_ROWS: usize;
    /// Most rows of a float tile whose sums fit the registers.
    const FLOAT_ROWS: usize;
    /// Whether a tile spans several panels (registers enough) or one.
    const WIDE: bool;

    /// Runs `op` compiled for this instruction set.
    fn vectorize<O: Op>(self, op: O) -> O::Output;

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::F;
    /// Reads sixteen numbers.
    fn load(self, from: &[f32; LANES]) -> Self::F;
    /// Reads sixteen half-precision numbers (as bits), widened exactly.
    fn load_half(self, from: &[u16; LANES]) -> Self::F;
    /// Reads sixteen signed bytes, widened exactly.
    fn load_i8(self, from: &[i8; LANES]) -> Self::F;
    /// `sums - zero_point * weight_sums` in exact integers, then rounded to `f32`.
    fn load_corrected(
        self,
        sums: &[i32; LANES],
        zero_point: i32,
        weight_sums: &[i32; LANES],
    ) -> Self::F;
    /// Writes sixteen numbers.
    fn store(self, value: Self::F, to: &mut [f32; LANES]);
    /// Writes sixteen whole numbers as bytes; the caller has clamped them to `0..=255`.
    fn store_u8(self, value: Self::F, to: &mut [u8; LANES]);

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the hardware can.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater of each pair of lanes.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The lesser of each pair of lanes.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Nearest whole number, ties to even; exact for magnitudes below 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// Two to the power of whole numbers in `-126..=127`; any number for others.
    fn exp2_whole(self, a: Self::F) -> Self::F;
    /// The 16-point Walsh-Hadamard transform of the lanes in natural order, not normalised: stages
    /// of distance 8, 4, 2, 1.
    fn hadamard(self, a: Self::F) -> Self::F;
    /// Sum over the lanes by halves: lane i + lane i+8, then i+4, i+2, i+1.
    fn sum(self, a: Self::F) -> f32;
    /// Greatest lane.
    fn max_lane(self, a: Self::F) -> f32;
    /// Least lane.
    fn min_lane(self, a: Self::F) -> f32;

    /// Converts quantised rows to the form that the integer tile reads. `room` is for rows that are
    /// not in that form already.
    fn activations<'a>(self, values: &'a [u8], room: &'a mut Vec<i16>) -> &'a [Self::Activation];

    /// Exact integer products of `R` rows of unsigned activations and `P` panels of signed weights.
    /// `rows`: `[R, 4 * quads]`, from [`Simd::activations`]; `panels`: `[P, quads, 16, 4]`; returns
    /// `[R, P, 16]`. `ahead` asks for the cache lines that follow `panels` while this tile is
    /// computed, if the hardware can. Every sum must fit an `i32`: the loader bounds the row length
    /// for that. Panics if the slices are shorter than these shapes.
    fn int_tile<const R: usize, const P: usize>(
        self,
        rows: &[Self::Activation],
        panels: &[i8],
        quads: usize,
        ahead: bool,
    ) -> [IntTileRow<P>; R];
}

/// Reduces sixteen lanes by halves with `combine`; the order every implementation follows.
#[inline(always)]
pub fn by_halves(lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = combine(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}
