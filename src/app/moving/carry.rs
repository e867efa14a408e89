//! `move`: what the embedded store holds becomes a PostgreSQL database's.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};

use super::super::store;
use super::held::{Held, alone};
use super::progress::show;
use super::{both, secret_url};
use crate::cli::MoveArgs;
use crate::config::{Config, StoreConfig};
use crate::services::moving::Meter;
use crate::services::moving::carry::{Side, carry as carry_over};
use crate::store::postgres::{OpenError, OpenOptions, PostgresStore};

/// Connections to the target: pages go over one after another.
const POOL: usize = 2;

/// Copies the embedded store to a PostgreSQL database, whole, and compares both. Every server of
/// either must be stopped; the source is left as it was.
///
/// # Errors
/// One line that says what is wrong. What was copied until then stays, and the same command goes on
/// from there.
pub async fn carry(
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
    let (source, _) = Held::open(&config.store, dimension).await?;
    let options = OpenOptions {
        pool_size: POOL,
        dimension: Some(dimension),
    };
    let target = PostgresStore::open(url.expose(), options)
        .await
        .map_err(of_target)?;
    let sole = target.lock_exclusive().await.map_err(of_target)?;
    let meter = Meter::new(Instant::now());
    let from = Side {
        accounts: &*source.store.accounts,
        bulk: &*source.store.bulk,
        dimension,
    };
    let to = Side {
        accounts: &target,
        bulk: &target,
        dimension,
    };
    let began = Instant::now();
    let work = async { Ok(carry_over(from, to, &meter).await?) };
    let carried = show(&meter, alone(Some(sole), work)).await;
    target.close().await;
    source.store.close().await;
    writeln!(
        out,
        "moved {} in {:.1} s; both sides were compared row by row and are the same",
        both(carried?),
        began.elapsed().as_secs_f64()
    )?;
    Ok(())
}

/// A store's own complaint names the setting that it is usually opened by.
fn of_target(error: OpenError) -> anyhow::Error {
    let text = format!("{:#}", anyhow::Error::new(error));
    anyhow!(text.replacen("DATABASE_URL", "--to", 1))
}
