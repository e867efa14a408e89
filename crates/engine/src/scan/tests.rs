//! Slabs and scans against a list.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::kernel::{Candidate, Kernel};
use super::slab::query_code;
use super::{Hit, Plan, PreparedQuery, RowShape, Slab, nearest, nearest_codes};
use crate::Embedding;

/// A vector that depends only on `seed`. Many seeds give vectors with equal scores.
fn vector(dimension: usize, seed: u64) -> Embedding {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let numbers = (0..dimension).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from((state >> 40) as u8 % 9) / 64.0 - 4.0 / 64.0
    });
    Embedding(numbers.collect())
}

/// The `k` best rows of a list, by definition.
fn naive_nearest<'a>(
    rows: impl IntoIterator<Item = (i64, &'a Embedding)>,
    query: &Embedding,
    k: usize,
) -> Vec<Hit> {
    let score =
        |row: &Embedding| query.0.iter().zip(&*row.0).map(|(q, r)| q * r).sum::<f32>() + 0.0;
    let mut hits: Vec<Hit> = rows
        .into_iter()
        .map(|(id, row)| Hit {
            id,
            score: score(row),
        })
        .collect();
    hits.sort_by(|a, b| match b.score.total_cmp(&a.score) {
        Ordering::Equal => a.id.cmp(&b.id),
        unequal @ (Ordering::Less | Ordering::Greater) => unequal,
    });
    hits.truncate(k);
    hits
}

#[derive(Clone, Debug)]
enum Operation {
    /// Many rows at once, as a load does.
    Load(usize),
    /// One by one.
    Insert(usize),
    /// Deletes the row at this share of the slab.
    Delete(f64),
    DeleteMany(usize),
    Query(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        1 => (0_usize..6000).prop_map(Operation::Load),
        6 => (1_usize..200).prop_map(Operation::Insert),
        4 => (0.0..1.0).prop_map(Operation::Delete),
        1 => (0_usize..5000).prop_map(Operation::DeleteMany),
        4 => prop_oneof![Just(0_usize), Just(1), Just(100), Just(usize::MAX), 0_usize..50].prop_map(Operation::Query),
    ]
}

/// A slab and the list it must equal.
struct Both {
    slab: Arc<Slab>,
    rows: Vec<(i64, Embedding)>,
    next_id: i64,
    dimension: usize,
}

impl Both {
    fn new(dimension: usize) -> Self {
        Self {
            slab: Arc::new(Slab::new(RowShape::new(dimension))),
            rows: Vec::new(),
            next_id: 1,
            dimension,
        }
    }

    fn add(&mut self, n: usize) {
        let first = self.next_id;
        self.next_id += n as i64;
        let new = (first..self.next_id).map(|id| (id, vector(self.dimension, id as u64 % 701)));
        let new: Vec<_> = new.collect();
        let ids: Vec<i64> = new.iter().map(|(id, _)| *id).collect();
        let stored: Vec<u8> = new.iter().flat_map(|(_, row)| row.to_f16_bytes()).collect();
        Arc::make_mut(&mut self.slab).extend(&ids, &stored);
        self.rows.extend(new);
    }

    fn delete(&mut self, share: f64) {
        if !self.rows.is_empty() {
            let (id, _) = self
                .rows
                .swap_remove((self.rows.len() as f64 * share) as usize);
            let at = self.slab.find(id).expect("a row that was added is found");
            Arc::make_mut(&mut self.slab).swap_remove(at);
            assert_eq!(self.slab.find(id), None);
        }
    }

    fn check_query(&self, seed: u64, k: usize) {
        let query = vector(self.dimension, seed);
        let expected = naive_nearest(self.rows.iter().map(|(id, row)| (*id, row)), &query, k);
        let prepared = PreparedQuery::new(self.slab.shape(), &query.0);
        for kernel in Kernel::available() {
            let hits = nearest(kernel, &self.slab, &prepared, k, Plan::Exact);
            assert_eq!(hits, expected, "{kernel:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn a_slab_equals_a_list_after_any_operations(
        dimension in prop_oneof![1_usize..=5, Just(32), Just(70)],
        operations in prop::collection::vec(operation(), 1..25),
    ) {
        let mut both = Both::new(dimension);
        for (step, operation) in operations.into_iter().enumerate() {
            // A scan may hold the slab at any time, and must see it as it was when the scan began.
            let held = (step % 3 == 0).then(|| (Arc::clone(&both.slab), both.rows.clone()));
            match operation {
                Operation::Load(n) => both.add(n),
                Operation::Insert(n) => (0..n).for_each(|_| both.add(1)),
                Operation::Delete(share) => both.delete(share),
                Operation::DeleteMany(n) => (0..n.min(both.rows.len()))
                    .for_each(|i| both.delete((i % 97) as f64 / 97.0)),
                Operation::Query(k) => both.check_query(step as u64, k),
            }
            prop_assert_eq!(both.slab.n_rows(), both.rows.len());
            if let Some((slab, rows)) = held {
                Both { slab, rows, next_id: 0, dimension }.check_query(step as u64, 10);
            }
        }
        both.check_query(7, 20);
    }

    #[test]
    fn the_first_stage_finds_exactly_the_rows_with_the_nearest_codes(
        n in 0_usize..6000,
        // As `DeleteMany` does, so that rows are out of order.
        deleted in 0_usize..50,
        shortlist in 1_usize..3000,
        seed in 0_u64..1000,
    ) {
        let mut both = Both::new(70);
        both.add(n);
        (0..deleted).for_each(|i| both.delete((i % 97) as f64 / 97.0));
        let code = query_code(both.slab.shape(), &vector(70, seed).0);
        let rows: HashMap<i64, &Embedding> = both.rows.iter().map(|(id, row)| (*id, row)).collect();
        let mut expected: Vec<Candidate> = (0..both.slab.n_rows())
            .map(|row| {
                let id = both.slab.id(row).unwrap();
                let other = query_code(both.slab.shape(), &rows[&id].0);
                let differing = code.iter().zip(other).map(|(a, b)| (a ^ b).count_ones());
                Candidate { row: row as u32, distance: differing.sum() }
            })
            .collect();
        expected.sort_by_key(|candidate| (candidate.distance, candidate.row));
        let shortlist = shortlist.min(expected.len());
        if let Some(last) = expected.get(shortlist.wrapping_sub(1)).copied() {
            expected.retain(|candidate| candidate.distance <= last.distance);
        }
        for kernel in Kernel::available() {
            let found = nearest_codes(kernel, &both.slab, &code, shortlist);
            prop_assert_eq!(&found, &expected, "{:?}", kernel);
        }
    }

    #[test]
    fn a_two_stage_scan_returns_as_many_hits_as_requested_with_their_true_scores(
        n in 0_usize..5000,
        // Out of order, with gaps, and with rows left over behind the last.
        deleted in prop_oneof![Just(0_usize), 0_usize..2000],
        added in 0_usize..50,
        shortlist in 1_usize..6000,
        k in prop_oneof![Just(0_usize), Just(1), Just(100), Just(usize::MAX), 0_usize..6000],
        seed in 0_u64..1000,
    ) {
        let mut both = Both::new(70);
        both.add(n);
        (0..deleted).for_each(|i| both.delete((i * 31 % 97) as f64 / 97.0));
        both.add(added);
        let n = both.rows.len();
        let query = vector(70, seed);
        let all = naive_nearest(both.rows.iter().map(|(id, row)| (*id, row)), &query, n);
        let prepared = PreparedQuery::new(both.slab.shape(), &query.0);
        for kernel in Kernel::available() {
            let hits = nearest(kernel, &both.slab, &prepared, k, Plan::TwoStage { shortlist });
            prop_assert_eq!(hits.len(), k.min(n));
            // In the order of the exact answer, with gaps at most.
            let mut exact = all.iter();
            for hit in &hits {
                prop_assert!(exact.any(|other| other == hit), "{:?}: {:?}", kernel, hit);
            }
        }
    }
}

/// Rows around centres in a space of 12 dimensions.
fn clustered(n: usize) -> Vec<Embedding> {
    const LATENT: usize = 12;
    let direction = |i: usize| vector(384, 10_000 + i as u64);
    let directions: Vec<Embedding> = (0..LATENT).map(direction).collect();
    let row = |i: usize| {
        let (centre, own) = (
            vector(LATENT, i as u64 % 40),
            vector(LATENT, 1_000_000 + i as u64),
        );
        let mut row = vec![0.0_f32; 384];
        for ((centre, own), direction) in centre.0.iter().zip(&*own.0).zip(&directions) {
            for (number, weight) in row.iter_mut().zip(&*direction.0) {
                *number += (centre + own) * weight;
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        Embedding(row.iter().map(|x| x / norm).collect())
    };
    (0..n).map(row).collect()
}

#[test]
fn a_two_stage_scan_finds_nearly_all_of_the_nearest_rows() {
    const ROWS: usize = 8500;
    const QUERIES: usize = 50;
    let vectors = clustered(ROWS + QUERIES);
    let shape = RowShape::new(384);
    let mut slab = Slab::new(shape);
    for (id, row) in vectors[..ROWS].iter().enumerate() {
        slab.extend(&[id as i64], &row.to_f16_bytes());
    }
    let plan = Plan::of(ROWS, 10);
    assert!(matches!(plan, Plan::TwoStage { .. }));
    let mut found = 0;
    for query in &vectors[ROWS..] {
        let query = PreparedQuery::new(shape, &query.0);
        let exact = nearest(Kernel::detect(), &slab, &query, 10, Plan::Exact);
        let hits = nearest(Kernel::detect(), &slab, &query, 10, plan);
        found += hits.iter().filter(|hit| exact.contains(hit)).count();
    }
    // The data are fixed. A near tie depends on the rounding of the machine's kernel.
    assert!(found >= 10 * QUERIES - 5, "{found}");
}

#[test]
fn equal_rows_are_ordered_by_id_wherever_they_lie() {
    let shape = RowShape::new(384);
    let row = vector(384, 5);
    let mut slab = Slab::new(shape);
    for id in (1..=5000).rev() {
        slab.extend(&[id], &row.to_f16_bytes());
    }
    let query = PreparedQuery::new(shape, &row.0);
    for plan in [Plan::Exact, Plan::TwoStage { shortlist: 64 }] {
        let hits = nearest(Kernel::detect(), &slab, &query, 50, plan);
        let ids: Vec<i64> = hits.iter().map(|hit| hit.id).collect();
        assert_eq!(ids, (1..=50).collect::<Vec<i64>>());
    }
}

#[test]
fn scores_stay_within_minus_one_and_one() {
    let shape = RowShape::new(3);
    let mut slab = Slab::new(shape);
    for (id, x) in [2.0, -2.0, f32::NAN, 0.5].into_iter().enumerate() {
        let row = Embedding(Arc::from([x, 0.0, 0.0]));
        slab.extend(&[id as i64], &row.to_f16_bytes());
    }
    let query = PreparedQuery::new(shape, &[1.0, 0.0, 0.0]);
    for kernel in Kernel::available() {
        let hits = nearest(kernel, &slab, &query, 10, Plan::Exact);
        assert_eq!(hits.len(), 4);
        assert!(
            hits.iter().all(|hit| (-1.0..=1.0).contains(&hit.score)),
            "{hits:?}"
        );
        assert_eq!(hits[0].id, 0);
    }
}

#[test]
fn a_full_slab_takes_824_bytes_a_row_and_a_small_one_little_more() {
    let shape = RowShape::new(384);
    let bytes_of = |n: usize| {
        let ids: Vec<i64> = (0..n as i64).collect();
        let mut slab = Slab::new(shape);
        slab.extend(&ids, &vec![0; n * shape.stored_bytes()]);
        slab.bytes()
    };
    assert!(bytes_of(20_480) <= 20_480 * 825, "{}", bytes_of(20_480));
    assert!(bytes_of(50) <= 56 * 824 + 300, "{}", bytes_of(50));
}
