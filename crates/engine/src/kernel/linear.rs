//! Linear layers: rows of activations times packed weights. The step after the product is done
//! while the product is in registers.

use super::quantise::QuantisedRows;
use super::simd::{IntTileRow, LANES, Op, Simd};

/// Where output channel `c` of row `r` goes: `(c / group) * group_stride + c % group + r *
/// row_stride`, all in numbers. Row-major output has one group; attention needs each head's rows
/// together.
#[derive(Clone, Copy, Debug)]
pub struct OutputLayout {
    /// Channels that stay side by side; a multiple of 16.
    pub group: usize,
    /// Distance between groups.
    pub group_stride: usize,
    /// Distance between rows.
    pub row_stride: usize,
}

/// The operation on `x * w + bias` before it is written.
#[derive(Clone, Copy, Debug)]
pub enum Finish<'a> {
    /// Nothing.
    Store,
    /// GELU, the exact (erf) form to within 1e-4.
    Gelu,
    /// Adds the number at the same place of this slice, laid out as the output.
    Residual(&'a [f32]),
}

/// Packed int8 weights of one linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Int8Weights<'a> {
    /// `[outputs / 16, inputs / 4, 16, 4]`
    pub packed: &'a [i8],
    /// `[outputs]`: a weight is `scale * packed`.
    pub scale: &'a [f32],
    /// `[outputs]`: sums of the packed weights over the inputs.
    pub sums: &'a [i32],
}

/// `finish(x * w^T + bias)` over quantised rows.
pub struct Int8Linear<'a> {
    pub rows: &'a QuantisedRows,
    pub weights: Int8Weights<'a>,
    pub bias: &'a [f32],
    pub finish: Finish<'a>,
    pub layout: OutputLayout,
    /// Room for widened rows.
    pub widened: &'a mut Vec<i16>,
    pub out: &'a mut [f32],
}

impl Op for Int8Linear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Int8Linear {
            rows,
            weights,
            bias,
            finish,
            layout,
            widened,
            out,
        } = self;
        if rows.params.is_empty() {
            return;
        }
        let panels = bias.len() / LANES;
        let step = if S::WIDE { 3 } else { 1 };
        let mut tiles = Tiles {
            width: rows.values.len() / rows.params.len(),
            rows: simd.activations(&rows.values, widened),
            params: &rows.params,
            weights,
            bias,
            finish,
            layout,
            out,
        };
        let mut panel = 0;
        while panel + step <= panels {
            if S::WIDE {
                tiles.panels::<S, 3>(simd, panel);
            } else {
                tiles.panels::<S, 1>(simd, panel);
            }
            panel += step;
        }
        while panel < panels {
            tiles.panels::<S, 1>(simd, panel);
            panel += 1;
        }
    }
}

/// A running [`Int8Linear`].
struct Tiles<'a, A> {
    /// `[rows, width]`
    rows: &'a [A],
    width: usize,
    params: &'a [(f32, i32)],
    weights: Int8Weights<'a>,
    bias: &'a [f32],
    finish: Finish<'a>,
    layout: OutputLayout,
    out: &'a mut [f32],
}

/// Calls `$self.$name::<S, R, ...>` with the constant `R` that equals `$rows`.
macro_rules! with_rows {
    ($rows:expr, |$r:ident| $call:expr) => {
        match $rows {
            1 => {
                const $r: usize = 1;
                $call
            }
            2 => {
                const $r: usize = 2;
                $call
            }
            3 => {
                const $r: usize = 3;
                $call
            }
            4 => {
                const $r: usize = 4;
                $call
            }
            5 => {
                const $r: usize = 5;
                $call
            }
            6 => {
                const $r: usize = 6;
                $call
            }
            7 => {
                const $r: usize = 7;
                $call
            }
            _ => {
                const $r: usize = 8;
                $call
            }
        }
    };
}
pub(super) use with_rows;

/// Splits `rows` into blocks of at most `most`, as even as can be: nine rows run better as 5 + 4
/// than as 8 + 1. Yields (first row, rows).
#[inline(always)]
pub fn row_blocks(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let blocks = rows.div_ceil(most).max(1);
    let (small, larger) = (rows / blocks, rows % blocks);
    (0..blocks)
        .map(move |block| {
            (
                block * small + block.min(larger),
                small + usize::from(block < larger),
            )
        })
        .filter(|block| block.1 > 0)
}

impl<A> Tiles<'_, A> {
    #[inline(always)]
    fn panels<S: Simd<Activation = A>, const P: usize>(&mut self, simd: S, panel: usize) {
        for (row, rows) in row_blocks(self.params.len(), S::INT_ROWS) {
            with_rows!(rows.min(S::INT_ROWS), |R| self
                .tile::<S, R, P>(simd, row, panel));
        }
    }

    #[inline(always)]
    fn tile<S: Simd<Activation = A>, const R: usize, const P: usize>(
        &mut self,
        simd: S,
        row: usize,
        panel: usize,
    ) {
        // A constant comparison: tiles larger than the registers hold are never compiled.
        if R > S::INT_ROWS {
            return;
        }
        let weights = &self.weights.packed[panel * self.width * LANES..];
        let sums = simd.int_tile::<R, P>(
            &self.rows[row * self.width..],
            weights,
            self.width / 4,
            row == 0,
        );
        for p in 0..P {
            // Decided once per panel, not once per row.
            match self.finish {
                Finish::Store => self.write(simd, row, panel + p, &sums, p, Store),
                Finish::Gelu => self.write(simd, row, panel + p, &sums, p, Gelu),
                Finish::Residual(x) => self.write(simd, row, panel + p, &sums, p, Residual(x)),
            }
        }
    }

    /// Scales, finishes and writes the sums of panel `p` of a tile, which is panel `panel` of all.
    #[inline(always)]
    fn write<S: Simd, const R: usize, const P: usize>(
        &mut self,
        simd: S,
        row: usize,
        panel: usize,
        sums: &[IntTileRow<P>; R],
        p: usize,
        finish: impl Finisher,
    ) {
        let channel = panel * LANES;
        let scale = simd.load(lanes(self.weights.scale, channel));
        let weight_sums = lanes(self.weights.sums, channel);
        let bias = simd.load(lanes(self.bias, channel));
        let params: &[(f32, i32); R] = self.params[row..]
            .first_chunk()
            .expect("a tile's rows are rows of the call");
        let mut at = self.layout.at(row, channel);
        for r in 0..R {
            let (row_scale, zero_point) = params[r];
            let product = simd.load_corrected(&sums[r][p], zero_point, weight_sums);
            let value = simd.mul_add(product, simd.mul(scale, simd.splat(row_scale)), bias);
            let value = finish.apply(simd, value, at);
            simd.store(value, lanes_mut(self.out, at));
            at += self.layout.row_stride;
        }
    }
}

/// A [`Finish`] known when the code is compiled.
trait Finisher: Copy {
    /// Finishes sixteen numbers that will be written at `at`.
    fn apply<S: Simd>(self, simd: S, value: S::F, at: usize) -> S::F;
}

/// [`Finish::Store`]
#[derive(Clone, Copy)]
struct Store;

/// [`Finish::Gelu`]
#[derive(Clone, Copy)]
struct Gelu;

/// [`Finish::Residual`]
#[derive(Clone, Copy)]
struct Residual<'a>(&'a [f32]);

impl Finisher for Store {
    #[inline(always)]
    fn apply<S: Simd>(self, _simd: S, value: S::F, _at: usize) -> S::F {
        value
    }
}

impl Finisher for Gelu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, value: S::F, _at: usize) -> S::F {
        gelu(simd, value)
    }
}

impl Finisher for Residual<'_> {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, value: S::F, at: usize) -> S::F {
        simd.add(value, simd.load(lanes(self.0, at)))
    }
}

/// `finish(x * w^T + bias)` over unquantised rows and half-precision weights, in `f32` arithmetic.
pub struct HalfLinear<'a> {
    /// `[rows, inputs]`
    pub rows: &'a [f32],
    /// `[outputs / 16, inputs, 16]`, IEEE 754 half-precision bits
    pub packed: &'a [u16],
    pub bias: &'a [f32],
    pub finish: Finish<'a>,
    pub layout: OutputLayout,
    /// Room for one widened panel.
    pub widened: &'a mut Vec<f32>,
    pub out: &'a mut [f32],
}

impl Op for HalfLinear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let HalfLinear {
            rows,
            packed,
            bias,
            finish: done,
            layout,
            widened,
            out,
        } = self;
        let panels = bias.len() / LANES;
        let width = packed.len() / bias.len();
        widened.resize(width * LANES, 0.0);
        for panel in 0..panels {
            let halves = &packed[panel * width * LANES..][..width * LANES];
            for (half, wide) in halves.as_chunks().0.iter().zip(widened.as_chunks_mut().0) {
                simd.store(simd.load_half(half), wide);
            }
            let channel = panel * LANES;
            let bias = simd.load(lanes(bias, channel));
            for (row, count) in row_blocks(rows.len() / width, S::FLOAT_ROWS) {
                let rows = &rows[row * width..];
                with_rows!(count.min(S::FLOAT_ROWS), |R| {
                    if R <= S::FLOAT_ROWS {
                        let tile = float_tile::<S, R, 1>(simd, rows, width, width, widened, LANES);
                        for r in 0..R {
                            finish(
                                simd,
                                simd.add(tile[r][0], bias),
                                done,
                                layout.at(row + r, channel),
                                out,
                            );
                        }
                    }
                });
            }
        }
    }
}

/// `R` rows of `a` (each `a_stride` after the one before) times `b` (`depth` rows of `16 * P`
/// numbers, `b_stride` apart).
#[inline(always)]
pub fn float_tile<S: Simd, const R: usize, const P: usize>(
    simd: S,
    a: &[f32],
    a_stride: usize,
    depth: usize,
    b: &[f32],
    b_stride: usize,
) -> [[S::F; P]; R] {
    let mut acc = [[simd.splat(0.0); P]; R];
    let mut rows = [&a[..0]; R];
    for r in 0..R {
        rows[r] = &a[r * a_stride..][..depth];
    }
    for (k, b) in b.chunks(b_stride).take(depth).enumerate() {
        let b = &b[..P * LANES];
        let mut columns = [simd.splat(0.0); P];
        for p in 0..P {
            columns[p] = simd.load(lanes(b, p * LANES));
        }
        for r in 0..R {
            let a = simd.splat(rows[r][k]);
            for p in 0..P {
                acc[r][p] = simd.mul_add(a, columns[p], acc[r][p]);
            }
        }
    }
    acc
}

impl OutputLayout {
    #[inline(always)]
    fn at(&self, row: usize, channel: usize) -> usize {
        channel / self.group * self.group_stride + channel % self.group + row * self.row_stride
    }
}

#[inline(always)]
fn finish<S: Simd>(simd: S, value: S::F, how: Finish<'_>, at: usize, out: &mut [f32]) {
    let value = match how {
        Finish::Store => value,
        Finish::Gelu => Gelu.apply(simd, value, at),
        Finish::Residual(x) => Residual(x).apply(simd, value, at),
    };
    simd.store(value, lanes_mut(out, at));
}

/// Beyond this magnitude erf(x / sqrt 2) counts as the polynomial's value there, which is one to
/// within 3e-5.
const GELU_LIMIT: f32 = 4.2;

/// Odd polynomial for erf(x / sqrt 2) on `[-4.2, 4.2]`, fitted so that the error of GELU is even
/// over the range: 3e-5 inside it, 8e-5 on `[-8, 8]`, where one step of a quantised row is about
/// 1e-2. Coefficients of (x / 4.2)^(2i + 1), i = 0, 1, ...
const ERF: [f32; 9] = [
    3.350_210_4,
    -9.812_523,
    25.461_11,
    -50.094_307,
    73.067_42,
    -75.891_33,
    52.451_8,
    -21.410_067,
    3.877_663_9,
];

/// `x * Phi(x)`, with Phi the normal distribution function. Source: Hendrycks & Gimpel 2016,
/// arXiv:1606.08415.
#[inline(always)]
fn gelu<S: Simd>(simd: S, x: S::F) -> S::F {
    let clamped = simd.min(simd.max(x, simd.splat(-GELU_LIMIT)), simd.splat(GELU_LIMIT));
    let scaled = simd.mul(clamped, simd.splat(1.0 / GELU_LIMIT));
    let square = simd.mul(scaled, scaled);
    let mut erf = simd.splat(ERF[ERF.len() - 1]);
    for power in (0..ERF.len() - 1).rev() {
        erf = simd.mul_add(erf, square, simd.splat(ERF[power]));
    }
    let half = simd.mul(x, simd.splat(0.5));
    simd.mul_add(half, simd.mul(erf, scaled), half)
}

/// The sixteen items from `at` on.
#[inline(always)]
pub fn lanes<T>(from: &[T], at: usize) -> &[T; LANES] {
    from[at..]
        .first_chunk()
        .expect("callers pass slices whose length is a multiple of sixteen")
}

/// The sixteen items from `at` on.
#[inline(always)]
pub fn lanes_mut<T>(from: &mut [T], at: usize) -> &mut [T; LANES] {
    from[at..]
        .first_chunk_mut()
        .expect("callers pass slices whose length is a multiple of sixteen")
}
