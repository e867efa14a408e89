//! `move`: the embedded store's contents become a PostgreSQL database's.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};

use super::super::store;
use super::exclusive::{ExclusiveStore, unless_taken};
use super::progress::show;
use super::{both, secret_url};
use crate::cli::MoveArgs;
use crate::config::{Config, StoreConfig};
use crate::store::postgres::{OpenError, OpenOptions, PostgresStore};
use crate::transfer::{Meter, copy};

/// Connections to the target: pages are copied one after another.
const POOL: usize = 2;

/// Copies the embedded store to a PostgreSQL database, whole, and compares both. All servers of
/// both must be stopped; the source is left as it was.
///
/// # Errors
/// One line that says what is wrong. What was copied until then stays, and the same command
/// continues there.
pub async fn move_store(
    arguments: MoveArgs,
    config: &Config,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let StoreConfig::Sqlite { .. } = &config.store else {
        bail!("DATABASE_URL: a move begins at an embedded store; --to names where it goes");
    };
    let url = secret_url(arguments.target())?.context("--to: name the target")?;
    store::find(&config.store).await?;
    let dimension = super::super::preflight::load_engine(config)?.dimension();
    let source = ExclusiveStore::open(&config.store, dimension).await?;
    let options = OpenOptions {
        pool_size: POOL,
        dimension: Some(dimension),
    };
    let target = PostgresStore::open(url.expose(), options)
        .await
        .map_err(of_target)?;
    let lock = target.lock_exclusive().await.map_err(of_target)?;
    let meter = Meter::new(Instant::now());
    let began = Instant::now();
    let work = async { Ok(copy(&*source.store.bulk, &target, dimension, &meter).await?) };
    let copied = show(&meter, unless_taken(Some(lock), work)).await;
    target.close().await;
    source.store.close().await;
    writeln!(
        out,
        "moved {} in {:.1} s; both sides were compared row by row and are the same",
        both(copied?),
        began.elapsed().as_secs_f64()
    )?;
    Ok(())
}

/// A store's error names the setting by which the store is usually opened.
fn of_target(error: OpenError) -> anyhow::Error {
    let text = format!("{:#}", anyhow::Error::new(error));
    anyhow!(text.replacen("DATABASE_URL", "--to", 1))
}
