//! Resident memory, measured in processes that hold nothing but an index.

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use prompt_service::config::SimilarScope;
use prompt_service::domain::{Embedding, ModelId, UserId};
use prompt_service::search::{Similarity, SlabIndex};
use prompt_service_engine::scan::kernel::Kernel;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::data::{DIMENSION, Rows};
use super::{K, options};

/// What the rows occupy, in processes that have nothing else.
pub fn table(most: usize) -> Result<()> {
    println!(
        "\n| {most} rows | resident MB of the whole process | B/row more than without rows |\n|---|---|---|"
    );
    let owners = most / 50;
    for (mode, owners) in [("shared", 1), ("own", 1), ("own", owners)] {
        let resident = |rows: usize| -> Result<usize> {
            let output = Command::new(std::env::current_exe()?)
                .args(["--memory", mode, &rows.to_string(), &owners.to_string()])
                .output()?;
            let printed = String::from_utf8(output.stdout)?;
            printed.trim().parse().with_context(|| printed.clone())
        };
        let (with, without) = (resident(most)?, resident(0)?);
        println!(
            "| {mode}, {owners} owners | {:.0} | {:.0} |",
            with as f64 / 1e6,
            with.saturating_sub(without) as f64 / most as f64
        );
    }
    Ok(())
}

/// Loads made-up rows and prints how many bytes the process has in memory. `words`: the scope, the
/// rows, the owners.
pub fn print_of_child(mut words: impl Iterator<Item = String>) -> Result<()> {
    let scope = match words.next().as_deref() {
        Some("own") => SimilarScope::Own,
        _ => SimilarScope::Shared,
    };
    let rows: usize = words.next().context("rows")?.parse()?;
    let owners: usize = words.next().context("owners")?.parse()?;
    let options = options(scope, Kernel::detect());
    let made_up = Arc::new(Rows {
        n: rows,
        owners,
        vectors: None,
    });
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let index = SlabIndex::new(options, made_up, ModelId(Arc::from("a model")), tasks, stop);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(index.load_all())?;
    if scope == SimilarScope::Own && rows > 0 {
        let query = Embedding(Arc::from([0.0; DIMENSION].as_slice()));
        for owner in 1..=owners {
            runtime.block_on(index.nearest(UserId(owner as i64), &query, K))?;
        }
    }
    anyhow::ensure!(
        index.status().rows == rows as u64,
        "not all rows were loaded"
    );
    println!("{}", resident_bytes()?);
    Ok(())
}

/// What the process has in memory.
fn resident_bytes() -> Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .context("VmRSS")?;
    Ok(kib.parse::<usize>()? * 1024)
}
