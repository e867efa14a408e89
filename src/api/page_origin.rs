//! Which pages may use the session cookie. A browser sends the cookie with requests of any page,
//! and names the page's origin in `Origin`, which scripts cannot change.

use axum::http::HeaderMap;
use axum::http::header::{HOST, ORIGIN};
use axum::http::request::Parts;

use super::extract::is_tls;
use crate::config::{CookieSecure, ServerConfig, normal_origin};
use crate::error::Error;

/// The origin of the page that makes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOrigin {
    /// The request does not say: it comes from a program, or from a page of this service that only
    /// reads.
    Absent,
    /// This service, or an origin of `CORS_ALLOWED_ORIGINS`.
    Allowed,
    /// Any other, also one that the browser hides (`null`).
    Foreign,
}

impl PageOrigin {
    /// The origin that a request names.
    pub fn of(parts: &Parts, server: &ServerConfig) -> Self {
        let scheme = if spoke_tls(parts, server) {
            "https"
        } else {
            "http"
        };
        Self::named(&parts.headers, scheme, &server.cors_allowed_origins)
    }

    /// The origin in these headers of a request by `scheme`, with these other origins `allowed`.
    pub fn named(headers: &HeaderMap, scheme: &str, allowed: &[String]) -> Self {
        let mut named = headers.get_all(ORIGIN).iter();
        let Some(origin) = named.next() else {
            return Self::Absent;
        };
        // A browser sends one. With several, it is not known which one is the page's.
        let (Ok(origin), None) = (origin.to_str(), named.next()) else {
            return Self::Foreign;
        };
        let origin = normal_origin(origin);
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        let host = host.filter(|host| !host.is_empty());
        let own = host.map(|host| normal_origin(&format!("{scheme}://{host}")));
        if own.is_some_and(|own| own == origin) || allowed.contains(&origin) {
            Self::Allowed
        } else {
            Self::Foreign
        }
    }
}

/// Refuses a request that is authenticated by the session cookie alone, unless it comes from an
/// allowed page.
///
/// # Errors
/// `Forbidden`, also if the request does not say where it comes from.
pub fn require_allowed_page(parts: &Parts, server: &ServerConfig) -> Result<(), Error> {
    match PageOrigin::of(parts, server) {
        PageOrigin::Allowed => Ok(()),
        PageOrigin::Absent | PageOrigin::Foreign => Err(Error::Forbidden(
            "A page of this Origin may not use the session cookie.",
        )),
    }
}

/// Whether the client uses TLS. A trusted proxy says so, or the operator: `COOKIE_SECURE=always`
/// means that all clients use it.
fn spoke_tls(parts: &Parts, server: &ServerConfig) -> bool {
    server.cookie_secure == CookieSecure::Always || is_tls(parts, &server.trusted_proxies)
}

/// Whether cookies for this client are marked `Secure`.
pub fn wants_secure_cookie(parts: &Parts, server: &ServerConfig) -> bool {
    server.cookie_secure != CookieSecure::Never && spoke_tls(parts, server)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use super::*;

    /// The origin that these headers name, asked by `scheme`; `https://app.example` is allowed.
    fn named(scheme: &str, lines: &[(&'static str, &str)]) -> PageOrigin {
        let lines = lines.iter().map(|(name, value)| {
            let value = axum::http::HeaderValue::from_bytes(value.as_bytes());
            (HeaderName::from_static(name), value.unwrap())
        });
        let allowed = ["https://app.example".to_owned()];
        PageOrigin::named(&lines.collect(), scheme, &allowed)
    }

    fn of(own: &str, origin: &str) -> PageOrigin {
        let (scheme, host) = own.split_once("://").unwrap();
        named(scheme, &[("host", host), ("origin", origin)])
    }

    #[test]
    fn pages_of_the_same_scheme_host_and_port_and_listed_ones_are_allowed() {
        for (own, origin) in [
            ("http://chat.example:8000", "http://chat.example:8000"),
            ("https://chat.example", "https://chat.example"),
            ("https://chat.example:443", "https://chat.example"),
            ("https://chat.example", "https://chat.example:443"),
            ("http://chat.example:80", "http://chat.example"),
            ("https://Chat.Example", "https://chat.EXAMPLE"),
            ("http://[::1]:8000", "http://[::1]:8000"),
            ("http://chat.example", "https://app.example"),
            ("http://chat.example", "https://APP.example:443"),
        ] {
            assert_eq!(of(own, origin), PageOrigin::Allowed, "{own} {origin}");
        }
    }

    #[test]
    fn all_other_pages_are_foreign() {
        for (own, origin) in [
            ("https://chat.example", "https://evil.example"),
            ("https://chat.example", "http://chat.example"),
            ("http://chat.example", "https://chat.example"),
            ("https://chat.example", "https://chat.example:80"),
            ("http://chat.example:8000", "http://chat.example:9000"),
            ("http://chat.example:8000", "http://chat.example"),
            ("http://chat.example:443", "https://chat.example"),
            ("https://chat.example", "https://sub.chat.example"),
            ("https://chat.example", "https://chat.example.evil.example"),
            ("https://chat.example", "https://app.example.evil.example"),
            ("https://chat.example", "http://app.example"),
            ("https://chat.example", "https://chat.example/"),
            ("https://chat.example", "https://evil.example@chat.example"),
            ("https://chat.example", "chat.example"),
            ("https://chat.example", "null"),
            ("https://chat.example", ""),
            ("https://chat.example", "https://größe.example"),
        ] {
            assert_eq!(of(own, origin), PageOrigin::Foreign, "{own} {origin}");
        }
        let twice = [
            ("host", "chat.example"),
            ("origin", "https://chat.example"),
            ("origin", "https://chat.example"),
        ];
        assert_eq!(named("https", &twice), PageOrigin::Foreign);
        let no_host = [("origin", "https://chat.example")];
        assert_eq!(named("https", &no_host), PageOrigin::Foreign);
    }

    #[test]
    fn request_without_origin_is_absent() {
        let host = [("host", "chat.example")];
        assert_eq!(named("https", &host), PageOrigin::Absent);
    }
}
