//! AVX-512 with VNNI: four byte products a lane and instruction, summed exactly (`vpdpbusd`, the
//! form that does not saturate).

use std::arch::x86_64::*;

use super::simd::{IntTileRow, LANES, Op, Simd};

/// Proof that the processor and the operating system support AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Vnni(());

impl Avx512Vnni {
    /// The proof, if this processor has the instructions.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

// SAFETY of every block below: a value of `Avx512Vnni` exists only after `detect` found all the
// instructions used here, and the pointers come from references to arrays of exactly the size that
// is read or written; unaligned forms are used throughout.
impl Simd for Avx512Vnni {
    type F = __m512;
    type Activation = u8;

    const INT_ROWS: usize = 8;
    const FLOAT_ROWS: usize = 8;
    const WIDE: bool = true;

    #[inline(always)]
    fn vectorize<O: Op>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn compiled<O: Op>(simd: Avx512Vnni, op: O) -> O::Output {
            op.run(simd)
        }
        // SAFETY: the token proves the features.
        unsafe { compiled(self, op) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        // SAFETY: see the head of this impl; 64 bytes are read.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn load_half(self, from: &[u16; LANES]) -> Self::F {
        // SAFETY: see the head of this impl; 32 bytes are read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F {
        // SAFETY: see the head of this impl; 16 bytes are read.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_corrected(
        self,
        sums: &[i32; LANES],
        zero_point: i32,
        weight_sums: &[i32; LANES],
    ) -> Self::F {
        // SAFETY: see the head of this impl; 64 bytes are read from each array.
        unsafe {
            let sums = _mm512_loadu_si512(sums.as_ptr().cast());
            let weight_sums = _mm512_loadu_si512(weight_sums.as_ptr().cast());
            let shift = _mm512_mullo_epi32(_mm512_set1_epi32(zero_point), weight_sums);
            _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, shift))
        }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        // SAFETY: see the head of this impl; 64 bytes are written.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn store_u8(self, value: Self::F, to: &mut [u8; LANES]) {
        // SAFETY: see the head of this impl; 16 bytes are written.
        unsafe {
            let bytes = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(value));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn exp2_whole(self, a: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), a) }
    }

    #[inline(always)]
    fn hadamard(self, a: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe {
            // Each lane gets its partner plus or minus itself; multiplying by one or minus one
            // rounds nothing.
            let sign = |mask| _mm512_mask_blend_ps(mask, _mm512_set1_ps(1.0), _mm512_set1_ps(-1.0));
            let a = _mm512_fmadd_ps(a, sign(0xff00), _mm512_shuffle_f32x4::<0b01_00_11_10>(a, a));
            let a = _mm512_fmadd_ps(a, sign(0xf0f0), _mm512_shuffle_f32x4::<0b10_11_00_01>(a, a));
            let a = _mm512_fmadd_ps(a, sign(0xcccc), _mm512_permute_ps::<0b01_00_11_10>(a));
            _mm512_fmadd_ps(a, sign(0xaaaa), _mm512_permute_ps::<0b10_11_00_01>(a))
        }
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }

    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn min_lane(self, a: Self::F) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_reduce_min_ps(a) }
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
        ahead: bool,
    ) -> [IntTileRow<P>; R] {
        assert!(rows.len() >= R * quads * 4 && panels.len() >= P * quads * 4 * LANES);
        let mut sums = [[[0; LANES]; P]; R];
        // SAFETY: features as above. Row `r` reads 4 bytes at `4 * (r * quads + q)` and panel `p`
        // 64 bytes at `64 * (p * quads + q)`, with r < R, p < P, q < quads: within the lengths
        // asserted just above.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); P]; R];
            for q in 0..quads {
                let mut w = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    let line = panels.as_ptr().add(64 * (p * quads + q));
                    w[p] = _mm512_loadu_si512(line.cast());
                    if ahead {
                        // A prefetch of an address that is not there does nothing; past the last
                        // panel it may not be.
                        _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(64 * P * quads));
                    }
                }
                for r in 0..R {
                    let a = rows
                        .as_ptr()
                        .add(4 * (r * quads + q))
                        .cast::<i32>()
                        .read_unaligned();
                    let a = _mm512_set1_epi32(a);
                    for p in 0..P {
                        acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], a, w[p]);
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    _mm512_storeu_si512(sums[r][p].as_mut_ptr().cast(), acc[r][p]);
                }
            }
        }
        sums
    }
}
