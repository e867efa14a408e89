//! AVX-512 and AVX2 kernels: the only `unsafe` of the search.
//!
//! Measured against the portable kernel by `benches/search.rs`; without them a scan is several
//! times slower.
#![expect(
    unsafe_code,
    reason = "vector loads take pointers, and a function compiled for an instruction set may run only where it exists"
)]

use std::arch::x86_64::*;

use super::{BLOCK_ROWS, Candidate, CodeLine, QueryLine, RowLine, Span, portable};

/// Lines of a row of the bundled model (384 numbers): loops of known length keep the query in
/// registers.
const BUNDLED_LINES: usize = 12;

/// Words of a sign code of the bundled model.
const BUNDLED_WORDS: usize = 6;

/// How many rows ahead scattered rows are prefetched: about 6 KB in flight, about 100 ns of work.
const FETCH_AHEAD: usize = 8;

/// Instruction sets that this machine has. Only [`X86::available`] makes one, so it is the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct X86(InstructionSets);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InstructionSets {
    /// AVX-512 F and VPOPCNTDQ.
    Avx512,
    /// AVX2, FMA, F16C and POPCNT.
    Avx2,
}

impl X86 {
    /// What the machine has, fastest first.
    pub(super) fn available() -> impl Iterator<Item = Self> {
        let has_avx512 =
            is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vpopcntdq");
        let has_avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        let avx512 = has_avx512.then_some(Self(InstructionSets::Avx512));
        avx512
            .into_iter()
            .chain(has_avx2.then_some(Self(InstructionSets::Avx2)))
    }

    pub(super) fn name(self) -> &'static str {
        match self.0 {
            InstructionSets::Avx512 => "avx512",
            InstructionSets::Avx2 => "avx2",
        }
    }

    pub(super) fn scores<'a>(
        self,
        query: &[QueryLine],
        rows: impl Iterator<Item = &'a [RowLine]>,
        scores: &mut [f32],
    ) {
        // SAFETY: `self` exists only on a processor with the instruction sets.
        unsafe {
            match self.0 {
                InstructionSets::Avx512 => scores_avx512(query, rows, scores),
                InstructionSets::Avx2 => scores_avx2(query, rows, scores),
            }
        }
    }

    pub(super) fn near(self, span: Span<'_>, found: &mut Vec<Candidate>) {
        // SAFETY: `self` exists only on a processor with the instruction sets.
        unsafe {
            match (self.0, span.query.len()) {
                (InstructionSets::Avx512, BUNDLED_WORDS) => {
                    near_avx512::<BUNDLED_WORDS>(span, found)
                }
                (InstructionSets::Avx512, _) => near_avx512::<0>(span, found),
                (InstructionSets::Avx2, _) => near_avx2(span, found),
            }
        }
    }
}

/// Yields scattered rows one by one, and prefetches a later row each time.
pub(super) struct FetchAhead<'a> {
    pub(super) rows: &'a [&'a [RowLine]],
}

impl<'a> Iterator for FetchAhead<'a> {
    type Item = &'a [RowLine];

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let (row, rest) = self.rows.split_first()?;
        if let Some(later) = self.rows.get(FETCH_AHEAD) {
            for line in *later {
                // SAFETY: prefetching has no effect a program can see, whatever the address; every
                // x86-64 has it.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) }
            }
        }
        self.rows = rest;
        Some(row)
    }
}

#[target_feature(enable = "avx512f")]
fn scores_avx512<'a>(
    query: &[QueryLine],
    rows: impl Iterator<Item = &'a [RowLine]>,
    scores: &mut [f32],
) {
    if let Ok(query) = <&[QueryLine; BUNDLED_LINES]>::try_from(query) {
        for (row, score) in rows.zip(scores) {
            if let Ok(row) = <&[RowLine; BUNDLED_LINES]>::try_from(row) {
                *score = dot_avx512(query, row);
            }
        }
    } else {
        for (row, score) in rows.zip(scores) {
            *score = dot_avx512(query, row);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn dot_avx512(query: &[QueryLine], row: &[RowLine]) -> f32 {
    let mut low = _mm512_setzero_ps();
    let mut high = _mm512_setzero_ps();
    for (q, r) in query.iter().zip(row) {
        let (q, r) = (q.0.as_ptr(), r.0.as_ptr());
        // SAFETY: `q` points to 32 f32 and `r` to 32 u16, both at 64-byte boundaries: two loads of
        // half of each stay inside, and their addresses are multiples of the loads' sizes.
        let (q_low, q_high, r_low, r_high) = unsafe {
            (
                _mm512_load_ps(q),
                _mm512_load_ps(q.add(16)),
                _mm256_load_si256(r.cast()),
                _mm256_load_si256(r.add(16).cast()),
            )
        };
        low = _mm512_fmadd_ps(q_low, _mm512_cvtph_ps(r_low), low);
        high = _mm512_fmadd_ps(q_high, _mm512_cvtph_ps(r_high), high);
    }
    _mm512_reduce_add_ps(_mm512_add_ps(low, high))
}

#[target_feature(enable = "avx512f,avx512vpopcntdq")]
fn near_avx512<const WORDS: usize>(span: Span<'_>, found: &mut Vec<Candidate>) {
    let words = if WORDS == 0 { span.query.len() } else { WORDS };
    let query = &span.query[..words];
    let limit = _mm512_set1_epi64(i64::from(span.limit));
    let blocks = span.codes.chunks_exact(words);
    for (block, lines) in blocks.take(span.n_rows.div_ceil(BLOCK_ROWS)).enumerate() {
        let mut distances = _mm512_setzero_si512();
        for (line, q) in lines.iter().zip(query) {
            let differing = _mm512_xor_si512(load_codes(line), _mm512_set1_epi64(*q as i64));
            distances = _mm512_add_epi64(distances, _mm512_popcnt_epi64(differing));
        }
        let near = _mm512_cmple_epu64_mask(distances, limit);
        if near != 0 {
            let mut stored = CodeLine::ZERO;
            // SAFETY: a `CodeLine` is 64 bytes at a 64-byte boundary: the store fills it exactly.
            unsafe { _mm512_store_si512(stored.0.as_mut_ptr().cast(), distances) }
            span.push_block(block, near, stored.0, found);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_codes(line: &CodeLine) -> __m512i {
    // SAFETY: a `CodeLine` is 64 bytes at a 64-byte boundary: the load reads it exactly.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scores_avx2<'a>(
    query: &[QueryLine],
    rows: impl Iterator<Item = &'a [RowLine]>,
    scores: &mut [f32],
) {
    for (row, score) in rows.zip(scores) {
        *score = dot_avx2(query, row);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_avx2(query: &[QueryLine], row: &[RowLine]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 4];
    for (q, r) in query.iter().zip(row) {
        for (quarter, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the line of the query holds 32 f32 and the row's 32 u16, both at 64-byte
            // boundaries: four loads of a quarter of each stay inside, and their addresses are
            // multiples of the loads' sizes.
            let (q, r) = unsafe {
                (
                    _mm256_load_ps(q.0.as_ptr().add(8 * quarter)),
                    _mm_load_si128(r.0.as_ptr().add(8 * quarter).cast()),
                )
            };
            *sum = _mm256_fmadd_ps(q, _mm256_cvtph_ps(r), *sum);
        }
    }
    let sum = _mm256_add_ps(
        _mm256_add_ps(sums[0], sums[1]),
        _mm256_add_ps(sums[2], sums[3]),
    );
    let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
}

/// The portable loop compiled for POPCNT and 256-bit vectors: six popcounts a row keep up with the
/// memory.
#[target_feature(enable = "avx2,popcnt")]
fn near_avx2(span: Span<'_>, found: &mut Vec<Candidate>) {
    portable::near(span, found);
}
