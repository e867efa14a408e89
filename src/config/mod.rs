//! Configuration: what may be set, and the checked tree that the rest of the program is built from.
//!
//! [`Settings`] declares every setting once, with its flag, variable, default and help text; [`Config::load`] turns the
//! settings and the secrets into plain structs, one section a capability, in which nothing is left to check.

mod base_url;
mod secret;
mod settings;
mod upstream;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

pub use base_url::{BaseUrl, is_private};
pub use secret::{Secret, Secrets};
pub use settings::{
    ByteSize, CookieSecure, LogFormat, OnClientDisconnect, Registration, Settings, SimilarScope,
};
pub use upstream::{Endpoint, Fallback, Fallbacks, UpstreamConfig, UpstreamSettings};

use crate::domain::rate::{RateError, Rates};

/// A setting that cannot be used: names it and says what it takes, never its value.
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

/// Everything the service is told from outside, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Listening, limits, starting and stopping.
    pub server: ServerConfig,
    /// Where the data live.
    pub store: StoreConfig,
    /// What replicas share; `None` means there is one.
    pub redis: Option<RedisConfig>,
    /// Keys and lifetimes of tokens, registration.
    pub accounts: AccountsConfig,
    /// Rates for `POST /api/prompts`; none is off.
    pub prompt_throttle: Rates,
    /// How calls of the upstream are bounded and ended.
    pub calls: CallsConfig,
    /// What a similarity search may see and hold.
    pub search: SearchConfig,
    /// The LLM that answers; `None` is the built-in mock.
    pub upstream: Option<UpstreamConfig>,
    /// A sentence-transformers folder in place of the bundled model.
    pub embedding_model_dir: Option<PathBuf>,
    /// The longest prompt or query, in characters.
    pub max_prompt_chars: usize,
}

/// Listening, limits, starting and stopping.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where the service listens; port 0 picks one.
    pub bind_addr: SocketAddr,
    /// A listener of its own for `/metrics`, if set.
    pub metrics_addr: Option<SocketAddr>,
    /// Networks whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Origins that browsers elsewhere may call from.
    pub cors_allowed_origins: Vec<String>,
    /// When the session cookie is marked `Secure`.
    pub cookie_secure: CookieSecure,
    /// WebSockets one user may hold open.
    pub max_sockets_per_user: usize,
    /// Connections in all; further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// When sockets are asked for a sign of life, and given up.
    pub socket_timings: SocketTimings,
    /// How long a stream of an answer may be silent before it says that it lives. No setting: clients rely on the figure.
    pub stream_heartbeat: Duration,
    /// How long the service goes on accepting after it was told to stop.
    pub shutdown_delay: Duration,
    /// How long requests in flight may take to finish after that.
    pub shutdown_grace: Duration,
}

/// When open sockets are asked for a sign of life, and given up. No setting: clients rely on the figures.
#[derive(Clone, Copy, Debug)]
pub struct SocketTimings {
    /// How often a ping is sent.
    pub ping_every: Duration,
    /// How long a peer may be silent.
    pub silence: Duration,
    /// How long a peer may take to answer a close frame, and to read it if it is behind.
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
    /// The data folder, used or not.
    pub fn data_dir(&self) -> &Path {
        match self {
            Self::Sqlite { data_dir, .. } | Self::Postgres { data_dir, .. } => data_dir,
        }
    }
}

/// What replicas share.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// `redis://…` or `rediss://…`.
    pub url: Secret,
    /// What the names of all keys and channels begin with.
    pub prefix: String,
}

/// Keys and lifetimes of tokens, registration.
#[derive(Clone, Debug)]
pub struct AccountsConfig {
    /// The key that signs tokens; `None` means the one kept in the data folder.
    pub secret_key: Option<Secret>,
    /// Keys that only verify.
    pub secret_key_fallbacks: Vec<Secret>,
    /// How long an access token holds.
    pub access_token_lifetime: Duration,
    /// How long a refresh token and a session hold.
    pub refresh_token_lifetime: Duration,
    /// Whether anybody may register.
    pub registration: Registration,
    /// Registrations for each client address; none is off.
    pub register_throttle: Rates,
}

/// How calls of the upstream are bounded and ended.
#[derive(Clone, Copy, Debug)]
pub struct CallsConfig {
    /// Calls a UTC day over all users; `None` is no limit.
    pub daily_limit: Option<u64>,
    /// What becomes of a call whose caller hangs up.
    pub on_client_disconnect: OnClientDisconnect,
    /// How long a call counts as running without a word from its process.
    pub lease: Duration,
}

/// What a similarity search may see and hold.
#[derive(Clone, Copy, Debug)]
pub struct SearchConfig {
    /// Whose prompts a caller finds.
    pub scope: SimilarScope,
    /// Memory for vectors, in bytes; in own scope the least recently used are let go beyond it.
    pub memory_bytes: u64,
}

impl Config {
    /// Checks the settings and secrets and puts them in order.
    ///
    /// # Errors
    /// The first setting that cannot be used.
    pub fn load(settings: Settings, secrets: Secrets) -> Result<Self, Error> {
        let redis = redis_config(&settings, &secrets)?;
        let store = store_config(&settings, secrets.database_url)?;
        for key in secrets
            .secret_key
            .iter()
            .chain(&secrets.secret_key_fallbacks)
        {
            if key.expose().len() < MIN_KEY_BYTES {
                return Err(Error::new(
                    "SECRET_KEY",
                    format!(
                        "too short: a key has at least {MIN_KEY_BYTES} bytes (openssl rand -hex 32 makes one)"
                    ),
                ));
            }
        }
        let upstream = upstream::checked(
            &settings.upstream,
            secrets.openai_api_key,
            &secrets.openai_fallback_keys,
        )?;
        if upstream.is_some() {
            check_registration(&settings)?;
        }
        let origins = settings
            .cors_allowed_origins
            .iter()
            .map(|origin| checked_origin(origin))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            server: ServerConfig {
                bind_addr: settings.bind_addr,
                metrics_addr: settings.metrics_addr,
                trusted_proxies: settings.trusted_proxies,
                cors_allowed_origins: origins,
                cookie_secure: settings.cookie_secure,
                max_sockets_per_user: settings.max_sockets_per_user as usize,
                max_connections: settings.max_connections as usize,
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
                access_token_lifetime: lifetime(
                    "ACCESS_TOKEN_LIFETIME",
                    settings.access_token_lifetime,
                )?,
                refresh_token_lifetime: lifetime(
                    "REFRESH_TOKEN_LIFETIME",
                    settings.refresh_token_lifetime,
                )?,
                registration: settings.registration.unwrap_or(Registration::Open),
                register_throttle: rates("REGISTER_THROTTLE", &settings.register_throttle)?,
            },
            prompt_throttle: rates("PROMPT_THROTTLE", &settings.prompt_throttle)?,
            calls: CallsConfig {
                daily_limit: settings.upstream_daily_limit,
                on_client_disconnect: settings.on_client_disconnect,
                lease: call_lease(settings.call_lease)?,
            },
            search: SearchConfig {
                scope: settings.similar_scope,
                memory_bytes: settings.search_memory.0,
            },
            upstream,
            embedding_model_dir: settings.embedding_model_dir,
            max_prompt_chars: settings.max_prompt_chars as usize,
        })
    }
}

/// HS256 wants a key as long as its digest (RFC 7518, section 3.2).
const MIN_KEY_BYTES: usize = 32;

/// Who can register can spend: with a real upstream, and where others can reach the service, that is the operator's decision.
fn check_registration(settings: &Settings) -> Result<(), Error> {
    if settings.registration.is_none() && !settings.bind_addr.ip().is_loopback() {
        return Err(Error::new(
            "REGISTRATION",
            "set it to open or closed: with a real upstream, whoever may register spends your money",
        ));
    }
    Ok(())
}

/// Replicas that share counts but not accounts, or not the key, would be one service in name only.
fn redis_config(settings: &Settings, secrets: &Secrets) -> Result<Option<RedisConfig>, Error> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ":_.-".contains(c);
    let prefix = settings.redis_prefix.clone();
    if prefix.len() > 64 || !prefix.chars().all(is_plain) {
        return Err(Error::new(
            "REDIS_PREFIX",
            "up to 64 letters, digits, colons, dots, dashes and underscores",
        ));
    }
    let Some(url) = secrets.redis_url.clone() else {
        return Ok(None);
    };
    if !["redis://", "rediss://"]
        .iter()
        .any(|scheme| url.expose().starts_with(scheme))
    {
        return Err(Error::new(
            "REDIS_URL",
            "must be redis://HOST:PORT or rediss://HOST:PORT",
        ));
    }
    let is_postgres = |url: &Secret| {
        ["postgres://", "postgresql://"]
            .iter()
            .any(|scheme| url.expose().starts_with(scheme))
    };
    if !secrets.database_url.as_ref().is_some_and(is_postgres) {
        return Err(Error::new(
            "REDIS_URL",
            "Redis joins replicas, which need a common store: set DATABASE_URL to postgres://…, or unset REDIS_URL",
        ));
    }
    if secrets.secret_key.is_none() {
        return Err(Error::new(
            "SECRET_KEY",
            "required with REDIS_URL: replicas sign with one key (openssl rand -hex 32 makes one)",
        ));
    }
    Ok(Some(RedisConfig { url, prefix }))
}

fn store_config(settings: &Settings, url: Option<Secret>) -> Result<StoreConfig, Error> {
    let data_dir = settings.data_dir.clone();
    let Some(url) = url else {
        let path = data_dir.join("prompt-service.sqlite3");
        return Ok(StoreConfig::Sqlite { data_dir, path });
    };
    match url.expose().split_once("://") {
        Some(("sqlite", path)) if !path.is_empty() => Ok(StoreConfig::Sqlite {
            path: PathBuf::from(path),
            data_dir,
        }),
        Some(("postgres" | "postgresql", rest)) if !rest.is_empty() => Ok(StoreConfig::Postgres {
            data_dir,
            pool_size: settings.database_pool_size as usize,
            url,
        }),
        _ => Err(Error::new(
            "DATABASE_URL",
            "must be sqlite://PATH or postgres://USER:PASSWORD@HOST:PORT/DATABASE",
        )),
    }
}

fn rates(setting: &'static str, text: &str) -> Result<Rates, Error> {
    text.parse()
        .map_err(|error: RateError| Error::new(setting, error.to_string()))
}

/// Token claims count whole seconds, so a lifetime under one would be none.
fn lifetime(setting: &'static str, value: humantime::Duration) -> Result<Duration, Error> {
    let value = Duration::from(value);
    if value < Duration::from_secs(1) || value > Duration::from_secs(3660 * 24 * 365) {
        return Err(Error::new(setting, "must be from 1s to 10years"));
    }
    Ok(value)
}

/// Shorter ones would run out by a slow commit; longer ones would keep a repeated post waiting for longer than anybody does.
fn call_lease(value: humantime::Duration) -> Result<Duration, Error> {
    let value = Duration::from(value);
    if value < Duration::from_secs(2) || value > Duration::from_secs(3600) {
        return Err(Error::new("CALL_LEASE", "must be from 2s to 1h"));
    }
    Ok(value)
}

/// An origin is what a browser sends: scheme, host and port, no path.
fn checked_origin(text: &str) -> Result<String, Error> {
    let host = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
        .unwrap_or_default();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
    if host.is_empty() || !host.chars().all(is_plain) {
        return Err(Error::new(
            "CORS_ALLOWED_ORIGINS",
            "each origin is scheme://host or scheme://host:port, without a path or wildcard",
        ));
    }
    Ok(text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn load(flags: &[&str], secrets: Secrets) -> Result<Config, Error> {
        let flags = std::iter::once("prompt-service").chain(flags.iter().copied());
        Config::load(Line::parse_from(flags).settings, secrets)
    }

    #[test]
    fn nothing_set_is_the_embedded_default() {
        let config = load(&[], Secrets::default()).unwrap();
        assert_eq!(config.server.bind_addr, "127.0.0.1:8000".parse().unwrap());
        assert_eq!(
            config.accounts.access_token_lifetime,
            Duration::from_secs(300)
        );
        assert_eq!(
            config.accounts.refresh_token_lifetime,
            Duration::from_secs(86_400)
        );
        assert_eq!(config.max_prompt_chars, 32_000);
        assert!(
            matches!(config.store, StoreConfig::Sqlite { path, .. } if path.ends_with("prompt-service.sqlite3"))
        );
    }

    #[test]
    fn an_error_names_the_setting_and_hides_the_value() {
        let short = Secrets {
            secret_key: Some(Secret::new("hunter2")),
            ..Secrets::default()
        };
        let error = load(&[], short).unwrap_err().to_string();
        assert!(error.starts_with("SECRET_KEY: "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");

        let url = Secrets {
            database_url: Some(Secret::new("mysql://root:hunter2@db")),
            ..Secrets::default()
        };
        let error = load(&[], url).unwrap_err().to_string();
        assert!(error.starts_with("DATABASE_URL: "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn the_url_picks_the_store() {
        let store = |url: &str| {
            let secrets = Secrets {
                database_url: Some(Secret::new(url)),
                ..Secrets::default()
            };
            load(&["--database-pool-size", "3"], secrets).map(|config| config.store)
        };
        for scheme in ["postgres", "postgresql"] {
            let url = format!("{scheme}://me:hunter2@db/prompts");
            let config = store(&url).unwrap();
            assert!(!format!("{config:?}").contains("hunter2"));
            assert!(
                matches!(config, StoreConfig::Postgres { url: kept, pool_size: 3, .. } if kept.expose() == url)
            );
        }
        assert!(
            matches!(store("sqlite://a/b.db").unwrap(), StoreConfig::Sqlite { path, .. } if path.ends_with("b.db"))
        );
        assert!(store("postgres://").is_err());
        assert!(store("sqlite://").is_err());
    }

    #[test]
    fn redis_needs_a_common_store_and_a_common_key() {
        let refusal = |redis: &str, database: Option<&str>, key: Option<&str>| {
            let secrets = Secrets {
                redis_url: Some(Secret::new(redis)),
                database_url: database.map(Secret::new),
                secret_key: key.map(Secret::new),
                ..Secrets::default()
            };
            load(&[], secrets).unwrap_err().to_string()
        };
        let (key, postgres) = ("k".repeat(32), Some("postgres://u:hunter2@db/x"));
        for database in [None, Some("sqlite:///tmp/x")] {
            let error = refusal("redis://:hunter2@r", database, Some(&key));
            assert!(error.starts_with("REDIS_URL: "), "{error}");
            assert!(error.contains("DATABASE_URL"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = refusal("redis://r", postgres, None);
        assert!(error.starts_with("SECRET_KEY: "), "{error}");
        let error = refusal("http://hunter2@r", postgres, Some(&key));
        assert!(error.starts_with("REDIS_URL: "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn registration_is_a_decision_where_it_spends_money() {
        let secrets = || Secrets {
            openai_api_key: Some(Secret::new("sk-x")),
            ..Secrets::default()
        };
        let public = ["--bind-addr", "0.0.0.0:8000"];
        let error = load(&public, secrets()).unwrap_err().to_string();
        assert!(error.starts_with("REGISTRATION: "), "{error}");
        for flags in [
            &["--bind-addr", "[::1]:8000"][..],
            &["--bind-addr", "0.0.0.0:8000", "--registration", "open"],
            &["--bind-addr", "0.0.0.0:8000", "--registration", "closed"],
        ] {
            assert!(load(flags, secrets()).unwrap().upstream.is_some());
        }
        let mock = load(&public, Secrets::default()).unwrap();
        assert!(mock.upstream.is_none());
    }

    #[test]
    fn throttles_and_origins_are_checked() {
        for flags in [
            ["--prompt-throttle", "often"],
            ["--register-throttle", "0/min"],
            ["--cors-allowed-origins", "https://a.example/path"],
            ["--cors-allowed-origins", "*"],
            ["--access-token-lifetime", "10ms"],
            ["--redis-prefix", "a{b}"],
        ] {
            let error = load(&flags, Secrets::default()).unwrap_err().to_string();
            let name = flags[0]
                .trim_start_matches('-')
                .replace('-', "_")
                .to_uppercase();
            assert!(error.starts_with(&name), "{error}");
        }
        let off = load(&["--prompt-throttle", "off"], Secrets::default()).unwrap();
        assert!(off.prompt_throttle.as_slice().is_empty());
    }
}
