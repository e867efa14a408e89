//! Configuration: the settings, and the checked tree from which the rest of the program is built.
//!
//! [`Settings`] declares every setting once, with its flag, variable, default and help text.
//! [`Config::load`] turns settings and secrets into plain structs, one section for each capability.
//! Nothing in them needs a further check.

mod base_url;
mod checks;
mod endpoint;
pub(crate) mod env_file;
mod fallback;
mod log_filter;
mod names;
mod secret;
mod settings;
mod sqlite_url;
mod unused;
mod upstream;
mod upstream_list;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

pub use base_url::{BaseUrl, is_private};
pub use checks::normal_origin;
pub use endpoint::{Endpoint, ModelPattern, ServedModels, is_model_name};
pub use env_file::{EnvFileError, read_env_file};
pub use fallback::{Fallback, Fallbacks};
pub use log_filter::LogFilter;
pub use names::secret_meant;
pub use secret::{FileError, Secret, Secrets};
pub use settings::{
    ByteSize, CookieSecure, Given, LogFormat, OnClientDisconnect, Registration, Settings,
    SimilarScope,
};
pub use upstream::{UpstreamConfig, UpstreamSettings};
pub use upstream_list::{ListedUpstream, UpstreamList};

use crate::domain::Budget;
use crate::domain::rate::Rates;

/// A setting that cannot be used. The text names the setting and what it accepts, never its value.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct Error {
    setting: &'static str,
    problem: String,
}

impl Error {
    /// A complaint about one setting.
    pub fn new(setting: &'static str, problem: impl Into<String>) -> Self {
        Self {
            setting,
            problem: problem.into(),
        }
    }
}

/// All settings and secrets, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Listening, limits, starting and stopping.
    pub server: ServerConfig,
    /// Where the data live.
    pub store: StoreConfig,
    /// The Redis that replicas share; `None` if there is only one process.
    pub redis: Option<RedisConfig>,
    /// Keys and lifetimes of tokens, registration.
    pub accounts: AccountsConfig,
    /// Rates for `POST /api/prompts`; none is off.
    pub prompt_throttle: Rates,
    /// Rates for calls of `/v1`; none is off.
    pub v1_throttle: Rates,
    /// How calls of the upstream are bounded and ended.
    pub calls: CallsConfig,
    /// The scope and memory of similarity searches.
    pub search: SearchConfig,
    /// The upstream LLM; `None` is the built-in mock.
    pub upstream: Option<UpstreamConfig>,
    /// The operator's prices over the bundled ones.
    pub prices_file: Option<PathBuf>,
    /// A sentence-transformers folder in place of the bundled model.
    pub embedding_model_dir: Option<PathBuf>,
    /// The longest prompt or query, in characters.
    pub max_prompt_chars: usize,
    /// A sentence for each variable that is no setting and looks like one.
    pub misspelt: Vec<String>,
    /// A sentence for each setting that has no effect together with the others.
    pub unused: Vec<String>,
}

/// Listening, limits, starting and stopping.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where the service listens; port 0 picks one.
    pub bind_addr: SocketAddr,
    /// A separate listener for `/metrics`, if set.
    pub metrics_addr: Option<SocketAddr>,
    /// Proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted.
    pub trusted_proxies: Vec<IpNet>,
    /// Origins that browsers elsewhere may call from.
    pub cors_allowed_origins: Vec<String>,
    /// When the session cookie is marked `Secure`.
    pub cookie_secure: CookieSecure,
    /// The largest body of a chat call, in bytes.
    pub max_v1_body: usize,
    /// WebSockets one user may hold open.
    pub max_sockets_per_user: usize,
    /// Connections in all.
    pub max_connections: usize,
    /// Connections of one client network.
    pub max_connections_per_network: usize,
    /// Memory for request bodies and answers in flight, in bytes.
    pub request_memory: usize,
    /// When sockets are pinged, and when they count as lost.
    pub socket_timings: SocketTimings,
    /// How long a streamed answer may be silent before a heartbeat is sent. No setting: clients
    /// rely on the figure.
    pub stream_heartbeat: Duration,
    /// How long the service goes on accepting requests after the stop began.
    pub shutdown_delay: Duration,
    /// How long requests in flight may take to finish after that.
    pub shutdown_grace: Duration,
}

/// When open sockets are pinged, and when they count as lost. No setting: clients rely on the
/// figures.
#[derive(Clone, Copy, Debug)]
pub struct SocketTimings {
    /// How often a ping is sent.
    pub ping_every: Duration,
    /// How long a peer may be silent.
    pub silence: Duration,
    /// How long a peer may take to reply to a close frame, and to read it if it is behind.
    pub closing: Duration,
}

impl Default for SocketTimings {
    fn default() -> Self {
        Self {
            ping_every: Duration::from_secs(30),
            silence: Duration::from_secs(90),
            closing: Duration::from_secs(5),
        }
    }
}

/// Where the data live.
#[derive(Clone, Debug)]
pub enum StoreConfig {
    /// One process on one SQLite file.
    Sqlite {
        /// Holds the lock and the generated key.
        data_dir: PathBuf,
        /// The database file.
        path: PathBuf,
    },
    /// Any number of processes on one PostgreSQL database.
    Postgres {
        /// Holds the generated key, if none is set.
        data_dir: PathBuf,
        /// `postgres://…`, taken apart when it is opened.
        url: Secret,
        /// Connections at most.
        pool_size: usize,
    },
}

impl StoreConfig {
    /// Whether the database is a file in the data folder, however either is spelled.
    pub fn is_in_data_dir(&self) -> bool {
        let Self::Sqlite { data_dir, path } = self else {
            return false;
        };
        match (std::path::absolute(path), std::path::absolute(data_dir)) {
            (Ok(path), Ok(data_dir)) => path.parent() == Some(&*data_dir),
            (Ok(_), Err(_)) | (Err(_), _) => false,
        }
    }

    /// The data folder, used or not.
    pub fn data_dir(&self) -> &Path {
        match self {
            Self::Sqlite { data_dir, .. } | Self::Postgres { data_dir, .. } => data_dir,
        }
    }
}

/// The Redis that replicas share.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// `redis://…` or `rediss://…`.
    pub url: Secret,
    /// The prefix of all keys and channels.
    pub prefix: String,
    /// How long a command may take whose result a request needs. No setting: clients rely on the
    /// figure.
    pub patience: Duration,
}

impl RedisConfig {
    /// Redis responds in well under a millisecond. A whole second also covers a machine that has no
    /// time for this process, which is no reason to stop sharing limits and events.
    pub const PATIENCE: Duration = Duration::from_secs(1);
}

/// Keys and lifetimes of tokens, registration.
#[derive(Clone, Debug)]
pub struct AccountsConfig {
    /// The key that signs tokens; `None` means the one kept in the data folder.
    pub secret_key: Option<Secret>,
    /// Keys that only verify.
    pub secret_key_fallbacks: Vec<Secret>,
    /// The lifetime of an access token.
    pub access_token_lifetime: Duration,
    /// The lifetime of a refresh token and a session.
    pub refresh_token_lifetime: Duration,
    /// Sessions that one user may have; one more ends the oldest.
    pub max_sessions_per_user: usize,
    /// Whether anybody may register.
    pub registration: Registration,
    /// Registrations for each client (an IPv4 address, an IPv6 /48); none is off.
    pub register_throttle: Rates,
}

/// How calls of the upstream are bounded and ended.
#[derive(Clone, Copy, Debug)]
pub struct CallsConfig {
    /// Calls a UTC day over all users; `None` is no limit.
    pub daily_limit: Option<u64>,
    /// What all calls together may cost in each period; `None` is no limit.
    pub budget: Option<Budget>,
    /// Prompts that one user may keep; `None` is no limit.
    pub max_prompts_per_user: Option<u32>,
    /// Whether a call goes on whose caller disconnects.
    pub on_client_disconnect: OnClientDisconnect,
    /// How long a call counts as running without a sign of life from its process.
    pub lease: Duration,
}

/// The scope and memory of similarity searches.
#[derive(Clone, Copy, Debug)]
pub struct SearchConfig {
    /// Whose prompts a caller finds.
    pub scope: SimilarScope,
    /// Memory for vectors, in bytes; in own scope the least recently used are evicted beyond it.
    pub memory_bytes: u64,
}

impl Config {
    /// Checks the settings and secrets and puts them in order.
    ///
    /// # Errors
    /// The first setting that cannot be used.
    pub fn load(settings: Settings, secrets: Secrets) -> Result<Self, Error> {
        let redis = checks::redis(&settings, &secrets)?;
        checks::keys(&secrets)?;
        let store = checks::store(&settings, secrets.database_url)?;
        let list = settings.upstream.upstream_list()?;
        let has_key = secrets.openai_api_key.is_some();
        let upstream = upstream::checked(
            &settings.upstream,
            &list,
            secrets.openai_api_key,
            &secrets.upstream_keys,
        )?;
        if upstream.is_some() {
            checks::registration(&settings)?;
        }
        let max_connections_per_network = checks::connections_per_network(&settings);
        let mut unused = unused::unused(&settings, upstream.is_some(), redis.is_some(), &store);
        unused.extend(unused::key(has_key, &list));
        let misspelt = names::misspelt_variables(&settings, &list);
        let origins = settings
            .cors_allowed_origins
            .iter()
            .map(|origin| checks::origin(origin))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            server: ServerConfig {
                bind_addr: settings.bind_addr,
                metrics_addr: checks::metrics_addr(&settings)?,
                trusted_proxies: settings.trusted_proxies,
                cors_allowed_origins: origins,
                cookie_secure: settings.cookie_secure,
                max_v1_body: checks::v1_body(settings.max_v1_body)?,
                max_sockets_per_user: settings.max_sockets_per_user as usize,
                max_connections: settings.max_connections as usize,
                max_connections_per_network,
                request_memory: checks::request_memory(settings.request_memory)?,
                socket_timings: SocketTimings::default(),
                stream_heartbeat: Duration::from_secs(15),
                shutdown_delay: settings.shutdown_delay.into(),
                shutdown_grace: settings.shutdown_grace.into(),
            },
            store,
            redis,
            accounts: AccountsConfig {
                secret_key: secrets.secret_key,
                secret_key_fallbacks: secrets.secret_key_fallbacks,
                access_token_lifetime: checks::lifetime(
                    "ACCESS_TOKEN_LIFETIME",
                    settings.access_token_lifetime,
                )?,
                refresh_token_lifetime: checks::lifetime(
                    "REFRESH_TOKEN_LIFETIME",
                    settings.refresh_token_lifetime,
                )?,
                max_sessions_per_user: settings.max_sessions_per_user as usize,
                registration: settings.registration.unwrap_or(Registration::Open),
                register_throttle: checks::rates("REGISTER_THROTTLE", &settings.register_throttle)?,
            },
            prompt_throttle: checks::rates("PROMPT_THROTTLE", &settings.prompt_throttle)?,
            v1_throttle: checks::rates("V1_THROTTLE", &settings.v1_throttle)?,
            calls: CallsConfig {
                daily_limit: settings.upstream_daily_limit,
                budget: settings.budget,
                max_prompts_per_user: settings.max_prompts_per_user,
                on_client_disconnect: settings.on_client_disconnect,
                lease: checks::call_lease(settings.call_lease)?,
            },
            search: SearchConfig {
                scope: settings.similar_scope,
                memory_bytes: settings.search_memory.0,
            },
            upstream,
            prices_file: settings.prices_file,
            embedding_model_dir: settings.embedding_model_dir,
            max_prompt_chars: settings.max_prompt_chars as usize,
            misspelt,
            unused,
        })
    }
}

#[cfg(test)]
mod tests;
