//! The address of the client, found through trusted proxies.
//!
//! Each proxy appends to `X-Forwarded-For` the address of its own client, and to
//! `X-Forwarded-Proto` the protocol of that connection. Both lists are read from the right, as long
//! as the hop that wrote an entry is trusted, so that entries of the client itself are never
//! believed. `Forwarded` (RFC 7239) is not read: a proxy that writes the other two passes a forged
//! `Forwarded` on.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

use crate::api::list_header::{items, trim};
use crate::api::state::AppState;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The other end of the connection; put into every request's extensions by the server.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// The client's address: the peer, or, behind trusted proxies, the rightmost hop that is not
/// trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientAddress(pub IpAddr);

impl FromRequestParts<AppState> for ClientAddress {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Infallible> {
        Ok(Self::of(parts, &state.server.trusted_proxies))
    }
}

impl ClientAddress {
    /// The client of a request, with these networks trusted.
    pub fn of(parts: &Parts, trusted: &[IpNet]) -> Self {
        Self(Hops::of(parts, trusted).client)
    }
}

/// Whether the client uses TLS, as a trusted proxy says. The service itself does not speak TLS.
pub fn is_tls(parts: &Parts, trusted: &[IpNet]) -> bool {
    Hops::of(parts, trusted).is_tls(&parts.headers)
}

/// The hops that a request took to this service, as far as they are trusted.
struct Hops {
    client: IpAddr,
    /// How many entries of `X-Forwarded-For` lie between the peer and the client, the client's own
    /// included; `None` if the peer is not trusted.
    walked: Option<usize>,
}

impl Hops {
    fn of(parts: &Parts, trusted: &[IpNet]) -> Self {
        // The server sets the peer of every request. An unroutable address takes the place of a
        // missing one.
        let peer = parts.extensions.get::<Peer>();
        let peer = peer.map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0.ip());
        Self::walk(peer.to_canonical(), &parts.headers, trusted)
    }

    fn walk(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> Self {
        let is_trusted = |address| trusted.iter().any(|network| network.contains(&address));
        if !is_trusted(peer) {
            return Self {
                client: peer,
                walked: None,
            };
        }
        let (mut client, mut walked) = (peer, 0);
        for hop in items(headers, &X_FORWARDED_FOR).rev() {
            if !is_trusted(client) {
                break;
            }
            // A hop that cannot be read ends the walk: anybody may have written the entries to the
            // left of it.
            let Some(address) = hop_address(hop) else {
                break;
            };
            client = address;
            walked += 1;
        }
        Self {
            client,
            walked: Some(walked),
        }
    }

    /// Reads the entry of `X-Forwarded-Proto` at the same position from the right as the client's
    /// address in `X-Forwarded-For`: the same proxy wrote both. Some proxies write one value for
    /// all hops, or fewer than there are hops; the first value then is that of the client's
    /// connection.
    fn is_tls(&self, headers: &HeaderMap) -> bool {
        let Some(walked) = self.walked else {
            return false;
        };
        let protos: Vec<&[u8]> = items(headers, &X_FORWARDED_PROTO).collect();
        let proto = protos.get(protos.len().saturating_sub(walked.max(1)));
        // Some proxies name the protocol of a WebSocket by its own scheme.
        proto.is_some_and(|proto| {
            let proto = unquoted(proto);
            proto.eq_ignore_ascii_case(b"https") || proto.eq_ignore_ascii_case(b"wss")
        })
    }
}

/// Reads a hop in all the forms that proxies write: an address alone, in brackets, in quotes, with
/// a port, with the zone of a link-local address. `None` if it is no address, such as `unknown`.
fn hop_address(hop: &[u8]) -> Option<IpAddr> {
    let hop = std::str::from_utf8(unquoted(hop)).ok()?;
    let (host, rest) = match hop.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        // More than one colon is an IPv6 address, which has no port without brackets.
        None if hop.bytes().filter(|byte| *byte == b':').count() == 1 => {
            hop.split_at(hop.find(':')?)
        }
        None => (hop, ""),
    };
    // RFC 7239, section 6: a port is a number, or a name that hides it and begins with `_`.
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let is_port = |port: &str| match port.strip_prefix('_') {
        Some(name) => !name.is_empty() && name.bytes().all(is_name),
        None => !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()),
    };
    if !rest.is_empty() && !rest.strip_prefix(':').is_some_and(is_port) {
        return None;
    }
    let address = match host.split_once('%') {
        Some((address, _zone)) => address.parse::<Ipv6Addr>().ok()?.into(),
        None => host.parse::<IpAddr>().ok()?,
    };
    Some(address.to_canonical())
}

fn unquoted(item: &[u8]) -> &[u8] {
    match item {
        [b'"', inner @ .., b'"'] => trim(inner),
        item => item,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const FOR: &str = "x-forwarded-for";
    const PROTO: &str = "x-forwarded-proto";

    fn headers(lines: &[(&'static str, &[u8])]) -> HeaderMap {
        let lines = lines.iter().map(|(name, value)| {
            let value = HeaderValue::from_bytes(value).unwrap();
            (HeaderName::from_static(name), value)
        });
        lines.collect()
    }

    fn walk(peer: &str, headers: &HeaderMap) -> Hops {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
        Hops::walk(peer.parse().unwrap(), headers, &trusted)
    }

    fn seen(peer: &str, forwarded: &[&str]) -> String {
        let lines = forwarded.iter().map(|line| (FOR, line.as_bytes()));
        let lines: Vec<_> = lines.collect();
        walk(peer, &headers(&lines)).client.to_string()
    }

    #[test]
    fn a_peer_that_is_not_trusted_is_the_client_whatever_it_says() {
        assert_eq!(seen("203.0.113.9", &["198.51.100.1"]), "203.0.113.9");
        assert_eq!(seen("203.0.113.9", &[]), "203.0.113.9");
    }

    #[test]
    fn behind_trusted_proxies_the_rightmost_untrusted_hop_is_the_client() {
        assert_eq!(seen("10.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(
            seen("10.0.0.1", &["6.6.6.6, 198.51.100.1, 10.0.0.7"]),
            "198.51.100.1"
        );
        assert_eq!(
            seen("10.0.0.1", &["6.6.6.6", "198.51.100.1, 10.0.0.7"]),
            "198.51.100.1"
        );
        assert_eq!(seen("10.0.0.1", &["10.0.0.9,10.0.0.7"]), "10.0.0.9");
        assert_eq!(seen("10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn a_hop_is_read_in_every_form_that_proxies_write() {
        for (hop, address) in [
            ("198.51.100.1:4711", "198.51.100.1"),
            ("\"198.51.100.1:4711\"", "198.51.100.1"),
            ("198.51.100.1:_hidden.port-1", "198.51.100.1"),
            ("[2001:db8::2]:_x", "2001:db8::2"),
            ("2001:db8::2", "2001:db8::2"),
            ("2001:DB8:0::2", "2001:db8::2"),
            ("[2001:db8::2]", "2001:db8::2"),
            ("[2001:db8::2]:443", "2001:db8::2"),
            ("\"[2001:db8::2]\"", "2001:db8::2"),
            ("\"[2001:db8::2]:443\"", "2001:db8::2"),
            ("\"2001:db8::2\"", "2001:db8::2"),
            ("fe80::1%eth0", "fe80::1"),
            ("[fe80::1%25eth0]:443", "fe80::1"),
            ("::ffff:198.51.100.1", "198.51.100.1"),
            ("[::ffff:198.51.100.1]:80", "198.51.100.1"),
            ("\t198.51.100.1\t", "198.51.100.1"),
        ] {
            assert_eq!(seen("10.0.0.1", &[hop]), address, "{hop}");
            assert_eq!(
                seen("::1", &["6.6.6.6", &format!("{hop},10.0.0.7")]),
                address
            );
        }
    }

    #[test]
    fn a_hop_that_cannot_be_read_ends_the_walk() {
        for hop in [
            "unknown",
            "_hidden",
            "",
            "\"",
            "unix:",
            "198.51.100.1:",
            "198.51.100.1:http",
            "198.51.100.1:_",
            "198.51.100.1:_a b",
            "198.51.100.1%eth0",
            "[2001:db8::2",
            "[2001:db8::2]443",
            "[2001:db8::2]:",
            "2001:db8::2]:443",
            "198.51.100.1 198.51.100.2",
            "for=198.51.100.1",
            "größe",
        ] {
            let list = format!("6.6.6.6, {hop}, 10.0.0.2");
            assert_eq!(seen("10.0.0.1", &[&list]), "10.0.0.2", "{hop}");
            let lines = ["6.6.6.6", hop];
            assert_eq!(seen("10.0.0.1", &lines), "10.0.0.1", "{hop}");
        }
    }

    #[test]
    fn hop_with_invalid_bytes_does_not_hide_the_others() {
        let line = b"6.6.6.6, gr\xf6\xdfe, 198.51.100.1, 10.0.0.2";
        let headers = headers(&[(FOR, line)]);
        let client = walk("10.0.0.1", &headers).client;
        assert_eq!(client.to_string(), "198.51.100.1");
    }

    #[test]
    fn tls_is_known_from_the_proxy_that_the_client_connected_to() {
        let is_tls = |peer: &str, hops: &str, protos: &[&str]| {
            let protos = protos.iter().map(|line| (PROTO, line.as_bytes()));
            let hops = (!hops.is_empty()).then_some((FOR, hops.as_bytes()));
            let headers = headers(&hops.into_iter().chain(protos).collect::<Vec<_>>());
            walk(peer, &headers).is_tls(&headers)
        };
        let (client, two_hops) = ("198.51.100.1", "198.51.100.1, 10.0.0.2");
        // One value counts, however many hops there are.
        for hops in ["", client, two_hops] {
            for proto in ["https", "HTTPS", " https\t", "\"https\"", "wss"] {
                assert!(is_tls("10.0.0.1", hops, &[proto]), "{hops} {proto}");
            }
            for proto in ["http", "", "httpss", "größe"] {
                assert!(!is_tls("10.0.0.1", hops, &[proto]), "{hops} {proto}");
            }
        }
        assert!(is_tls("10.0.0.1", two_hops, &["https,http"]));
        assert!(is_tls("10.0.0.1", two_hops, &["https", "http"]));
        assert!(!is_tls("10.0.0.1", two_hops, &["http,https"]));
        // The first of three is the client's own invention.
        assert!(is_tls("10.0.0.1", two_hops, &["http, https, http"]));
        assert!(!is_tls("10.0.0.1", two_hops, &["https, http, http"]));
        assert!(!is_tls("10.0.0.1", client, &["https,http"]));
        assert!(is_tls("10.0.0.1", "", &["http,https"]));
        // Of three hops the second says nothing: the first entry is still the client's.
        let three_hops = "198.51.100.1, 10.0.0.3, 10.0.0.2";
        assert!(is_tls("10.0.0.1", three_hops, &["https,http"]));
        assert!(!is_tls("203.0.113.9", client, &["https"]));
        assert!(!is_tls("10.0.0.1", client, &[]));
    }
}
