//! AVX2 with FMA: bytes widened to 16 bits, then `vpmaddwd`, which cannot overflow on them.
//! `vpmaddubsw` would be twice as fast and saturates: 255 * 127 * 2 does not fit its 16 bits.

use std::arch::x86_64::*;

use super::simd::{IntTileRow, LANES, Op, Simd};

/// Proof that the processor and the operating system support AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The proof, if this processor has the instructions.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub struct Pair(__m256, __m256);

// SAFETY of every block below: a value of `Avx2` exists only after `detect` found all the
// instructions used here, and the pointers come from references to arrays of exactly the size that
// is read or written; unaligned forms are used throughout.
impl Simd for Avx2 {
    type F = Pair;
    type Activation = i16;

    // Sixteen registers: a row of a tile takes two of them for its sums.
    const INT_ROWS: usize = 6;
    const FLOAT_ROWS: usize = 6;
    const WIDE: bool = false;

    #[inline(always)]
    fn vectorize<O: Op>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<O: Op>(simd: Avx2, op: O) -> O::Output {
            op.run(simd)
        }
        // SAFETY: the token proves the features.
        unsafe { compiled(self, op) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { Pair(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        // SAFETY: see the head of this impl; 64 bytes are read.
        unsafe {
            Pair(
                _mm256_loadu_ps(from.as_ptr()),
                _mm256_loadu_ps(from.as_ptr().add(8)),
            )
        }
    }

    #[inline(always)]
    fn load_half(self, from: &[u16; LANES]) -> Self::F {
        // SAFETY: see the head of this impl; 32 bytes are read.
        unsafe {
            let low = _mm_loadu_si128(from.as_ptr().cast());
            let high = _mm_loadu_si128(from.as_ptr().add(8).cast());
            Pair(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F {
        // SAFETY: see the head of this impl; 16 bytes are read.
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let low = _mm256_cvtepi8_epi32(bytes);
            let high = _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes));
            Pair(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
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
            let zero_point = _mm256_set1_epi32(zero_point);
            let half = |at: usize| {
                let sums = _mm256_loadu_si256(sums.as_ptr().add(at).cast());
                let weight_sums = _mm256_loadu_si256(weight_sums.as_ptr().add(at).cast());
                _mm256_cvtepi32_ps(_mm256_sub_epi32(
                    sums,
                    _mm256_mullo_epi32(zero_point, weight_sums),
                ))
            };
            Pair(half(0), half(8))
        }
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        // SAFETY: see the head of this impl; 64 bytes are written.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), value.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value.1);
        }
    }

    #[inline(always)]
    fn store_u8(self, value: Self::F, to: &mut [u8; LANES]) {
        // SAFETY: see the head of this impl; 16 bytes are written.
        unsafe {
            let words =
                _mm256_packs_epi32(_mm256_cvtps_epi32(value.0), _mm256_cvtps_epi32(value.1));
            // Packing works within 128-bit halves, so the quarters come out as 0, 2, 1, 3.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packus_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { Pair(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { Pair(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { Pair(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe {
            Pair(
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { Pair(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe { Pair(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: see the head of this impl.
        unsafe {
            Pair(
                _mm256_round_ps::<NEAREST>(a.0),
                _mm256_round_ps::<NEAREST>(a.1),
            )
        }
    }

    #[inline(always)]
    fn exp2_whole(self, a: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let half = |a| {
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                    _mm256_cvtps_epi32(a),
                    bias,
                )))
            };
            Pair(half(a.0), half(a.1))
        }
    }

    #[inline(always)]
    fn hadamard(self, a: Self::F) -> Self::F {
        // SAFETY: see the head of this impl.
        unsafe {
            // Each lane gets its partner plus or minus itself; multiplying by one or minus one
            // rounds nothing.
            let by_4 = _mm256_setr_ps(1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0);
            let by_2 = _mm256_setr_ps(1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0);
            let by_1 = _mm256_setr_ps(1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0);
            let within = |a| {
                let a = _mm256_fmadd_ps(a, by_4, _mm256_permute2f128_ps::<0x01>(a, a));
                let a = _mm256_fmadd_ps(a, by_2, _mm256_permute_ps::<0b01_00_11_10>(a));
                _mm256_fmadd_ps(a, by_1, _mm256_permute_ps::<0b10_11_00_01>(a))
            };
            Pair(
                within(_mm256_add_ps(a.0, a.1)),
                within(_mm256_sub_ps(a.0, a.1)),
            )
        }
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe {
            let a = _mm256_add_ps(a.0, a.1);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }

    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe {
            let a = _mm256_max_ps(a.0, a.1);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }

    #[inline(always)]
    fn min_lane(self, a: Self::F) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe {
            let a = _mm256_min_ps(a.0, a.1);
            let a = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_min_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_min_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }

    /// Widened once for all panels: in the tile it would be two of ten instructions for each row.
    #[inline(always)]
    fn activations<'a>(self, values: &'a [u8], room: &'a mut Vec<i16>) -> &'a [i16] {
        // Never shrunk, since growing again would fill it with zeros for nothing.
        if room.len() < values.len() {
            room.resize(values.len(), 0);
        }
        let room = &mut room[..values.len()];
        let (whole, rest) = values.as_chunks::<LANES>();
        let (wide, wide_rest) = room.as_chunks_mut::<LANES>();
        for (bytes, words) in whole.iter().zip(wide) {
            // SAFETY: see the head of this impl; 16 bytes are read and 32 written.
            unsafe {
                let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
                _mm256_storeu_si256(words.as_mut_ptr().cast(), _mm256_cvtepu8_epi16(bytes));
            }
        }
        for (byte, word) in rest.iter().zip(wide_rest) {
            *word = i16::from(*byte);
        }
        room
    }

    /// Half a panel at a time: a row then takes two registers instead of four, so that six rows,
    /// not three, share the widening of a weight. Of 26 vector instructions a step, 12 are
    /// products; Zen 3 starts four a cycle, two of them products.
    #[inline(always)]
    fn int_tile<const R: usize, const P: usize>(
        self,
        rows: &[i16],
        panels: &[i8],
        quads: usize,
        _ahead: bool,
    ) -> [IntTileRow<P>; R] {
        assert!(rows.len() >= R * quads * 4 && panels.len() >= P * quads * 4 * LANES);
        let mut sums = [[[0; LANES]; P]; R];
        // SAFETY: features as above. Row `r` reads 4 words at `4 * (r * quads + q)` and panel `p`
        // 32 bytes at each half of the 64 at `64 * (p * quads + q)`, with r < R, p < P, q < quads:
        // within the lengths asserted just above. The two pointers that walk over them stop at most
        // one step past those reads, where the slice ends or goes on; `wrapping_add` allows both.
        // Of the sixteen sums of a row and panel, each half writes eight.
        unsafe {
            for p in 0..P {
                for half in 0..2 {
                    let mut acc = [[_mm256_setzero_si256(); 2]; R];
                    let mut line = panels.as_ptr().wrapping_add(64 * p * quads + 32 * half);
                    let mut column = rows.as_ptr();
                    for _ in 0..quads {
                        let w = [
                            _mm256_cvtepi8_epi16(_mm_loadu_si128(line.cast())),
                            _mm256_cvtepi8_epi16(_mm_loadu_si128(line.add(16).cast())),
                        ];
                        for r in 0..R {
                            let quad = column.add(4 * r * quads).cast::<i64>();
                            let a = _mm256_set1_epi64x(quad.read_unaligned());
                            for c in 0..2 {
                                acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(a, w[c]));
                            }
                        }
                        line = line.wrapping_add(64);
                        column = column.wrapping_add(4);
                    }
                    for r in 0..R {
                        // Each channel's sum is still in two neighbouring lanes; adding them leaves
                        // the quarters as 0, 2, 1, 3.
                        let pairs = _mm256_hadd_epi32(acc[r][0], acc[r][1]);
                        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
                        _mm256_storeu_si256(sums[r][p].as_mut_ptr().add(8 * half).cast(), ordered);
                    }
                }
            }
        }
        sums
    }
}
