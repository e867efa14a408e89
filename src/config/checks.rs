//! Checks of single settings, and of those that only make sense together.

use std::net::SocketAddr;
use std::time::Duration;

use super::{ByteSize, Error, RedisConfig, Secret, Secrets, Settings, StoreConfig, sqlite_url};
use crate::domain::rate::{RateError, Rates};

/// HS256 requires a key as long as its digest (RFC 7518, section 3.2).
const MIN_KEY_BYTES: usize = 32;

/// Keys that only verify must be as long as the key that signs: an attacker who guesses either can
/// forge tokens.
pub(super) fn keys(secrets: &Secrets) -> Result<(), Error> {
    let signing = secrets.secret_key.iter().map(|key| ("SECRET_KEY", key));
    let verifying = secrets.secret_key_fallbacks.iter();
    let verifying = verifying.map(|key| ("SECRET_KEY_FALLBACKS", key));
    for (setting, key) in signing.chain(verifying) {
        if key.expose().len() < MIN_KEY_BYTES {
            return Err(Error::new(
                setting,
                format!(
                    "too short: a key has at least {MIN_KEY_BYTES} bytes (openssl rand -hex 32 makes one)"
                ),
            ));
        }
    }
    Ok(())
}

/// Everybody who can register can spend money at a real upstream. If others can reach the service,
/// the operator must decide about that.
pub(super) fn registration(settings: &Settings) -> Result<(), Error> {
    if settings.registration.is_none() && !settings.bind_addr.ip().is_loopback() {
        return Err(Error::new(
            "REGISTRATION",
            "set it to open or closed: with a real upstream, whoever may register spends your money",
        ));
    }
    Ok(())
}

/// One port cannot have two listeners.
pub(super) fn metrics_addr(settings: &Settings) -> Result<Option<SocketAddr>, Error> {
    let (main, metrics) = (settings.bind_addr, settings.metrics_addr);
    let is_same = metrics.is_some_and(|metrics| {
        let overlap = main.ip() == metrics.ip()
            || main.ip().is_unspecified()
            || metrics.ip().is_unspecified();
        main.port() == metrics.port() && main.port() != 0 && overlap
    });
    if is_same {
        return Err(Error::new(
            "METRICS_ADDR",
            "has the port of BIND_ADDR; choose another, or unset it to have the metrics on BIND_ADDR too",
        ));
    }
    Ok(metrics)
}

/// Replicas that share counts but not the accounts, or not the key, would not be one service.
pub(super) fn redis(settings: &Settings, secrets: &Secrets) -> Result<Option<RedisConfig>, Error> {
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
    Ok(Some(RedisConfig {
        url,
        prefix,
        patience: RedisConfig::PATIENCE,
    }))
}

pub(super) fn store(settings: &Settings, url: Option<Secret>) -> Result<StoreConfig, Error> {
    let data_dir = settings.data_dir.clone();
    let Some(url) = url else {
        let path = data_dir.join("prompt-service.sqlite3");
        return Ok(StoreConfig::Sqlite { data_dir, path });
    };
    match url.expose().split_once(':') {
        Some(("sqlite", rest)) => match sqlite_url::path(rest) {
            Ok(path) => Ok(StoreConfig::Sqlite { data_dir, path }),
            Err(problem) => Err(Error::new("DATABASE_URL", problem)),
        },
        Some(("postgres" | "postgresql", rest)) if rest.len() > 2 && rest.starts_with("//") => {
            Ok(StoreConfig::Postgres {
                data_dir,
                pool_size: settings.database_pool_size as usize,
                url,
            })
        }
        _ => Err(Error::new(
            "DATABASE_URL",
            "must be sqlite://PATH or postgres://USER:PASSWORD@HOST:PORT/DATABASE",
        )),
    }
}

pub(super) fn rates(setting: &'static str, text: &str) -> Result<Rates, Error> {
    text.parse()
        .map_err(|error: RateError| Error::new(setting, error.to_string()))
}

/// Token claims count whole seconds, so a lifetime of less than one would be zero.
pub(super) fn lifetime(
    setting: &'static str,
    value: humantime::Duration,
) -> Result<Duration, Error> {
    let value = Duration::from(value);
    if value < Duration::from_secs(1) || value > Duration::from_secs(3660 * 24 * 365) {
        return Err(Error::new(setting, "must be from 1s to 10years"));
    }
    Ok(value)
}

/// A shorter lease would expire during a slow commit. After a crash, a longer one would make a
/// repeated post wait for longer than clients do.
pub(super) fn call_lease(value: humantime::Duration) -> Result<Duration, Error> {
    let value = Duration::from(value);
    if value < Duration::from_secs(2) || value > Duration::from_secs(3600) {
        return Err(Error::new("CALL_LEASE", "must be from 2s to 1h"));
    }
    Ok(value)
}

/// Where nothing is set, a quarter of all connections, but as many as a browser or a small office
/// opens.
pub(super) fn connections_per_network(settings: &Settings) -> usize {
    let most = settings.max_connections as usize;
    settings
        .max_connections_per_network
        .map_or((most / 4).max(64), |number| number as usize)
        .min(most)
}

/// The least memory for requests in flight: a few dozen bodies of the largest size.
const MIN_REQUEST_MEMORY: u64 = 16 << 20;

pub(super) fn request_memory(size: ByteSize) -> Result<usize, Error> {
    let too_large = |_| Error::new("REQUEST_MEMORY", "is more than this machine can address");
    if size.0 < MIN_REQUEST_MEMORY {
        return Err(Error::new("REQUEST_MEMORY", "must be at least 16MiB"));
    }
    usize::try_from(size.0).map_err(too_large)
}

/// The smallest and the largest bound of a chat call's body: what a post of a prompt may have, and
/// more than any upstream takes.
const V1_BODY: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;

pub(super) fn v1_body(size: ByteSize) -> Result<usize, Error> {
    usize::try_from(size.0)
        .ok()
        .filter(|_| V1_BODY.contains(&size.0))
        .ok_or_else(|| Error::new("MAX_V1_BODY", "must be from 1MiB to 256MiB"))
}

/// An origin is what a browser sends: scheme, host and port, no path.
pub(super) fn origin(text: &str) -> Result<String, Error> {
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
    Ok(normal_origin(text))
}

/// The form in which origins are compared: in lower case, and without the port that the scheme
/// implies, as browsers write them.
pub fn normal_origin(origin: &str) -> String {
    let mut origin = origin.to_ascii_lowercase();
    let implied = [("http://", ":80"), ("https://", ":443")];
    for (scheme, port) in implied {
        if origin.starts_with(scheme) && origin.ends_with(port) {
            origin.truncate(origin.len() - port.len());
        }
    }
    origin
}
