//! The embedding engine alone, on one thread: latency by length, throughput of batches, and the
//! share of what the core can do at most.
//!
//! `cargo bench --bench engine` prints the table; `-- all` does so for every kernel. With `--
//! serve` it times batches that `benches/engine_onnx.py` sends, which alternates with ONNX Runtime
//! so that both see the same machine. `-- texts FILE SECONDS` embeds the lines of a file on all
//! cores, tokenizer included: what a service around the engine could reach at most.
#![expect(clippy::print_stdout, reason = "a bench prints its table")]

mod peak;

use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use prompt_service::embed::{Encode, Engine, Kernel, Model, Scratch};

/// Texts in a batch.
const BATCH: usize = 32;

fn main() -> anyhow::Result<()> {
    let mode = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    match mode.as_deref() {
        Some("serve") => serve(),
        Some("texts") => texts_per_second(),
        Some("all") => Kernel::available().into_iter().try_for_each(table),
        _ => table(Kernel::fastest()),
    }
}

/// Embeds the lines of a file, in turn and one by one, on a thread a core for some seconds.
fn texts_per_second() -> anyhow::Result<()> {
    let mut arguments = std::env::args()
        .skip_while(|argument| argument != "texts")
        .skip(1);
    let file = arguments.next().context("which file?")?;
    let time = Duration::from_secs_f64(arguments.next().context("how many seconds?")?.parse()?);
    let text = std::fs::read_to_string(file)?;
    let lines: Vec<&str> = text.lines().collect();
    let engine = Engine::bundled()?;
    let cores = std::thread::available_parallelism()?.get();
    let start = Instant::now();
    let run = |first: usize| {
        let mut scratch = engine.scratch();
        let mut done = 0_u64;
        for line in lines.iter().cycle().skip(first) {
            if start.elapsed() >= time {
                break;
            }
            let ids = engine.tokenize(line);
            std::hint::black_box(engine.embed(&[&ids], &mut scratch));
            done += 1;
        }
        done
    };
    let done: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores)
            .map(|core| {
                scope.spawn({
                    let run = &run;
                    let lines = &lines;
                    move || run(core * lines.len() / cores)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_default())
            .sum()
    });
    println!(
        "RESULT engine texts_per_second={:.1} threads={cores}",
        done as f64 / start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Operations of a forward pass over texts of these lengths: (bytes in linear layers, floats in
/// attention).
fn operations(texts: &[Vec<u32>]) -> (f64, f64) {
    // Six layers of 384 wide: query, key, value, output, and two of 1536; attention multiplies
    // twice, over 384 in all.
    let linear = 6 * 2 * (4 * 384 * 384 + 2 * 384 * 1536);
    let attention = 6 * 2 * 2 * 384;
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let pairs: usize = texts.iter().map(|text| text.len() * text.len()).sum();
    ((linear * tokens) as f64, (attention * pairs) as f64)
}

/// `count` texts of `length` tokens, all different.
fn texts(count: usize, length: usize) -> Vec<Vec<u32>> {
    let id = |text: usize, at: usize| 1000 + ((text * length + at) * 7919 % 28_000) as u32;
    let text = |text| {
        std::iter::once(101)
            .chain((0..length - 2).map(|at| id(text, at)))
            .chain([102])
            .collect()
    };
    (0..count).map(text).collect()
}

fn table(kernel: Kernel) -> anyhow::Result<()> {
    let start = Instant::now();
    let model = Model::bundled()?.with_kernel(kernel);
    let loaded = start.elapsed();
    println!(
        "{} on {}, loaded in {:.2} ms",
        model.id(),
        kernel.name(),
        loaded.as_secs_f64() * 1e3
    );
    println!(
        "{:>9} {:>10} {:>10} {:>9} {:>10} {:>9} {:>9} {:>6}",
        "tokens", "p50 ms", "p99 ms", "texts/s", "limit ms", "int8 G/s", "f32 G/s", "share"
    );
    let linear_bytes = vec![1_u64; 6 * (4 * 384 * 384 + 2 * 384 * 1536) / 8];
    for (count, length) in [
        (1, 8),
        (1, 32),
        (1, 128),
        (1, 256),
        (BATCH, 8),
        (BATCH, 32),
        (BATCH, 128),
        (BATCH, 256),
    ] {
        let texts = texts(count, length);
        let (times, peaks) = alternate(&model, &texts, Duration::from_secs(1));
        let p50 = median(&times);
        let p99 = percentile(&times, 0.99);
        print!(
            "{:>9} {:>10.3} {:>10.3} {:>9.0}",
            format!("{count}x{length}"),
            p50 * 1e3,
            p99 * 1e3,
            count as f64 / p50
        );
        let int8 = median(&peaks.iter().map(|peak| peak.int8).collect::<Vec<_>>());
        let float = median(&peaks.iter().map(|peak| peak.float).collect::<Vec<_>>());
        if int8 > 0.0 {
            let (linear, attention) = operations(&texts);
            // All weights of the layers must be read at least once.
            let reading = linear_bytes.len() as f64 * 8.0 / peak::read_rate(&linear_bytes);
            let limit = (linear / int8).max(reading) + attention / float;
            print!(
                " {:>10.3} {:>9.0} {:>9.0} {:>5.0}%",
                limit * 1e3,
                int8 / 1e9,
                float / 1e9,
                100.0 * limit / p50
            );
        }
        println!();
    }
    Ok(())
}

/// Times of the engine, and peaks measured in between: both suffer alike from whatever else the
/// machine does.
fn alternate(model: &Model, texts: &[Vec<u32>], time: Duration) -> (Vec<f64>, Vec<peak::Peak>) {
    let batch: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let mut scratch = Scratch::default();
    model.embed(&batch, &mut scratch);
    let (mut times, mut peaks) = (Vec::new(), Vec::new());
    let start = Instant::now();
    let mut last_peak = start;
    while start.elapsed() < time || times.len() < 10 {
        let call = Instant::now();
        std::hint::black_box(model.embed(&batch, &mut scratch));
        times.push(call.elapsed().as_secs_f64());
        if last_peak.elapsed() > Duration::from_millis(20) {
            peaks.extend(peak::measure(model.kernel()));
            last_peak = Instant::now();
        }
    }
    (times, peaks)
}

fn percentile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0.0)
}

fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// Reads batches, one JSON array of arrays of ids a line. Writes for each the median seconds of a
/// call, over a tenth of a second of calls.
fn serve() -> anyhow::Result<()> {
    let model = Model::bundled()?;
    let mut scratch = Scratch::default();
    for line in std::io::stdin().lock().lines() {
        let texts: Vec<Vec<u32>> = serde_json::from_str(&line?)?;
        let batch: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        model.embed(&batch, &mut scratch);
        let mut times = Vec::new();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) || times.len() < 3 {
            let call = Instant::now();
            std::hint::black_box(model.embed(&batch, &mut scratch));
            times.push(call.elapsed().as_secs_f64());
        }
        println!("{}", median(&times));
        std::io::stdout().flush()?;
    }
    Ok(())
}
