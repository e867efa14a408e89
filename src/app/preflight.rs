//! The checks that can refuse a start. They run before a start makes anything.
//!
//! A start and `check` go through the same steps: a start ends at the first that fails, `check`
//! reports each. No step makes a file, a folder, a key or a table that stays.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use tokio::net::TcpSocket;

use crate::config::{Config, StoreConfig};
use crate::data_dir::{self, DataDir, FolderState};
use crate::embed::{Encode, Engine};
use crate::llm;
use crate::redis::{Connection, ConnectionManager};
use crate::services::metering::Metering;
use crate::store::postgres::{self, DatabaseState};
use crate::store::sqlite::{self, FileState};
use crate::telemetry::Metrics;

use super::listening::bind;
use super::{check_prices, prices};

/// File descriptors that are not connections: the database, the log, the listeners, with room to
/// spare.
const OTHER_FILES: u64 = 128;

/// The result of a step.
pub(super) enum Finding {
    /// All is well.
    Fine(String),
    /// Worth knowing; a start is not hindered.
    Note(String),
    /// All is well, but a running server uses it: a second one is refused.
    InUse {
        /// The finding for a check while that server runs.
        text: String,
        /// For the second server: one line that names the setting and the repair.
        refusal: anyhow::Error,
    },
}

/// One thing that a start needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    DataFolder,
    SigningKey,
    Model,
    Store,
    Redis,
    Upstream,
    Prices,
    Address,
    MetricsAddress,
    Connections,
}

/// Every step with its name for operators, in the order in which they are taken. The store comes
/// after the model, whose vectors it must have room for.
pub(super) const STEPS: [(Step, &str); 10] = [
    (Step::DataFolder, "data folder"),
    (Step::SigningKey, "signing key"),
    (Step::Model, "model"),
    (Step::Store, "store"),
    (Step::Redis, "redis"),
    (Step::Upstream, "upstream"),
    (Step::Prices, "prices"),
    (Step::Address, "address"),
    (Step::MetricsAddress, "metrics address"),
    (Step::Connections, "connections"),
];

/// The steps, and the resources that those taken so far have opened for the start.
pub(super) struct Preflight<'a> {
    config: &'a Config,
    metrics: Arc<Metrics>,
    pub engine: Option<Arc<Engine>>,
    pub redis: Option<(Connection, ConnectionManager)>,
    pub llm: Option<llm::Client>,
    pub metering: Option<Metering>,
    /// Problems of the prices that hinder no start, a sentence each.
    pub price_notes: Vec<String>,
    /// Bound, and not listening yet: clients are refused until the service can serve them.
    pub socket: Option<TcpSocket>,
    pub metrics_socket: Option<TcpSocket>,
}

impl<'a> Preflight<'a> {
    pub fn new(config: &'a Config, metrics: Arc<Metrics>) -> Self {
        Self {
            config,
            metrics,
            engine: None,
            redis: None,
            llm: None,
            metering: None,
            price_notes: Vec::new(),
            socket: None,
            metrics_socket: None,
        }
    }

    /// Takes every step, up to the first that fails.
    ///
    /// # Errors
    /// One line that names the setting at fault and the repair.
    pub async fn pass(&mut self) -> anyhow::Result<()> {
        for (step, _) in STEPS {
            if let Some(Finding::InUse { refusal, .. }) = self.look(step).await? {
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Takes one step; `None` where the configuration leaves nothing to look at.
    ///
    /// # Errors
    /// One line that names the setting at fault and the repair.
    pub async fn look(&mut self, step: Step) -> anyhow::Result<Option<Finding>> {
        let server = &self.config.server;
        Ok(Some(match step {
            Step::DataFolder => self.data_folder()?,
            Step::SigningKey => self.signing_key()?,
            Step::Model => self.model()?,
            Step::Store => self.store().await?,
            Step::Redis => self.redis().await?,
            Step::Upstream => self.upstream()?,
            Step::Prices => self.prices()?,
            Step::Address => {
                let (socket, finding) = bind("BIND_ADDR", server.bind_addr)?;
                self.socket = socket;
                finding
            }
            Step::MetricsAddress => {
                let Some(address) = server.metrics_addr else {
                    return Ok(None);
                };
                let (socket, finding) = bind("METRICS_ADDR", address)?;
                self.metrics_socket = socket;
                finding
            }
            Step::Connections => connections(server.max_connections),
        }))
    }

    fn data_folder(&self) -> anyhow::Result<Finding> {
        let is_sqlite = matches!(self.config.store, StoreConfig::Sqlite { .. });
        if !is_sqlite && self.config.accounts.secret_key.is_some() {
            let text = "not needed: the store and the key are elsewhere";
            return Ok(Finding::Fine(text.to_owned()));
        }
        let path = self.config.store.data_dir();
        let FolderState {
            is_there,
            is_in_use,
        } = DataDir::inspect(path)?;
        let shown = path.display();
        Ok(if is_sqlite && is_in_use {
            Finding::InUse {
                text: format!("{shown} can be written; a server uses it"),
                refusal: data_dir::Error::InUse(path.to_owned()).into(),
            }
        } else if is_there {
            Finding::Fine(format!("{shown} can be written"))
        } else {
            Finding::Note(format!(
                "{shown} is not there yet: the first start makes it"
            ))
        })
    }

    fn signing_key(&self) -> anyhow::Result<Finding> {
        let accounts = &self.config.accounts;
        let fallbacks = accounts.secret_key_fallbacks.len();
        let place = if accounts.secret_key.is_some() {
            "SECRET_KEY is set"
        } else if DataDir::has_key(self.config.store.data_dir())? {
            "kept in the data folder"
        } else {
            let text = "there is none yet: the first start makes one in the data folder";
            return Ok(Finding::Note(text.to_owned()));
        };
        Ok(Finding::Fine(format!(
            "{place}, with {fallbacks} fallbacks"
        )))
    }

    fn model(&mut self) -> anyhow::Result<Finding> {
        let began = Instant::now();
        let engine = load_engine(self.config)?;
        let ids = engine.tokenize("Does it work?");
        let made = engine.embed(&[&ids], &mut engine.scratch());
        let squares = made
            .iter()
            .flat_map(|vector| vector.0.iter())
            .map(|x| x * x);
        let length: f32 = squares.sum();
        ensure!(
            (length - 1.0).abs() < 0.01,
            "EMBEDDING_MODEL_DIR: the model does not make vectors of unit length; take another"
        );
        let text = format!(
            "{}, {} dimensions; loaded and tried in {} ms",
            engine.model_id(),
            engine.dimension(),
            began.elapsed().as_millis()
        );
        self.engine = Some(Arc::new(engine));
        Ok(Finding::Fine(text))
    }

    async fn store(&self) -> anyhow::Result<Finding> {
        match &self.config.store {
            StoreConfig::Sqlite { data_dir, path } => {
                let is_made_later = self.config.store.is_in_data_dir() && !data_dir.exists();
                sqlite_file(path, is_made_later)
            }
            StoreConfig::Postgres { url, pool_size, .. } => {
                let dimension = self.engine.as_ref().map(|engine| engine.dimension());
                let state = postgres::inspect(url.expose(), dimension).await?;
                Ok(database(state, *pool_size))
            }
        }
    }

    async fn redis(&mut self) -> anyhow::Result<Finding> {
        let text = match &self.config.redis {
            None => "none is set: this is the only server",
            Some(redis) => {
                let connected = Connection::connect(redis, Arc::clone(&self.metrics)).await;
                self.redis = Some(connected.context("REDIS_URL")?);
                "it answers and can be written to"
            }
        };
        Ok(Finding::Fine(text.to_owned()))
    }

    /// The settings alone: a start does not wait for an upstream.
    fn upstream(&mut self) -> anyhow::Result<Finding> {
        let metrics = Arc::clone(&self.metrics);
        let client = match &self.config.upstream {
            None => llm::Client::mock(metrics),
            Some(upstream) => {
                let setting = match upstream.is_list {
                    true => "UPSTREAMS",
                    false => "OPENAI_BASE_URL",
                };
                llm::Client::new(upstream, metrics).context(setting)?
            }
        };
        let client = self.llm.insert(client);
        Ok(if client.is_mock() {
            let text = "none is set: prompts are answered by the built-in mock";
            Finding::Note(text.to_owned())
        } else {
            let (provider, model) = (client.provider(), client.default_route().model());
            Finding::Fine(format!("{provider} with the model {model}"))
        })
    }

    fn prices(&mut self) -> anyhow::Result<Finding> {
        let table = prices::load(self.config.prices_file.as_deref())?;
        let versions: Vec<&str> = table.versions().collect();
        let text = format!("of {} models: {}", table.rows().len(), versions.join(", "));
        let upstream = self.config.upstream.as_ref();
        let metering = Metering::new(table, upstream, self.config.calls.budget);
        self.price_notes = check_prices::notes(&metering, upstream);
        self.metering = Some(metering);
        Ok(Finding::Fine(text))
    }

    /// Closes the resources that the steps have opened.
    pub async fn close(self) {
        if let Some((_, manager)) = self.redis {
            manager.close().await;
        }
    }
}

/// `is_made_later`: a start makes the folder of the file first.
fn sqlite_file(path: &Path, is_made_later: bool) -> anyhow::Result<Finding> {
    let shown = path.display();
    let absent = format!("SQLite, {shown}: not there yet, the first start makes it");
    if is_made_later {
        return Ok(Finding::Note(absent));
    }
    let state = sqlite::inspect(path).with_context(|| format!("DATABASE_URL: {shown}"))?;
    let finding = match state {
        FileState::Absent => {
            data_dir::try_file_beside(path)
                .with_context(|| format!("DATABASE_URL: {shown}: its folder cannot be written"))?;
            Finding::Note(absent)
        }
        FileState::Present { schema, known } if schema == known => {
            let text = format!("SQLite, {shown}: schema {schema}");
            if data_dir::is_database_in_use(path)? {
                Finding::InUse {
                    text: format!("{text}; a server uses it"),
                    refusal: data_dir::Error::DatabaseInUse(path.to_owned()).into(),
                }
            } else {
                Finding::Fine(text)
            }
        }
        FileState::Present { schema, known } => Finding::Note(format!(
            "SQLite, {shown}: the next start brings it from schema {schema} to {known}; make a backup first"
        )),
    };
    Ok(finding)
}

fn database(state: DatabaseState, pool_size: usize) -> Finding {
    let DatabaseState {
        is_encrypted,
        max_connections,
        schema,
        known,
    } = state;
    let way = if is_encrypted {
        "PostgreSQL over TLS"
    } else {
        "PostgreSQL, not encrypted"
    };
    let wanted = pool_size + postgres::FURTHER_CONNECTIONS;
    if usize::try_from(max_connections).is_ok_and(|most| most < wanted) {
        return Finding::Note(format!(
            "{way}: the server takes {max_connections} connections, and this one may want {wanted}: DATABASE_POOL_SIZE"
        ));
    }
    if schema == 0 {
        return Finding::Note(format!(
            "{way}: an empty database, the first start makes the tables"
        ));
    }
    if schema < known {
        return Finding::Note(format!(
            "{way}: the next start brings it from schema {schema} to {known}; make a backup first"
        ));
    }
    Finding::Fine(format!("{way}: schema {schema}"))
}

/// The model in use.
///
/// # Errors
/// One line that names `EMBEDDING_MODEL_DIR`, if the folder's cannot be used.
pub(super) fn load_engine(config: &Config) -> anyhow::Result<Engine> {
    match &config.embedding_model_dir {
        None => Engine::bundled().context("the bundled model"),
        Some(dir) => Engine::from_dir(dir).context("EMBEDDING_MODEL_DIR"),
    }
}

fn connections(wanted: usize) -> Finding {
    match connection_room() {
        room if room < wanted => Finding::Note(format!(
            "the system's limit on open files leaves room for {room}, MAX_CONNECTIONS is {wanted}"
        )),
        _ => Finding::Fine(format!("up to {wanted}")),
    }
}

/// Connections that the system's limit on open files leaves room for.
pub(super) fn connection_room() -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    files.map_or(usize::MAX, |files| {
        usize::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX)
    })
}
