//! Every kernel against plain arithmetic, on random rows and on extreme ones.

use half::f16;
use proptest::prelude::*;

use super::*;

#[test]
fn expected_kernels_have_run() {
    let query = query_lines(&[0.5; LANES]);
    let row = row_lines(&[f16::from_f32(0.25); LANES]);
    let mut ran = Vec::new();
    for kernel in Kernel::available() {
        let mut scores = [f32::NAN; 2];
        let rows = [row[0], RowLine::ZERO];
        kernel.scores(&query, &rows, &mut scores);
        assert_eq!(scores, [4.0, 0.0], "{}", kernel.name());
        ran.push(kernel.name());
    }
    let all = ["avx512", "avx2", "portable"];
    crate::expected::kernels("search", "EXPECT_SEARCH_KERNELS", &all, &ran);
}

fn query_lines(values: &[f32]) -> Vec<QueryLine> {
    values
        .chunks(LANES)
        .map(|chunk| {
            let mut line = QueryLine([0.0; LANES]);
            line.0[..chunk.len()].copy_from_slice(chunk);
            line
        })
        .collect()
}

fn row_lines(values: &[f16]) -> Vec<RowLine> {
    values
        .chunks(LANES)
        .map(|chunk| {
            let mut line = RowLine::ZERO;
            for (lane, value) in line.0.iter_mut().zip(chunk) {
                *lane = value.to_bits();
            }
            line
        })
        .collect()
}

/// The dot product in f64, and the sum of the products' magnitudes, which bounds the rounding of
/// any order of adding.
fn exact(query: &[f32], row: &[f16]) -> (f64, f64) {
    let products = query
        .iter()
        .zip(row)
        .map(|(q, r)| f64::from(*q) * r.to_f64());
    products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
}

/// A finite half that depends on `bits` alone: mostly of the size of a unit vector's numbers, else
/// of any size, or extreme.
fn finite_half(bits: u64) -> f16 {
    const EXTREMES: [f16; 6] = [
        f16::MAX,
        f16::MIN,
        f16::ZERO,
        f16::NEG_ZERO,
        f16::MIN_POSITIVE_SUBNORMAL,
        f16::MAX_SUBNORMAL,
    ];
    let any = (bits >> 8) as u16;
    match bits % 6 {
        0 => EXTREMES[usize::from(any) % EXTREMES.len()],
        1 => f16::from_bits((any & 0x8000) | ((any & 0x7fff) % 0x7c00)),
        _ => f16::from_f32(f32::from(any) / 32768.0 - 1.0),
    }
}

/// Numbers that depend on `state` alone.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 3
}

proptest! {
    #[test]
    fn scores_equal_the_plain_dot_product_in_every_kernel(
        dimension in prop_oneof![1_usize..=100, Just(384), Just(768)],
        n_rows in 0_usize..20,
        seed in any::<u64>(),
    ) {
        let mut state = seed;
        let query: Vec<f32> = (0..dimension).map(|_| random(&mut state) as u16 as f32 / 32768.0 - 1.0).collect();
        let rows: Vec<Vec<f16>> = (0..n_rows)
            .map(|_| (0..dimension).map(|_| finite_half(random(&mut state))).collect())
            .collect();
        let lines = query_lines(&query);
        let flat: Vec<RowLine> = rows.iter().flat_map(|row| row_lines(row)).collect();
        let scattered: Vec<&[RowLine]> = flat.chunks_exact(lines.len()).collect();
        for kernel in Kernel::available() {
            let mut together = vec![f32::NAN; rows.len()];
            kernel.scores(&lines, &flat, &mut together);
            let mut apart = vec![f32::NAN; rows.len()];
            kernel.scores_scattered(&lines, &scattered, &mut apart);
            prop_assert_eq!(&together, &apart);
            for (row, score) in rows.iter().zip(together) {
                let (sum, size) = exact(&query, row);
                // Each of the additions rounds by at most half a unit in the last place of at most
                // `size`.
                let bound = size * query.len() as f64 * 2.0_f64.powi(-24) + 1e-30;
                prop_assert!((f64::from(score) - sum).abs() <= bound, "{kernel:?}: {score} for {sum} ± {bound}");
            }
        }
    }

    #[test]
    fn near_rows_equal_a_plain_count_of_differing_bits_in_every_kernel(
        words in prop_oneof![Just(1_usize), Just(6), 1_usize..20],
        n_rows in 0_usize..70,
        first_row in 0_u32..1000,
        seed in any::<u64>(),
        limit in prop_oneof![Just(0_u32), Just(u32::MAX), 0_u32..700],
    ) {
        let mut state = seed;
        let mut word = || {
            match random(&mut state) {
                bits if bits % 8 == 0 => 0,
                bits if bits % 8 == 1 => u64::MAX,
                bits => (bits << 32) ^ bits,
            }
        };
        let query: Vec<u64> = (0..words).map(|_| word()).collect();
        let blocks = n_rows.div_ceil(BLOCK_ROWS);
        let codes: Vec<CodeLine> = (0..blocks * words).map(|_| CodeLine(std::array::from_fn(|_| word()))).collect();
        let expected: Vec<Candidate> = (0..n_rows)
            .map(|row| Candidate {
                row: first_row + row as u32,
                distance: (0..words)
                    .map(|w| (codes[row / BLOCK_ROWS * words + w].0[row % BLOCK_ROWS] ^ query[w]).count_ones())
                    .sum(),
            })
            .filter(|candidate| candidate.distance <= limit)
            .collect();
        for kernel in Kernel::available() {
            let mut found = Vec::new();
            kernel.near(&query, &codes, first_row, n_rows, limit, &mut found);
            prop_assert_eq!(&found, &expected, "{:?}", kernel);
        }
    }
}

#[test]
fn a_row_of_the_largest_numbers_does_not_overflow() {
    let rows = row_lines(&[f16::MAX; 384]);
    for kernel in Kernel::available() {
        let mut score = [0.0];
        kernel.scores(&query_lines(&[1.0; 384]), &rows, &mut score);
        assert_eq!(score[0], 384.0 * 65504.0, "{kernel:?}");
    }
}

#[test]
fn unit_vectors_score_alike_in_all_kernels() {
    let unit = |seed: f32| {
        let raw: Vec<f32> = (0..384).map(|i| (seed + i as f32 * 0.7).sin()).collect();
        let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
        raw.iter().map(|x| x / norm).collect::<Vec<f32>>()
    };
    let query = query_lines(&unit(0.3));
    let rows: Vec<RowLine> = (0..100)
        .flat_map(|i| {
            row_lines(
                &unit(i as f32)
                    .iter()
                    .map(|x| f16::from_f32(*x))
                    .collect::<Vec<_>>(),
            )
        })
        .collect();
    let scores: Vec<Vec<f32>> = Kernel::available()
        .into_iter()
        .map(|kernel| {
            let mut scores = vec![0.0; 100];
            kernel.scores(&query, &rows, &mut scores);
            scores
        })
        .collect();
    for other in &scores[1..] {
        for (a, b) in scores[0].iter().zip(other) {
            assert!((a - b).abs() <= SCORE_TOLERANCE, "{a} and {b}");
        }
    }
}
