//! The vectors of the benchmark: made up, or read from a file.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use async_trait::async_trait;
use half::f16;
use prompt_service::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use prompt_service::store::{
    Access, Claim, Coverage, DeletedPrompt, Error, PromptPage, PromptStore, PromptsRead, Stats,
    Unembedded, VectorCursor, VectorPage,
};

pub const DIMENSION: usize = 384;

/// Numbers from which a made-up vector follows. This and the two below are chosen so that 100,000
/// vectors have a local intrinsic dimension of 25 and a mean cosine to the 10th neighbour of 0.6.
/// Sentence embeddings of short English texts were found to have dimensions from 16 to 27 and
/// cosines from 0.58 to 0.71, so this is nearer to the hard end. They remain made up: trust
/// latencies and ratios, and take recall as an indication.
const LATENT: usize = 48;

/// Made-up vectors come in as many topics; a topic's share falls with its rank.
const TOPICS: usize = 2_000;

/// Width of the map from latent numbers to vectors.
const HIDDEN: usize = 96;

pub struct Vectors {
    pub queries: Vec<Embedding>,
    /// `[n][DIMENSION]`.
    pub rows: Vec<f32>,
}

/// The id of row `at`.
pub fn id(at: usize) -> PromptId {
    PromptId(at as i64 + 1)
}

impl Vectors {
    /// Reads `n_queries` queries and `n_rows` rows after them: little-endian f32, `[n][384]`, each
    /// of unit length.
    pub fn read(file: &str, n_queries: usize, n_rows: usize) -> Result<Self> {
        let mut file = std::fs::File::open(file).context("the file of vectors")?;
        let mut numbers = |n: usize| -> Result<Vec<f32>> {
            let mut numbers = Vec::with_capacity(n * DIMENSION);
            let mut bytes = vec![0; 4 * DIMENSION];
            for _ in 0..n {
                file.read_exact(&mut bytes)?;
                let row = bytes.as_chunks::<4>().0;
                numbers.extend(row.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
            Ok(numbers)
        };
        // The file has 1,000 queries, whatever number is asked for.
        let queries = numbers(1_000)?;
        Ok(Self {
            queries: embeddings(&queries[..n_queries * DIMENSION]),
            rows: numbers(n_rows)?,
        })
    }

    /// Vectors that depend on nothing but their number: a point near a topic's centre in a space of
    /// few dimensions, bent into the space of embeddings by a fixed random map. Queries are made
    /// like rows.
    pub fn synthetic(n_queries: usize, n_rows: usize) -> Self {
        let map = Map::new();
        let total = n_queries + n_rows;
        let mut numbers = vec![0.0_f32; total * DIMENSION];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = total.div_ceil(threads);
        std::thread::scope(|scope| {
            for (thread, part) in numbers.chunks_mut(share * DIMENSION).enumerate() {
                let map = &map;
                scope.spawn(move || {
                    for (i, row) in part.chunks_exact_mut(DIMENSION).enumerate() {
                        map.fill((thread * share + i) as u64, row);
                    }
                });
            }
        });
        let rows = numbers.split_off(n_queries * DIMENSION);
        Self {
            queries: embeddings(&numbers),
            rows,
        }
    }

    /// The stored form of some rows.
    pub fn stored(&self, rows: Range<usize>) -> Vec<u8> {
        let numbers = &self.rows[rows.start * DIMENSION..rows.end * DIMENSION];
        let mut stored = Vec::with_capacity(2 * numbers.len());
        for number in numbers {
            stored.extend(f16::from_f32(*number).to_le_bytes());
        }
        stored
    }

    /// The `k` rows nearest to each query among the first `n`, by exact f32 arithmetic.
    pub fn truth(&self, n: usize, k: usize) -> Vec<Vec<u32>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = self.queries.len().div_ceil(threads);
        std::thread::scope(|scope| {
            let parts: Vec<_> = self
                .queries
                .chunks(share)
                .map(|queries| scope.spawn(move || self.truth_of(queries, n, k)))
                .collect();
            let joined = parts.into_iter().flat_map(|part| part.join());
            joined.flatten().collect()
        })
    }

    /// The mean cosine of the 10th neighbour among the first `n` rows, and the median over the
    /// queries of the local intrinsic dimension by the 100 nearest. Source: Levina and Bickel 2004,
    /// "Maximum likelihood estimation of intrinsic dimension".
    pub fn profile(&self, n: usize) -> (f64, f64) {
        let neighbours = self.truth(n, 100);
        let (mut cosines, mut dimensions) = (0.0, Vec::new());
        for (query, rows) in self.queries.iter().zip(&neighbours) {
            let cosine = |row: u32| {
                let start = row as usize * DIMENSION;
                f64::from(dot(&query.0, &self.rows[start..start + DIMENSION]))
            };
            cosines += cosine(rows[9]);
            let distances = rows
                .iter()
                .map(|row| (2.0 - 2.0 * cosine(*row)).max(1e-9).sqrt());
            let distances: Vec<f64> = distances.collect();
            let farthest = distances[distances.len() - 1];
            let logs = distances.iter().map(|distance| (farthest / distance).ln());
            dimensions.push((distances.len() - 1) as f64 / logs.sum::<f64>());
        }
        dimensions.sort_by(f64::total_cmp);
        (
            cosines / self.queries.len() as f64,
            dimensions[dimensions.len() / 2],
        )
    }

    fn truth_of(&self, queries: &[Embedding], n: usize, k: usize) -> Vec<Vec<u32>> {
        let mut best: Vec<Vec<(f32, u32)>> = vec![Vec::new(); queries.len()];
        // Rows that fit a core's cache are compared with all queries before the next are read.
        const BLOCK: usize = 256;
        let blocks = self.rows[..n * DIMENSION].chunks(BLOCK * DIMENSION);
        for (block, rows) in blocks.enumerate() {
            for (query, best) in queries.iter().zip(&mut best) {
                for (i, row) in rows.chunks_exact(DIMENSION).enumerate() {
                    let score = dot(&query.0, row);
                    if best.len() < k || score > best[k - 1].0 {
                        let at = best.partition_point(|(other, _)| *other >= score);
                        best.insert(at, (score, (block * BLOCK + i) as u32));
                        best.truncate(k);
                    }
                }
            }
        }
        let rows = |best: Vec<(f32, u32)>| best.into_iter().map(|(_, row)| row).collect();
        best.into_iter().map(rows).collect()
    }
}

fn embeddings(numbers: &[f32]) -> Vec<Embedding> {
    let rows = numbers.chunks_exact(DIMENSION);
    rows.map(|row| Embedding(Arc::from(row))).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 32];
    for (a, b) in a.chunks_exact(32).zip(b.chunks_exact(32)) {
        for lane in 0..32 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum()
}

/// The fixed random map, and the topics' centres.
struct Map {
    centres: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    mean: Vec<f32>,
}

impl Map {
    fn new() -> Self {
        let mut random = Random(0x5eed);
        let mut numbers = |n: usize, scale: f32| -> Vec<f32> {
            (0..n).map(|_| random.normal() * scale).collect()
        };
        Self {
            centres: numbers(TOPICS * LATENT, 1.0),
            first: numbers(HIDDEN * LATENT, (1.0 / LATENT as f32).sqrt()),
            second: numbers(HIDDEN * DIMENSION, 1.0),
            // Real embeddings have a mean that is not zero: two random ones have a cosine of about
            // 0.08.
            mean: numbers(DIMENSION, 2.0),
        }
    }

    fn fill(&self, number: u64, row: &mut [f32]) {
        let mut random = Random(number.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0xda7a);
        let topic = (random.uniform().powi(3) * TOPICS as f32) as usize % TOPICS;
        let mut latent = [0.0_f32; LATENT];
        for (number, centre) in latent.iter_mut().zip(&self.centres[topic * LATENT..]) {
            *number = centre + 1.3 * random.normal();
        }
        row.copy_from_slice(&self.mean);
        for (first, second) in self
            .first
            .chunks_exact(LATENT)
            .zip(self.second.chunks_exact(DIMENSION))
        {
            let sum: f32 = first.iter().zip(&latent).map(|(a, b)| a * b).sum();
            let bent = (1.5 * sum).clamp(-1.5, 1.5);
            for (number, weight) in row.iter_mut().zip(second) {
                *number += bent * weight;
            }
        }
        let norm = dot(row, row).sqrt();
        row.iter_mut().for_each(|number| *number /= norm);
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1).
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 41) as f32 + 0.5) / (1_u64 << 23) as f32
    }

    /// Normal with variance 1, by Box and Muller.
    fn normal(&mut self) -> f32 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }
}

/// Which rows belong to which owner: each owner's lie in one run.
struct Runs {
    rows: usize,
    owners: usize,
}

impl Runs {
    fn first_of(&self, owner: i64) -> usize {
        ((owner - 1) as usize * self.rows).div_ceil(self.owners)
    }

    /// The requested page of ids, and their rows.
    fn page(
        &self,
        owner: Option<UserId>,
        after: Option<(UserId, PromptId)>,
        limit: usize,
    ) -> (Vec<(UserId, PromptId)>, Range<usize>) {
        let begin = owner.map_or(0, |owner| self.first_of(owner.0));
        let end = owner.map_or(self.rows, |owner| self.first_of(owner.0 + 1));
        // A row's id is its number plus one: the one after a cursor begins where the cursor's id
        // says.
        let begin = after.map_or(begin, |(_, id)| id.0 as usize);
        let rows = begin..end.min(begin + limit);
        let owner = |row| UserId((row * self.owners / self.rows) as i64 + 1);
        (
            rows.clone().map(|row| (owner(row), id(row))).collect(),
            rows,
        )
    }
}

/// Rows spread over owners.
pub struct Rows {
    pub n: usize,
    pub owners: usize,
    /// Whose first `n` they are. Without them, all vectors have the same numbers.
    pub vectors: Option<Arc<Vectors>>,
}

#[async_trait]
impl PromptStore for Rows {
    async fn vectors(
        &self,
        _: &ModelId,
        owner: Option<UserId>,
        after: Option<VectorCursor>,
        limit: usize,
    ) -> Result<VectorPage, Error> {
        let runs = Runs {
            rows: self.n,
            owners: self.owners,
        };
        let (ids, rows) = runs.page(owner, after, limit);
        let f16_bytes = match &self.vectors {
            Some(vectors) => vectors.stored(rows),
            None => vec![0x21; rows.len() * 2 * DIMENSION],
        };
        Ok(VectorPage { ids, f16_bytes })
    }

    async fn has_room(&self, _: UserId, _: u32) -> Result<bool, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn prompt(&self, _: UserId, _: PromptId) -> Result<Option<Prompt>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn list_prompts(
        &self,
        _: UserId,
        _: Option<PromptId>,
        _: usize,
        _: usize,
    ) -> Result<PromptPage, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn prompts(
        &self,
        _: Option<UserId>,
        _: &[PromptId],
        _: usize,
    ) -> Result<PromptsRead, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn delete_prompt(&self, _: UserId, _: PromptId) -> Result<Option<DeletedPrompt>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn coverage(&self, _: &ModelId, _: Option<UserId>) -> Result<Coverage, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn unembedded(
        &self,
        _: &ModelId,
        _: Option<PromptId>,
        _: usize,
    ) -> Result<Vec<Unembedded>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn put_embeddings(
        &self,
        _: &ModelId,
        _: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn claim_reembedding(&self) -> Result<Option<Claim>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn ping(&self) -> Result<Access, Error> {
        unreachable!("an index only reads vectors")
    }

    fn stats(&self) -> Stats {
        unreachable!("an index only reads vectors")
    }
}
