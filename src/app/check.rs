//! The operator's command that takes the steps of a start, and goes no further.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, bail};

use super::preflight::{Finding, Preflight, Step};
use super::{check_upstream, health_check};
use crate::config::{self, Config, StoreConfig};
use crate::store::{postgres, sqlite};
use crate::telemetry::Metrics;

/// Takes each step and writes a line on it to `out`: `ok`, `note` (worth knowing; a start is not
/// hindered) or `fault`, the step, what was found. Upstreams are asked for their lists of models.
/// `upstream_must_be_right`: one that would not answer prompts is a fault, not only a note.
///
/// # Errors
/// How many faults there are, if there are any.
pub async fn run(
    config: Result<Config, config::Error>,
    upstream_must_be_right: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            let _ = writeln!(out, "fault settings: {error}");
            bail!("1 fault; the rest was not looked at");
        }
    };
    // The status reports faults whether or not anybody reads the lines.
    let _ = writeln!(out, "ok    settings: each can be used");
    for sentence in config.misspelt.iter().chain(&config.unused) {
        let _ = writeln!(out, "note  settings: {sentence}");
    }
    let mut preflight = Preflight::new(&config, Arc::new(Metrics::new()));
    let mut is_served = false;
    let mut faults = 0;
    for step in Step::ALL {
        let mut found = vec![preflight.look(step).await];
        if step == Step::Upstream
            && let (Some(client), Some(upstream)) = (preflight.llm(), &config.upstream)
        {
            let asked = check_upstream::findings(client, upstream, upstream_must_be_right).await;
            found = asked.into_iter().map(|finding| finding.map(Some)).collect();
        }
        for found in found {
            let (verdict, text) = match found {
                Ok(None) => continue,
                Ok(Some(Finding::Fine(text))) => ("ok   ", text),
                Ok(Some(Finding::Note(text))) => ("note ", text),
                Ok(Some(Finding::InUse { text, refusal })) => {
                    let is_port = matches!(step, Step::Address | Step::MetricsAddress);
                    // What holds the folder is this store's server. What holds a port may be
                    // anything.
                    is_served = is_served || !is_port || is_replica(&config).await;
                    match (is_served, is_port) {
                        (true, false) => ("ok   ", text),
                        (true, true) => ("note ", text),
                        (false, _) => ("fault", refusal.to_string()),
                    }
                }
                Err(error) => ("fault", format!("{error:#}")),
            };
            let (verdict, text) = if step == Step::Store && verdict == "ok   " {
                match rows(&config.store).await {
                    Ok(rows) => (verdict, format!("{text}, {rows}")),
                    Err(error) => ("fault", format!("{error:#}")),
                }
            } else {
                (verdict, text)
            };
            let _ = writeln!(out, "{verdict} {}: {text}", step.name());
            faults += usize::from(verdict == "fault");
        }
    }
    preflight.close().await;
    match faults {
        0 => Ok(()),
        1 => bail!("1 fault"),
        number => bail!("{number} faults"),
    }
}

/// What the store holds. A start does not ask: to count takes longer the more there is.
async fn rows(config: &StoreConfig) -> anyhow::Result<String> {
    Ok(match config {
        StoreConfig::Sqlite { path, .. } => {
            let (users, prompts) = sqlite::count_rows(path).context("DATABASE_URL")?;
            format!("{users} users, {prompts} prompts")
        }
        StoreConfig::Postgres { url, .. } => {
            let (users, prompts) = postgres::count_rows(url.expose()).await?;
            format!("{users} users, about {prompts} prompts")
        }
    })
}

/// Whether a server listens on `BIND_ADDR` that may be one of this store's: servers on one
/// PostgreSQL database hold no lock on a folder that would show it.
async fn is_replica(config: &Config) -> bool {
    let StoreConfig::Postgres { .. } = config.store else {
        return false;
    };
    let address = config.server.bind_addr;
    let asked = tokio::task::spawn_blocking(move || health_check::run(address, false));
    matches!(asked.await, Ok(Ok(())))
}
