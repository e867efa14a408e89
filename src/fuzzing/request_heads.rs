use std::net::{IpAddr, SocketAddr};

use axum::http::header::{
    CONNECTION, COOKIE, HOST, ORIGIN, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SET_COOKIE,
    UPGRADE,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request};
use ipnet::IpNet;

use crate::api::authenticate::bearer_token;
use crate::api::extract::{ClientAddress, Peer, is_tls};
use crate::api::page_origin::PageOrigin;
use crate::api::session_cookie::{self, session_cookies};
use crate::api::ws::handshake;
use crate::config::normal_origin;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// The most lines of a head that are looked at.
const MOST_LINES: usize = 32;
/// An address that only a forger writes.
const FORGED: &str = "203.0.113.250";
const ALLOWED: &str = "https://app.example";

/// The head of a request, one header a line.
///
/// Lines of one name are one list. Entries of the client to the left of its proxy's entry change
/// nothing. A cookie that this service set is found again. A page of another host is foreign.
pub fn request_heads(data: &[u8]) {
    let headers = read_head(data);
    addresses(&headers);
    cookies(&headers);
    origins(&headers);
    sockets(&headers);
    if let Ok(Some(token)) = bearer_token(&headers) {
        assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
    }
}

fn read_head(data: &[u8]) -> HeaderMap {
    let lines = data.split(|byte| *byte == b'\n').take(MOST_LINES);
    let parsed = lines.filter_map(|line| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        Some((name, value))
    });
    parsed.collect()
}

/// The headers with the lines of `name` as one, with `separator` between them.
fn joined(headers: &HeaderMap, name: &HeaderName, separator: &[u8]) -> HeaderMap {
    let mut headers = headers.clone();
    let lines: Vec<&[u8]> = headers
        .get_all(name)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if !lines.is_empty() {
        let line = HeaderValue::from_bytes(&lines.join(separator));
        headers.insert(name, line.expect("header values joined are one"));
    }
    headers
}

/// A request with these headers over a connection from `peer`.
fn request(headers: &HeaderMap, peer: [u8; 4]) -> Parts {
    let mut request = Request::new(());
    *request.headers_mut() = headers.clone();
    request
        .extensions_mut()
        .insert(Peer(SocketAddr::from((peer, 4711))));
    request.into_parts().0
}

fn addresses(headers: &HeaderMap) {
    let trusted: [IpNet; 2] = ["10.0.0.0/8", "fd00::/8"].map(|net| net.parse().expect("a network"));
    let seen = |headers: &HeaderMap, peer| {
        let parts = request(headers, peer);
        (
            ClientAddress::of(&parts, &trusted).0,
            is_tls(&parts, &trusted),
        )
    };
    // Nobody believes a stranger.
    let stranger = [198, 51, 100, 1];
    assert_eq!(seen(headers, stranger), (IpAddr::from(stranger), false));
    let proxy = [10, 0, 0, 1];
    let (client, is_tls) = seen(headers, proxy);
    assert_eq!(client, client.to_canonical());
    let joined = joined(headers, &FORWARDED_FOR, b",");
    let joined = self::joined(&joined, &FORWARDED_PROTO, b",");
    assert_eq!(seen(&joined, proxy), (client, is_tls), "lines are one list");

    let mut forged = headers.clone();
    let mut line = FORGED.as_bytes().to_vec();
    for honest in headers.get_all(&FORWARDED_FOR) {
        line.extend_from_slice(b",");
        line.extend_from_slice(honest.as_bytes());
    }
    forged.insert(
        FORWARDED_FOR,
        HeaderValue::from_bytes(&line).expect("header values joined are one"),
    );
    let (with_forged, _) = seen(&forged, proxy);
    let is_trusted = trusted.iter().any(|network| network.contains(&client));
    let is_forged = with_forged == FORGED.parse::<IpAddr>().expect("an address");
    assert!(with_forged == client || (is_trusted && is_forged));
}

fn cookies(headers: &HeaderMap) {
    let found = session_cookies(headers);
    let of_one_line = joined(headers, &COOKIE, b"; ");
    assert_eq!(found, session_cookies(&of_one_line), "lines are one list");
    for is_secure in [true, false] {
        let mut answer = HeaderMap::new();
        session_cookie::set(&mut answer, "s3cret", 60, is_secure);
        let set = answer[SET_COOKIE].to_str().expect("ours is text");
        let pair = set.split(';').next().unwrap_or_default();
        let mut next = headers.clone();
        next.append(COOKIE, HeaderValue::from_str(pair).expect("ours is text"));
        let after = session_cookies(&next);
        assert_eq!(after.len(), found.len() + 1);
        assert!(after.contains(&&b"s3cret"[..]));
    }
}

fn origins(headers: &HeaderMap) {
    let allowed = [ALLOWED.to_owned()];
    for scheme in ["http", "https"] {
        let named = PageOrigin::named(headers, scheme, &allowed);
        let is_absent = !headers.contains_key(ORIGIN);
        assert_eq!(named == PageOrigin::Absent, is_absent);
        if named != PageOrigin::Allowed {
            continue;
        }
        let origin = headers[ORIGIN].to_str().expect("an allowed one is text");
        let origin = normal_origin(origin);
        let own = headers.get(HOST).map(|host| {
            let host = String::from_utf8_lossy(host.as_bytes());
            normal_origin(&format!("{scheme}://{host}"))
        });
        assert!(origin == ALLOWED || own == Some(origin));
        let mut elsewhere = headers.clone();
        elsewhere.insert(HOST, HeaderValue::from_static("elsewhere.example"));
        let elsewhere = PageOrigin::named(&elsewhere, scheme, &allowed);
        let origin = headers[ORIGIN].to_str().map(normal_origin);
        let is_listed = origin.is_ok_and(|origin| {
            origin == ALLOWED || origin == format!("{scheme}://elsewhere.example")
        });
        assert_eq!(elsewhere == PageOrigin::Allowed, is_listed);
    }
}

fn sockets(headers: &HeaderMap) {
    let parts = request(headers, [198, 51, 100, 1]);
    let answer = handshake::accept(&parts);
    let mut of_one_line = headers.clone();
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_PROTOCOL] {
        of_one_line = joined(&of_one_line, &name, b", ");
    }
    let again = handshake::accept(&request(&of_one_line, [198, 51, 100, 1]));
    let head = |answer: &axum::response::Response| (answer.status(), answer.headers().clone());
    assert_eq!(answer.as_ref().map(head), again.as_ref().map(head));
    if let Some(answer) = answer {
        assert_eq!(answer.status(), 101);
        assert!(headers.contains_key(SEC_WEBSOCKET_KEY));
    }
    assert_eq!(
        handshake::protocol_token(headers),
        handshake::protocol_token(&of_one_line)
    );
}
