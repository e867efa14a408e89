//! Similarity search compared with exact arithmetic, the memory's speed and, on request, FAISS in
//! the same run.
//!
//! `cargo bench --bench search -- [--short] [--faiss PYTHON] [--vectors FILE]`; `benches/search.sh`
//! sets up the Python. Latencies are those of [`Similarity::nearest`] on one thread, the hand-over
//! to a blocking thread included.
#![expect(clippy::print_stdout, reason = "a benchmark prints its tables")]

#[path = "search/data.rs"]
mod data;
#[path = "search/faiss.rs"]
mod faiss;
#[path = "search/memory.rs"]
mod memory;

use std::collections::HashSet;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use prompt_service::config::SimilarScope;
use prompt_service::domain::{Embedding, ModelId, PromptId, UserId};
use prompt_service::search::{Similarity, SlabIndex, SlabOptions};
use prompt_service_engine::scan::kernel::Kernel;
use prompt_service_engine::scan::{self, Plan, PreparedQuery, RowShape, Slab};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use data::{DIMENSION, Rows, Vectors};

const K: usize = 10;
/// The user who searches.
const USER: UserId = UserId(1);

struct Arguments {
    short: bool,
    faiss: Option<String>,
    vectors: Option<String>,
}

fn main() -> Result<()> {
    let mut arguments = Arguments {
        short: false,
        faiss: None,
        vectors: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--short" => arguments.short = true,
            "--faiss" => arguments.faiss = words.next(),
            "--vectors" => arguments.vectors = words.next(),
            "--memory" => return memory::print_of_child(words),
            // Cargo's own.
            "--bench" => {}
            other => anyhow::bail!("unknown argument {other}"),
        }
    }
    let sizes: &[usize] = if arguments.short {
        &[1_000, 10_000, 100_000]
    } else {
        &[1_000, 10_000, 100_000, 1_000_000]
    };
    let most = sizes.iter().copied().max().context("there are sizes")?;
    let n_queries = if arguments.short { 200 } else { 1_000 };
    let vectors = match &arguments.vectors {
        Some(file) => Vectors::read(file, n_queries, most)?,
        None => Vectors::synthetic(n_queries, most),
    };
    let vectors = Arc::new(vectors);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let faiss = arguments.faiss.as_deref();
    let faiss = faiss
        .map(|python| faiss::Faiss::start(python, &vectors))
        .transpose()?;

    let bandwidth = memory_bandwidth();
    println!(
        "{} queries, k = {K}, kernel {}; memory read by one thread: {:.1} GB/s",
        n_queries,
        Kernel::detect().name(),
        bandwidth / 1e9
    );
    let (cosine, dimension) = vectors.profile(most.min(100_000));
    println!(
        "up to 100,000 rows: mean cosine of the 10th neighbour {cosine:.3}, local intrinsic dimension {dimension:.1}"
    );
    sizes_table(&vectors, sizes, faiss.as_ref(), bandwidth, &runtime)?;
    memory::table(most)?;
    kernels_table(&vectors, &runtime)?;
    plans_table(&vectors);
    owners_table(&vectors, most, &runtime)?;
    changes_table(&vectors, sizes, &runtime)
}

/// Bytes a second that one thread reads from memory: the best of several sweeps over 512 MiB.
fn memory_bandwidth() -> f64 {
    let words = vec![1_u64; 64 << 20];
    let sweep = || {
        let begun = Instant::now();
        let mut sums = [0_u64; 16];
        for chunk in black_box(&words).chunks_exact(16) {
            for (sum, word) in sums.iter_mut().zip(chunk) {
                *sum += word;
            }
        }
        black_box(sums);
        (words.len() * 8) as f64 / begun.elapsed().as_secs_f64()
    };
    (0..7).map(|_| sweep()).fold(0.0, f64::max)
}

fn options(scope: SimilarScope, kernel: Kernel) -> SlabOptions {
    SlabOptions {
        dimension: DIMENSION,
        scope,
        memory_bytes: usize::MAX,
        concurrent_scans: 2,
        load_wait: Duration::from_secs(1),
        kernel,
    }
}

fn index(
    vectors: &Arc<Vectors>,
    n: usize,
    owners: usize,
    scope: SimilarScope,
    kernel: Kernel,
) -> SlabIndex {
    let rows = Rows {
        n,
        owners,
        vectors: Some(Arc::clone(vectors)),
    };
    SlabIndex::new(
        options(scope, kernel),
        Arc::new(rows),
        ModelId(Arc::from("a model")),
        TaskTracker::new(),
        CancellationToken::new(),
    )
}

/// p50 and p99 of a sample, in milliseconds.
struct Latency {
    p50: f64,
    p99: f64,
}

impl Latency {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share) as usize] * 1e3;
        Self {
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

/// Searches with every query, with a tenth of them first to warm up.
fn ask(
    index: &SlabIndex,
    queries: &[Embedding],
    runtime: &Runtime,
) -> Result<(Latency, Vec<Vec<i64>>)> {
    runtime.block_on(async {
        for query in &queries[..queries.len() / 10] {
            index.nearest(USER, query, K).await?;
        }
        let (mut seconds, mut answers) = (Vec::new(), Vec::new());
        for query in queries {
            let begun = Instant::now();
            let hits = index.nearest(USER, query, K).await?;
            seconds.push(begun.elapsed().as_secs_f64());
            answers.push(hits.iter().map(|hit| hit.id.0).collect());
        }
        Ok((Latency::of(seconds), answers))
    })
}

/// The share of the truly nearest rows whose ids were found.
fn recall(truth: &[Vec<u32>], answers: &[Vec<i64>]) -> f64 {
    let found: usize = truth
        .iter()
        .zip(answers)
        .map(|(truth, ids)| {
            let truth: HashSet<i64> = truth.iter().map(|row| data::id(*row as usize).0).collect();
            ids.iter().filter(|id| truth.contains(id)).count()
        })
        .sum();
    found as f64 / truth.iter().map(Vec::len).sum::<usize>() as f64
}

/// Bytes every scan of `n` rows reads, whatever the query: the vectors, or in two stages the sign
/// codes.
fn bytes_read(n: usize) -> usize {
    let shape = RowShape::new(DIMENSION);
    match Plan::of(n, K) {
        Plan::Exact => n * shape.stored_bytes(),
        Plan::TwoStage { .. } => n * shape.words * 8,
    }
}

fn sizes_table(
    vectors: &Arc<Vectors>,
    sizes: &[usize],
    faiss: Option<&faiss::Faiss>,
    bandwidth: f64,
    runtime: &Runtime,
) -> Result<()> {
    println!(
        "\n| rows | scope | p50 ms | p99 ms | recall@10 | of the memory's speed | B/row | load ms | FAISS FlatIP p50 ms | p99 ms | recall | times faster |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for &n in sizes {
        let truth = vectors.truth(n, K);
        for scope in [SimilarScope::Own, SimilarScope::Shared] {
            let owners = match scope {
                SimilarScope::Own => 1,
                SimilarScope::Shared => 1_000,
            };
            let index = index(vectors, n, owners, scope, Kernel::detect());
            let begun = Instant::now();
            runtime.block_on(index.load_all())?;
            runtime.block_on(index.nearest(USER, &vectors.queries[0], 1))?;
            let load_ms = begun.elapsed().as_secs_f64() * 1e3;
            let (latency, answers) = ask(&index, &vectors.queries, runtime)?;
            let share = bytes_read(n) as f64 / (latency.p50 / 1e3) / bandwidth;
            let peer = match faiss {
                Some(faiss) => {
                    let peer = faiss.measure(n, K, &truth)?;
                    let times = peer.latency.p50 / latency.p50;
                    format!(
                        "{:.3} | {:.3} | {:.4} | {times:.1}",
                        peer.latency.p50, peer.latency.p99, peer.recall
                    )
                }
                None => "– | – | – | –".to_owned(),
            };
            println!(
                "| {n} | {scope:?} | {:.4} | {:.4} | {:.4} | {:.0} % | {:.0} | {load_ms:.1} | {peer} |",
                latency.p50,
                latency.p99,
                recall(&truth, &answers),
                share * 100.0,
                index.status().bytes as f64 / n as f64,
            );
        }
    }
    Ok(())
}

fn kernels_table(vectors: &Arc<Vectors>, runtime: &Runtime) -> Result<()> {
    println!("\n| kernel | 10,000 rows p50 ms | 100,000 rows p50 ms |\n|---|---|---|");
    let queries = &vectors.queries[..100];
    for kernel in Kernel::available() {
        let p50 = |n| -> Result<f64> {
            let index = index(vectors, n, 1, SimilarScope::Own, kernel);
            Ok(ask(&index, queries, runtime)?.0.p50)
        };
        println!(
            "| {} | {:.3} | {:.3} |",
            kernel.name(),
            p50(10_000)?,
            p50(100_000)?
        );
    }
    Ok(())
}

/// Both plans on the same slabs, to see from which size the second one is faster.
fn plans_table(vectors: &Vectors) {
    println!(
        "\n| rows | exact p50 ms | recall@10 | shortlist | two-stage p50 ms | recall@10 |\n|---|---|---|---|---|---|"
    );
    let shape = RowShape::new(DIMENSION);
    for n in [2_000, 4_000, 8_000, 16_000, 32_000, 64_000] {
        let ids: Vec<i64> = (0..n).map(|row| data::id(row).0).collect();
        let mut slab = Slab::new(shape);
        slab.extend(&ids, &vectors.stored(0..n));
        let queries = &vectors.queries[..200];
        let truth = vectors.truth(n, K);
        let run = |plan| {
            let (mut seconds, mut answers) = (Vec::new(), Vec::new());
            for query in queries.iter().chain(queries) {
                let begun = Instant::now();
                let query = PreparedQuery::new(shape, &query.0);
                let hits = scan::nearest(Kernel::detect(), &slab, &query, K, plan);
                seconds.push(begun.elapsed().as_secs_f64());
                answers.push(hits.iter().map(|hit| hit.id).collect());
            }
            let warm = seconds.split_off(queries.len());
            (
                Latency::of(warm).p50,
                recall(&truth[..queries.len()], &answers[..queries.len()]),
            )
        };
        let exact = run(Plan::Exact);
        for shortlist in [512, 1024, 2048, 4096]
            .into_iter()
            .filter(|shortlist| *shortlist < n)
        {
            let staged = run(Plan::TwoStage { shortlist });
            println!(
                "| {n} | {:.4} | {:.4} | {shortlist} | {:.4} | {:.4} |",
                exact.0, exact.1, staged.0, staged.1
            );
        }
    }
}

/// Many small owners: in shared scope their rows lie in one slab, in own scope each has one.
fn owners_table(vectors: &Arc<Vectors>, most: usize, runtime: &Runtime) -> Result<()> {
    const ROWS: usize = 50;
    let owners = most / ROWS;
    println!("\n| {owners} owners x {ROWS} rows | p50 ms | p99 ms | B/row |\n|---|---|---|---|");
    let shared = index(
        vectors,
        most,
        owners,
        SimilarScope::Shared,
        Kernel::detect(),
    );
    runtime.block_on(shared.load_all())?;
    let (latency, _) = ask(&shared, &vectors.queries, runtime)?;
    let bytes = shared.status().bytes as usize / most;
    println!(
        "| shared | {:.4} | {:.4} | {bytes} |",
        latency.p50, latency.p99
    );
    drop(shared);

    let own = index(vectors, most, owners, SimilarScope::Own, Kernel::detect());
    let mut measured = [Vec::new(), Vec::new()];
    for seconds in &mut measured {
        for owner in 0..owners {
            let query = &vectors.queries[owner % vectors.queries.len()];
            let begun = Instant::now();
            let hits = runtime.block_on(own.nearest(UserId(owner as i64 + 1), query, K))?;
            seconds.push(begun.elapsed().as_secs_f64());
            anyhow::ensure!(
                hits.len() == K,
                "an owner with {ROWS} rows got {}",
                hits.len()
            );
        }
    }
    let bytes = own.status().bytes as usize / most;
    for (name, seconds) in ["own, first search (loads)", "own, every slab in memory"]
        .into_iter()
        .zip(measured)
    {
        let latency = Latency::of(seconds);
        println!(
            "| {name} | {:.4} | {:.4} | {bytes} |",
            latency.p50, latency.p99
        );
    }
    Ok(())
}

/// What an insertion and a deletion cost beside the commit, with and without scans that hold the
/// slab.
fn changes_table(vectors: &Arc<Vectors>, sizes: &[usize], runtime: &Runtime) -> Result<()> {
    println!(
        "\n| rows | scans meanwhile | insert p50 µs | p99 | max | delete p50 µs | p99 | max |\n|---|---|---|---|---|---|---|---|"
    );
    const CHANGES: usize = 2_000;
    for &n in sizes {
        let index = index(vectors, n, 1, SimilarScope::Shared, Kernel::detect());
        runtime.block_on(index.load_all())?;
        for scans in [false, true] {
            let done = AtomicBool::new(false);
            let (inserts, deletes) = std::thread::scope(|threads| {
                if scans {
                    threads.spawn(|| {
                        while !done.load(Relaxed) {
                            // An error would show in the table of sizes.
                            let _ = runtime.block_on(index.nearest(USER, &vectors.queries[0], K));
                        }
                    });
                }
                let id = |i: usize| PromptId(i64::MAX / 2 + i as i64);
                let timed = |change: &dyn Fn(usize)| {
                    let time = |i| {
                        let begun = Instant::now();
                        change(i);
                        begun.elapsed().as_secs_f64()
                    };
                    let mut micros: Vec<f64> = (0..CHANGES).map(|i| time(i) * 1e6).collect();
                    micros.sort_by(f64::total_cmp);
                    [
                        micros[CHANGES / 2],
                        micros[CHANGES * 99 / 100],
                        micros[CHANGES - 1],
                    ]
                };
                let first = if scans { CHANGES } else { 0 };
                let inserts = timed(&|i| {
                    index.inserted(
                        UserId(1),
                        id(first + i),
                        &vectors.queries[i % vectors.queries.len()],
                    );
                });
                // Old rows, scattered: each has to be looked for.
                let deletes = timed(&|i| {
                    index.deleted(UserId(1), data::id((first / 5 + i * 7919) % n));
                });
                done.store(true, Relaxed);
                (inserts, deletes)
            });
            println!(
                "| {n} | {} | {:.1} | {:.0} | {:.0} | {:.1} | {:.0} | {:.0} |",
                if scans { "yes" } else { "no" },
                inserts[0],
                inserts[1],
                inserts[2],
                deletes[0],
                deletes[1],
                deletes[2],
            );
        }
    }
    Ok(())
}
