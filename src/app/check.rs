//! The operator's command that looks at everything a start would need, and changes nothing.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use tokio::net::TcpListener;

use crate::config::{self, Config, StoreConfig};
use crate::data_dir::{DataDir, Found};
use crate::embed::Encode;
use crate::redis::Link;
use crate::store::postgres::{self, DatabaseState};
use crate::store::sqlite::{self, FileState};
use crate::telemetry::Metrics;

/// How a part was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it should be.
    Fine,
    /// Worth knowing; a start is not hindered.
    Note,
    /// A start would fail, or serve badly.
    Fault,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fine => "ok   ",
            Self::Note => "note ",
            Self::Fault => "fault",
        })
    }
}

type Finding = (Verdict, String);

/// Looks at each part and writes a line on each to `out`: a verdict, the part, what was found.
///
/// # Errors
/// How many faults there are, if there are any.
pub async fn run(
    config: Result<Config, config::Error>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            writeln!(out, "{} settings: {error}", Verdict::Fault)?;
            bail!("1 fault; the rest was not looked at");
        }
    };
    let data_dir = config.store.data_dir();
    let mut found = vec![("settings", (Verdict::Fine, "each can be used".to_owned()))];
    for sentence in config.misspelt.iter().chain(&config.unused) {
        found.push(("settings", (Verdict::Note, sentence.clone())));
    }
    let folder = DataDir::look(data_dir);
    found.push(("data folder", data_folder(data_dir, &folder)));
    found.push(("signing key", signing_key(&config, &folder)));
    found.push(("store", store(&config.store).await));
    found.push(("redis", redis(&config).await));
    found.push(("model", model(&config)));
    found.push(("upstream", upstream(&config)));
    found.push((
        "address",
        address("BIND_ADDR", config.server.bind_addr).await,
    ));
    if let Some(addr) = config.server.metrics_addr {
        found.push(("metrics address", address("METRICS_ADDR", addr).await));
    }
    found.push(("connections", connections(&config)));
    for (part, (verdict, text)) in &found {
        writeln!(out, "{verdict} {part}: {text}")?;
    }
    let is_fault = |finding: &&(&str, Finding)| finding.1.0 == Verdict::Fault;
    match found.iter().filter(is_fault).count() {
        0 => Ok(()),
        1 => bail!("1 fault"),
        number => bail!("{number} faults"),
    }
}

/// An error with its causes as a fault's text.
fn fault(error: impl Into<anyhow::Error>) -> Finding {
    (Verdict::Fault, format!("{:#}", error.into()))
}

fn data_folder(path: &Path, folder: &Result<Found, crate::data_dir::Error>) -> Finding {
    let shown = path.display();
    match folder {
        Ok(Found { is_there: true, .. }) => (Verdict::Fine, format!("{shown} can be written")),
        Ok(Found {
            is_there: false, ..
        }) => (
            Verdict::Note,
            format!("{shown} is not there yet: the first start makes it"),
        ),
        Err(error) => (Verdict::Fault, error.to_string()),
    }
}

fn signing_key(config: &Config, folder: &Result<Found, crate::data_dir::Error>) -> Finding {
    let fallbacks = config.accounts.secret_key_fallbacks.len();
    let text = match (&config.accounts.secret_key, folder) {
        (Some(_), _) => "SECRET_KEY is set".to_owned(),
        (None, Ok(Found { has_key: true, .. })) => "kept in the data folder".to_owned(),
        (None, Ok(Found { has_key: false, .. })) => {
            return (
                Verdict::Note,
                "there is none yet: the first start makes one in the data folder".to_owned(),
            );
        }
        (None, Err(_)) => return (Verdict::Fault, "the data folder cannot be used".to_owned()),
    };
    (Verdict::Fine, format!("{text}, with {fallbacks} fallbacks"))
}

async fn store(config: &StoreConfig) -> Finding {
    match config {
        StoreConfig::Sqlite { data_dir, path } => file(data_dir, path),
        StoreConfig::Postgres { url, pool_size, .. } => {
            match postgres::inspect(url.expose()).await {
                Ok(state) => database(state, *pool_size),
                Err(error) => fault(error),
            }
        }
    }
}

fn database(state: DatabaseState, pool_size: usize) -> Finding {
    let DatabaseState {
        is_encrypted,
        max_connections,
        schema,
        known,
        users,
        prompts,
    } = state;
    let way = if is_encrypted {
        "PostgreSQL over TLS"
    } else {
        "PostgreSQL, not encrypted"
    };
    let wanted = pool_size + postgres::FURTHER_CONNECTIONS;
    if usize::try_from(max_connections).is_ok_and(|most| most < wanted) {
        return (
            Verdict::Note,
            format!(
                "{way}: the server takes {max_connections} connections, and this one may want {wanted}: DATABASE_POOL_SIZE"
            ),
        );
    }
    if schema == 0 {
        return (
            Verdict::Note,
            format!("{way}: an empty database, the first start makes the tables"),
        );
    }
    if schema < known {
        return (
            Verdict::Note,
            format!(
                "{way}: the next start brings it from schema {schema} to {known}; make a backup first"
            ),
        );
    }
    (
        Verdict::Fine,
        format!("{way}: {users} users, about {prompts} prompts, schema {schema}"),
    )
}

async fn redis(config: &Config) -> Finding {
    let Some(redis) = &config.redis else {
        return (
            Verdict::Fine,
            "none is set: this is the only server".to_owned(),
        );
    };
    match Link::connect(redis, Arc::new(Metrics::new())).await {
        Ok((_, keeper)) => {
            keeper.close().await;
            (Verdict::Fine, "it answers and can be written to".to_owned())
        }
        Err(error) => fault(anyhow::Error::new(error).context("REDIS_URL")),
    }
}

/// The settings alone: a question would cost money.
fn upstream(config: &Config) -> Finding {
    let Some(upstream) = &config.upstream else {
        return (
            Verdict::Note,
            "none is set: prompts are answered by the built-in mock".to_owned(),
        );
    };
    match super::make_llm(Some(upstream), &Arc::new(Metrics::new())) {
        Ok(client) => (
            Verdict::Fine,
            format!(
                "{} with the model {}; it was not asked",
                client.provider(),
                client.model()
            ),
        ),
        Err(error) => fault(error),
    }
}

fn file(data_dir: &Path, path: &Path) -> Finding {
    let shown = path.display();
    let absent = (
        Verdict::Note,
        format!("SQLite, {shown}: not there yet, the first start makes it"),
    );
    if path.parent() == Some(data_dir) && !data_dir.exists() {
        return absent;
    }
    match sqlite::inspect(path) {
        Ok(FileState::Absent) => absent,
        Ok(FileState::Present {
            schema,
            known,
            users,
            prompts,
        }) if schema == known => (
            Verdict::Fine,
            format!("SQLite, {shown}: {users} users, {prompts} prompts, schema {schema}"),
        ),
        Ok(FileState::Present { schema, known, .. }) => (
            Verdict::Note,
            format!(
                "SQLite, {shown}: the next start brings it from schema {schema} to {known}; make a backup first"
            ),
        ),
        Err(error) => fault(anyhow::Error::new(error).context(format!("DATABASE_URL: {shown}"))),
    }
}

fn model(config: &Config) -> Finding {
    let began = Instant::now();
    let engine = match super::load_engine(config) {
        Ok(engine) => engine,
        Err(error) => return fault(error),
    };
    let ids = engine.tokenize("Does it work?");
    let made = engine.embed(&[&ids], &mut engine.scratch());
    let length: f32 = made
        .iter()
        .flat_map(|vector| vector.0.iter())
        .map(|x| x * x)
        .sum();
    if (length - 1.0).abs() > 0.01 {
        return (
            Verdict::Fault,
            "the model does not make vectors of unit length".to_owned(),
        );
    }
    (
        Verdict::Fine,
        format!(
            "{}, {} dimensions; loaded and tried in {} ms",
            engine.model_id(),
            engine.dimension(),
            began.elapsed().as_millis()
        ),
    )
}

async fn address(setting: &'static str, address: std::net::SocketAddr) -> Finding {
    match TcpListener::bind(address).await {
        Ok(_) => (Verdict::Fine, format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => (
            Verdict::Note,
            format!("{setting}: {address} is in use, by a server that runs or by something else"),
        ),
        Err(error) => fault(
            anyhow::Error::new(error).context(format!("{setting}: cannot listen on {address}")),
        ),
    }
}

fn connections(config: &Config) -> Finding {
    let wanted = config.server.max_connections;
    match super::connection_room() {
        room if room < wanted => (
            Verdict::Note,
            format!(
                "the system's limit on open files leaves room for {room}, MAX_CONNECTIONS is {wanted}"
            ),
        ),
        _ => (Verdict::Fine, format!("up to {wanted}")),
    }
}
