//! The two scans of a slab: exact, and in two stages.
//!
//! The first stage compares every row's sign code, 48 bytes instead of 768, with the query's. The
//! second takes the rows with the nearest codes and scores them by their vectors, in batches. It
//! stops when the codes of the other rows make a better score very unlikely.
//!
//! Rows are ranked by score, equal scores by rising id. So the result does not depend on the order
//! of the rows.

pub mod kernel;
mod slab;
#[cfg(test)]
mod tests;

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::f32::consts::PI;

use self::kernel::{BLOCK_ROWS, Candidate, Kernel, LANES, QueryLine};
pub use self::slab::{RowShape, Slab};
use self::slab::{SEGMENT_ROWS, query_code};

/// A row and its similarity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The row.
    pub id: i64,
    /// Cosine similarity in [-1, 1].
    pub score: f32,
}

/// Rows that a two-stage scan may score. Of a million rows, the nearest 4,096 codes include 0.9997
/// of the true ten best.
const SHORTLIST: usize = 4096;

/// Rows that may be scored per requested hit: the recall of the 100 best needs a longer list than
/// that of the 10 best.
const SHORTLIST_PER_HIT: usize = 64;

/// Smaller slabs are scanned exactly, in about 0.1 ms. From this size on two stages take less than
/// half the time.
const TWO_STAGE_ROWS: usize = 8192;

/// A two-stage scan pays only if there are so many rows for each row that it may score.
const TWO_STAGE_RATIO: usize = 4;

/// Rows scored before the first check whether more can matter.
const BATCH: usize = 512;

/// A row is not scored if its score would have to lie so many standard deviations above the score
/// that its code predicts. Over 300 queries of real texts, the recall of the true ten best is the
/// same as without the rule (1.0 of 10,000 and 100,000 rows, 0.9997 of a million), with a fifth to
/// a third of the scores. With 3 deviations the recall of a million rows falls to 0.998.
const DEVIATIONS: f32 = 3.5;

/// One block of sign codes in so many is sampled before the scan.
const SAMPLE: usize = 32;

/// A query in the forms that the kernels need.
pub struct PreparedQuery {
    lines: Vec<QueryLine>,
    code: Vec<u64>,
}

impl PreparedQuery {
    /// `query`: `[dimension]` numbers of unit length.
    pub fn new(shape: RowShape, query: &[f32]) -> Self {
        let lines = query.chunks(LANES).map(|numbers| {
            let mut line = QueryLine([0.0; LANES]);
            line.0[..numbers.len()].copy_from_slice(numbers);
            line
        });
        Self {
            lines: lines.collect(),
            code: query_code(shape, query),
        }
    }
}

/// How a slab is scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Every row is scored.
    Exact,
    /// The rows with the nearest sign codes are scored, the nearest first, until no other row is
    /// likely to matter.
    TwoStage {
        /// How many rows are considered; rows that tie with the last of them are too.
        shortlist: usize,
    },
}

impl Plan {
    /// The faster way to find the `k` best of `rows` rows.
    pub fn of(rows: usize, k: usize) -> Self {
        let shortlist = SHORTLIST.min(rows / TWO_STAGE_RATIO);
        let shortlist = shortlist.max(k.saturating_mul(SHORTLIST_PER_HIT));
        if rows < TWO_STAGE_ROWS || rows / TWO_STAGE_RATIO < shortlist {
            Self::Exact
        } else {
            Self::TwoStage { shortlist }
        }
    }

    /// About how many bytes the scan of `rows` rows reads, a scattered row counted twice. The
    /// duration of the scan is proportional to it.
    pub fn cost_bytes(self, shape: RowShape, rows: usize) -> usize {
        let row = size_of::<QueryLine>() / 2 * shape.lines;
        match self {
            Self::Exact => rows * row,
            Self::TwoStage { shortlist } => {
                rows * size_of::<u64>() * shape.words + 2 * shortlist * row
            }
        }
    }
}

/// The `k` rows nearest to the query (all if there are fewer), nearest first.
pub fn nearest(
    kernel: Kernel,
    slab: &Slab,
    query: &PreparedQuery,
    k: usize,
    plan: Plan,
) -> Vec<Hit> {
    let mut best = Best::new(k.min(slab.n_rows()));
    if best.k > 0 {
        match plan {
            Plan::Exact => exact(kernel, slab, query, &mut best),
            Plan::TwoStage { shortlist } => two_stage(kernel, slab, query, shortlist, &mut best),
        }
    }
    best.into_hits()
}

fn exact(kernel: Kernel, slab: &Slab, query: &PreparedQuery, best: &mut Best) {
    let mut scores = Vec::new();
    for segment in slab.segments() {
        for (ids, rows) in segment.pieces(slab.shape()) {
            scores.resize(ids.len(), 0.0);
            kernel.scores(&query.lines, rows, &mut scores);
            best.offer_all(ids, &scores);
        }
    }
}

fn two_stage(
    kernel: Kernel,
    slab: &Slab,
    query: &PreparedQuery,
    shortlist: usize,
    best: &mut Best,
) {
    let shortlist = shortlist.max(best.k).min(slab.n_rows());
    let candidates = nearest_codes(kernel, slab, &query.code, shortlist);
    let dimension = slab.shape().dimension;
    let batch = BATCH.max(4 * best.k);
    let mut rows = Vec::with_capacity(batch);
    let mut scores = Vec::with_capacity(batch);
    let mut bias = None;
    let mut rest = &candidates[..];
    while let Some(nearest) = rest.first() {
        if let Some(bias) = bias
            && best.is_beyond(highest_likely_score(nearest.distance, dimension, bias))
        {
            break;
        }
        let (now, later) = rest.split_at(whole_distances(rest, batch));
        rest = later;
        rows.clear();
        rows.extend(now.iter().map(|candidate| slab.row(candidate.row as usize)));
        scores.resize(rows.len(), 0.0);
        kernel.scores_scattered(&query.lines, &rows, &mut scores);
        for (candidate, score) in now.iter().zip(&scores) {
            if best.would_take(*score)
                && let Some(id) = slab.id(candidate.row as usize)
            {
                best.offer(id, *score);
            }
        }
        // The first batch shows how far this query's scores lie from the predicted ones.
        bias.get_or_insert_with(|| {
            let differences = now
                .iter()
                .zip(&scores)
                .map(|(candidate, score)| score - expected_score(candidate.distance, dimension));
            differences.sum::<f32>() / now.len() as f32
        });
    }
}

/// The length of the next batch: `batch`, extended so that candidates of equal distance stay
/// together.
fn whole_distances(candidates: &[Candidate], batch: usize) -> usize {
    let Some(last) = candidates.get(batch.saturating_sub(1)) else {
        return candidates.len();
    };
    candidates.partition_point(|candidate| candidate.distance <= last.distance)
}

/// The cosine of two vectors whose codes differ in `distance` of `dimension` signs, if each sign
/// were that of a random projection: they differ in the share angle / π of them. Source: Goemans
/// and Williamson 1995, lemma 3.2.
fn expected_score(distance: u32, dimension: usize) -> f32 {
    (PI * distance as f32 / dimension as f32).cos()
}

/// A score that hardly any row of that distance exceeds. The number of differing signs is
/// binomially distributed, its share has the deviation `sqrt(p (1 - p) / dimension)`, and the
/// cosine's slope is `π sin(π p)`.
fn highest_likely_score(distance: u32, dimension: usize, bias: f32) -> f32 {
    let p = distance as f32 / dimension as f32;
    let deviation = PI * (PI * p).sin() * (p * (1.0 - p) / dimension as f32).sqrt();
    expected_score(distance, dimension) + bias + DEVIATIONS * deviation
}

/// At least `shortlist` rows (all if there are fewer) with the smallest distances, and all rows
/// that tie with the farthest of them, nearest first. Rows of equal distance keep their order.
pub(super) fn nearest_codes(
    kernel: Kernel,
    slab: &Slab,
    code: &[u64],
    shortlist: usize,
) -> Vec<Candidate> {
    let mut limit = likely_limit(kernel, slab, code, shortlist);
    let mut found = Vec::with_capacity(2 * shortlist);
    loop {
        for (index, segment) in slab.segments().enumerate() {
            let first_row = (index * SEGMENT_ROWS) as u32;
            let n_rows = segment.ids().len();
            kernel.near(code, segment.codes(), first_row, n_rows, limit, &mut found);
        }
        if found.len() >= shortlist {
            return nearest_of(&found, shortlist);
        }
        // The sample was not representative, which is rare. Each round finds several times as many
        // rows.
        limit += limit / 16 + 1;
        found.clear();
    }
}

/// A distance within which there are most likely `shortlist` rows, and not many more, estimated
/// from a sample of the blocks. It is faster to keep only near rows than to keep every distance: of
/// a million rows, 1 in 200 is kept.
fn likely_limit(kernel: Kernel, slab: &Slab, code: &[u64], shortlist: usize) -> u32 {
    let mut sample = Vec::new();
    for segment in slab.segments() {
        let blocks = segment.codes().chunks_exact(code.len());
        let n_rows = segment.ids().len();
        for (block, codes) in blocks.enumerate().step_by(SAMPLE) {
            let n = n_rows.saturating_sub(block * BLOCK_ROWS).min(BLOCK_ROWS);
            kernel.near(code, codes, 0, n, u32::MAX, &mut sample);
        }
    }
    let expected = shortlist as f64 * sample.len() as f64 / slab.n_rows().max(1) as f64;
    // Three standard deviations more, so that one pass suffices.
    let wanted = expected + 3.0 * expected.sqrt() + 1.0;
    distance_of(&counts(&sample), wanted as usize)
}

/// The candidates up to the distance of the `shortlist`-th nearest, nearest first. A counting sort,
/// which takes a tenth of the time of a comparing sort.
fn nearest_of(candidates: &[Candidate], shortlist: usize) -> Vec<Candidate> {
    let mut places = counts(candidates);
    let limit = distance_of(&places, shortlist);
    let mut total = 0;
    for place in &mut places {
        total += std::mem::replace(place, total);
    }
    let kept = places.get(limit as usize + 1).copied().unwrap_or(total);
    let mut sorted = vec![
        Candidate {
            row: 0,
            distance: 0
        };
        kept
    ];
    for candidate in candidates
        .iter()
        .filter(|candidate| candidate.distance <= limit)
    {
        let place = &mut places[candidate.distance as usize];
        sorted[*place] = *candidate;
        *place += 1;
    }
    sorted
}

/// How many candidates there are of each distance, from 0 to the greatest.
fn counts(candidates: &[Candidate]) -> Vec<usize> {
    let farthest = candidates.iter().map(|candidate| candidate.distance).max();
    let mut counts = vec![0; farthest.map_or(0, |distance| distance as usize + 1)];
    for candidate in candidates {
        counts[candidate.distance as usize] += 1;
    }
    counts
}

/// The `rank`-th smallest distance, counted from 1; the greatest if there are fewer.
fn distance_of(counts: &[usize], rank: usize) -> u32 {
    let mut within = 0;
    let reached = counts.iter().position(|count| {
        within += count;
        within >= rank
    });
    reached.unwrap_or(counts.len().saturating_sub(1)) as u32
}

impl Eq for Hit {}

/// The better hit is greater.
impl Ord for Hit {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then_with(|| other.id.cmp(&self.id))
    }
}

impl PartialOrd for Hit {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The best `k` rows seen so far.
struct Best {
    k: usize,
    /// The worst of them on top.
    heap: BinaryHeap<Reverse<Hit>>,
    /// A score below this is not among the best. At an equal score the ids decide.
    floor: f32,
}

impl Best {
    fn new(k: usize) -> Self {
        Self {
            k,
            heap: BinaryHeap::with_capacity(k),
            floor: f32::NEG_INFINITY,
        }
    }

    fn offer_all(&mut self, ids: &[i64], scores: &[f32]) {
        for (id, score) in ids.iter().zip(scores) {
            if self.would_take(*score) {
                self.offer(*id, *score);
            }
        }
    }

    /// False is certain; true is not. A score that is not a number passes, and `offer` decides.
    fn would_take(&self, score: f32) -> bool {
        score >= self.floor || score.is_nan()
    }

    /// Whether `k` rows are known and all of them score more than this.
    fn is_beyond(&self, score: f32) -> bool {
        score < self.floor
    }

    fn offer(&mut self, id: i64, score: f32) {
        // Rounding can make the product of two unit vectors greater than 1. A row that is not a
        // number is near to nothing.
        let score = if score.is_nan() {
            -1.0
        } else {
            score.clamp(-1.0, 1.0) + 0.0
        };
        let hit = Hit { id, score };
        if self.heap.len() < self.k {
            self.heap.push(Reverse(hit));
        } else if let Some(mut worst) = self.heap.peek_mut()
            && hit > worst.0
        {
            worst.0 = hit;
        }
        if self.heap.len() == self.k
            && let Some(worst) = self.heap.peek()
        {
            self.floor = worst.0.score;
        }
    }

    fn into_hits(self) -> Vec<Hit> {
        let hits = self.heap.into_sorted_vec().into_iter();
        hits.map(|Reverse(hit)| hit).collect()
    }
}
