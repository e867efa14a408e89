//! Plain Rust, for any processor. The tests compare the other kernels with it.

use half::f16;

use super::simd::{IntTileRow, LANES, Op, Simd, by_halves};

/// Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number, ties to even, without a
/// library call.
const ROUNDING: f32 = 12_582_912.0;

/// Products a float sum takes in exactly: 512 * 255 * 128 is below 2^24. Baseline x86-64 has no
/// 32-bit integer product of vectors, so floats, used as integers, are twice as fast.
const EXACT: usize = 512;

/// The instruction set that every target has.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = a;
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Simd for Portable {
    type F = [f32; LANES];
    type Activation = u8;

    const INT_ROWS: usize = 8;
    const FLOAT_ROWS: usize = 2;
    const WIDE: bool = false;

    #[inline(always)]
    fn vectorize<O: Op>(self, op: O) -> O::Output {
        op.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }

    #[inline(always)]
    fn load_half(self, from: &[u16; LANES]) -> Self::F {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F {
        from.map(f32::from)
    }

    #[inline(always)]
    fn load_corrected(
        self,
        sums: &[i32; LANES],
        zero_point: i32,
        weight_sums: &[i32; LANES],
    ) -> Self::F {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = sums[i].wrapping_sub(zero_point.wrapping_mul(weight_sums[i])) as f32;
        }
        out
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        *to = value;
    }

    #[inline(always)]
    fn store_u8(self, value: Self::F, to: &mut [u8; LANES]) {
        *to = value.map(|v| v as u8);
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut out = c;
        for i in 0..LANES {
            // Without the instruction a fused multiply-add is a library call, a hundred times
            // slower.
            out[i] = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            };
        }
        out
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        a.map(|v| (v + ROUNDING) - ROUNDING)
    }

    #[inline(always)]
    fn exp2_whole(self, a: Self::F) -> Self::F {
        // Wrapping, as in the other kernels: scores that are no numbers give any result.
        a.map(|v| f32::from_bits(((v as i32).wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    fn hadamard(self, a: Self::F) -> Self::F {
        let mut out = a;
        for stage in [8, 4, 2, 1] {
            let from = out;
            for i in 0..LANES {
                out[i] = if i & stage == 0 {
                    from[i] + from[i ^ stage]
                } else {
                    from[i ^ stage] - from[i]
                };
            }
        }
        out
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        by_halves(a, |a, b| a + b)
    }

    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        by_halves(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min_lane(self, a: Self::F) -> f32 {
        by_halves(a, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn activations<'a>(self, values: &'a [u8], _room: &'a mut Vec<i16>) -> &'a [u8] {
        values
    }

    #[inline(always)]
    fn int_tile<const R: usize, const P: usize>(
        self,
        rows: &[u8],
        panels: &[i8],
        quads: usize,
        _ahead: bool,
    ) -> [IntTileRow<P>; R] {
        let width = 4 * quads;
        let mut sums = [[[0; LANES]; P]; R];
        let mut wide = [0.0; EXACT * LANES];
        for p in 0..P {
            let panel = &panels[p * width * LANES..][..width * LANES];
            for start in (0..width).step_by(EXACT) {
                let depth = EXACT.min(width - start);
                let quads = panel[start * LANES..][..depth * LANES]
                    .as_chunks::<{ 4 * LANES }>()
                    .0;
                for (quad, wide) in quads.iter().zip(wide.as_chunks_mut::<{ 4 * LANES }>().0) {
                    for k in 0..4 {
                        for c in 0..LANES {
                            wide[k * LANES + c] = f32::from(quad[4 * c + k]);
                        }
                    }
                }
                // Two rows at a time keep enough independent sums in flight; of an odd number the
                // last has itself as its partner.
                for r in (0..R).step_by(2) {
                    let pair = [r, (r + 1).min(R - 1)];
                    let rows = pair.map(|r| &rows[r * width + start..][..depth]);
                    let mut acc = [[0.0_f32; LANES]; 2];
                    for ((w, a), b) in wide.as_chunks::<LANES>().0.iter().zip(rows[0]).zip(rows[1])
                    {
                        let x = [f32::from(*a), f32::from(*b)];
                        for i in 0..2 {
                            for c in 0..LANES {
                                acc[i][c] += x[i] * w[c];
                            }
                        }
                    }
                    for i in 0..=pair[1] - pair[0] {
                        for c in 0..LANES {
                            sums[pair[i]][p][c] += acc[i][c] as i32;
                        }
                    }
                }
            }
        }
        sums
    }
}
