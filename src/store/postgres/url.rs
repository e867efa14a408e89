//! Parses the URL of the database. Its errors never quote it, because it holds a password.

use std::path::PathBuf;

use tokio_postgres::Config;

use super::tls::{Roots, Tls};

/// Why the URL is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum UrlError {
    #[error("not a URL of the form postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    Malformed,
    #[error("it names no database: postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    NoDatabase,
    #[error("sslmode must be disable, allow, prefer, require, verify-ca or verify-full")]
    SslMode,
    #[error(
        "sslrootcert has a meaning with sslmode=verify-full, verify-ca or require alone; add one of them"
    )]
    UnusedRoot,
    #[error("of libpq's parameters only {KNOWN} are taken")]
    Parameter,
}

/// The parameters that the driver takes from the URL, and those taken here.
const KNOWN: &str = "sslmode, sslrootcert, sslnegotiation, channel_binding, host, hostaddr, port, user, password, dbname, \
                     options, application_name, connect_timeout, tcp_user_timeout, keepalives, keepalives_idle, \
                     keepalives_interval, keepalives_retries, target_session_attrs and load_balance_hosts";

/// Parses the URL: the driver's settings, and how the server is authenticated.
pub(super) fn parse(url: &str) -> Result<(Config, Tls), UrlError> {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let (mut mode, mut roots, mut rest) = (None, None, Vec::new());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let name = pair.split('=').next().unwrap_or_default();
        let value = || {
            let mut pairs = form_urlencoded::parse(pair.as_bytes());
            pairs.next().map(|(_, value)| value.into_owned())
        };
        match name {
            "sslmode" => mode = value(),
            // Libpq's word for the system's roots.
            "sslrootcert" => {
                roots = value().map(|path| match path.as_str() {
                    "system" => Roots::System,
                    _ => Roots::File(PathBuf::from(path)),
                });
            }
            _ if KNOWN.split([',', ' ']).any(|known| known == name) => rest.push(pair),
            _ => return Err(UrlError::Parameter),
        }
    }
    let tls = match (mode.as_deref(), roots) {
        (Some("disable"), _) => Tls::Disable,
        // An operator who names a root expects it to be used. Libpq would not use it in these
        // modes: it goes on with any server, or without TLS.
        (None | Some("allow" | "prefer"), Some(_)) => return Err(UrlError::UnusedRoot),
        (None | Some("allow" | "prefer"), None) => Tls::Prefer,
        (Some("require"), Some(roots)) => Tls::VerifyCa(roots),
        (Some("require"), None) => Tls::Require,
        (Some("verify-ca"), roots) => Tls::VerifyCa(roots.unwrap_or(Roots::System)),
        (Some("verify-full"), roots) => Tls::VerifyFull(roots.unwrap_or(Roots::System)),
        (Some(_), _) => return Err(UrlError::SslMode),
    };
    let driver_url = format!("{address}?{}", rest.join("&"));
    let mut config: Config = driver_url.parse().map_err(|_| UrlError::Malformed)?;
    if config.get_dbname().is_none_or(str::is_empty) {
        return Err(UrlError::NoDatabase);
    }
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(UrlError::Malformed);
    }
    config.ssl_mode(tls.driver_mode());
    if config.get_application_name().is_none() {
        config.application_name("prompt-service");
    }
    Ok((config, tls))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(query: &str) -> Result<Tls, UrlError> {
        parse(&format!("postgres://me:secret@db:5433/prompts{query}")).map(|(_, tls)| tls)
    }

    #[test]
    fn the_mode_and_its_roots_are_libpqs() {
        let file = || Roots::File(PathBuf::from("/etc/my ca.pem"));
        assert_eq!(tls(""), Ok(Tls::Prefer));
        assert_eq!(tls("?sslmode=disable"), Ok(Tls::Disable));
        assert_eq!(tls("?sslmode=require"), Ok(Tls::Require));
        assert_eq!(
            tls("?sslmode=require&sslrootcert=/etc/my%20ca.pem"),
            Ok(Tls::VerifyCa(file()))
        );
        assert_eq!(
            tls("?sslrootcert=system&sslmode=verify-full"),
            Ok(Tls::VerifyFull(Roots::System))
        );
        assert_eq!(tls("?sslmode=yes"), Err(UrlError::SslMode));
        for unverified in ["", "&sslmode=allow", "&sslmode=prefer"] {
            for root in ["/etc/ca.pem", "system"] {
                let query = format!("?sslrootcert={root}{unverified}");
                assert_eq!(tls(&query), Err(UrlError::UnusedRoot), "{query}");
            }
        }
    }

    #[test]
    fn parameters_are_passed_on_or_refused() {
        let (config, _) =
            parse("postgresql://me@db/prompts?connect_timeout=7&sslmode=disable").unwrap();
        assert_eq!(config.get_connect_timeout().unwrap().as_secs(), 7);
        assert_eq!(config.get_dbname(), Some("prompts"));
        assert_eq!(config.get_application_name(), Some("prompt-service"));
        assert_eq!(tls("?sslcert=x"), Err(UrlError::Parameter));
    }

    #[test]
    fn complaints_do_not_quote_the_url() {
        for url in [
            "postgres://me:hunter2@db:notaport/x",
            "postgres://me:hunter2@db",
            "postgres://me:hunter2@/x",
            "postgres://me:hunter2@db/x?hunter2=1",
        ] {
            let error = parse(url).err().map(|error| error.to_string());
            assert!(error.is_some_and(|text| !text.contains("hunter2")), "{url}");
        }
    }
}
