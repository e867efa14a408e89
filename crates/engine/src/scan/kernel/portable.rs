//! The kernel that every machine can run. The tests compare the other kernels with it.

use super::{BLOCK_ROWS, Candidate, QueryLine, RowLine, Span};

/// Independent sums per row: enough for the compiler to use whatever vectors the target has.
const SUMS: usize = 16;

pub(super) fn scores<'a>(
    query: &[QueryLine],
    rows: impl Iterator<Item = &'a [RowLine]>,
    scores: &mut [f32],
) {
    for (row, score) in rows.zip(scores) {
        *score = dot(query, row);
    }
}

fn dot(query: &[QueryLine], row: &[RowLine]) -> f32 {
    let mut sums = [0.0_f32; SUMS];
    for (q, r) in query.iter().zip(row) {
        for (q, r) in q.0.chunks_exact(SUMS).zip(r.0.chunks_exact(SUMS)) {
            for lane in 0..SUMS {
                sums[lane] += q[lane] * to_f32(r[lane]);
            }
        }
    }
    sums.iter().sum()
}

/// The value of a finite f16. Shifting its exponent and fraction into an f32's places leaves an
/// exponent too small by 112, for denormals too. One exact multiplication corrects it. There is no
/// branch, so loops over it become vector code.
fn to_f32(bits: u16) -> f32 {
    const TWO_TO_112: f32 = f32::from_bits((127 + 112) << 23);
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * TWO_TO_112;
    f32::from_bits(magnitude.to_bits() | sign)
}

/// Always inlined, so that a caller compiled for a machine with a popcount instruction gets it here
/// too.
#[inline(always)]
pub(super) fn near(span: Span<'_>, found: &mut Vec<Candidate>) {
    let blocks = span.codes.chunks_exact(span.query.len());
    for (block, lines) in blocks.take(span.n_rows.div_ceil(BLOCK_ROWS)).enumerate() {
        let mut distances = [0_u64; BLOCK_ROWS];
        for (line, q) in lines.iter().zip(span.query) {
            for (distance, word) in distances.iter_mut().zip(line.0) {
                *distance += u64::from((word ^ q).count_ones());
            }
        }
        let mut near = 0_u8;
        for (lane, distance) in distances.iter().enumerate() {
            near |= u8::from(*distance <= u64::from(span.limit)) << lane;
        }
        if near != 0 {
            span.push_block(block, near, distances, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    #[test]
    fn every_finite_half_is_converted_exactly() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            if half.is_finite() {
                assert_eq!(super::to_f32(bits).to_bits(), half.to_f32().to_bits());
            }
        }
    }
}
