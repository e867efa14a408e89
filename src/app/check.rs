//! The operator's command that checks everything a start needs, and starts nothing.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, bail};

use super::preflight::{Finding, Preflight, STEPS, Step};
use super::{check_upstream, health_check};
use crate::config::{self, Config, StoreConfig};
use crate::store::{postgres, sqlite};
use crate::telemetry::Metrics;

/// Takes each step and writes a line about it to `out`: `ok`, `note` (worth knowing, but a start
/// would succeed) or `fault`, the name of the step, and the finding. Upstreams are asked for their
/// lists of models. `upstream_must_be_right`: an upstream that cannot serve prompts is a fault, not
/// only a note.
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
    // The exit status reports faults even if the reader of the lines has closed the pipe.
    let _ = writeln!(out, "ok    settings: each can be used");
    for sentence in config.misspelt.iter().chain(&config.unused) {
        let _ = writeln!(out, "note  settings: {sentence}");
    }
    let mut preflight = Preflight::new(&config, Arc::new(Metrics::new()));
    let mut is_served = false;
    let mut faults = 0;
    for (step, name) in STEPS {
        let mut found = vec![preflight.look(step).await];
        if step == Step::Upstream
            && let (Some(client), Some(upstream)) = (&preflight.llm, &config.upstream)
        {
            let asked = check_upstream::findings(client, upstream, upstream_must_be_right).await;
            found = asked.into_iter().map(|finding| finding.map(Some)).collect();
        }
        if step == Step::Prices {
            let notes = preflight.price_notes.drain(..);
            found.extend(notes.map(|note| Ok(Some(Finding::Note(note)))));
        }
        for found in found {
            let (verdict, text) = match found {
                Ok(None) => continue,
                Ok(Some(Finding::Fine(text))) => ("ok   ", text),
                Ok(Some(Finding::Note(text))) => ("note ", text),
                Ok(Some(Finding::InUse { text, refusal })) => {
                    let is_port = matches!(step, Step::Address | Step::MetricsAddress);
                    // The lock on the folder belongs to this store's server. A port may belong to
                    // any program.
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
            let _ = writeln!(out, "{verdict} {name}: {text}");
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

/// The number of the store's rows. A start does not count them: counting takes longer the more
/// there are.
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

/// Whether a server listens on `BIND_ADDR` that may belong to this store. Servers on one PostgreSQL
/// database have no lock on a folder that would show it.
async fn is_replica(config: &Config) -> bool {
    let StoreConfig::Postgres { .. } = config.store else {
        return false;
    };
    let address = config.server.bind_addr;
    let asked = tokio::task::spawn_blocking(move || health_check::run(address, false));
    matches!(asked.await, Ok(Ok(())))
}
