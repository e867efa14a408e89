//! The session cookie: how it is found among others, set and cleared.
//!
//! Over TLS its name has the prefix `__Host-`. A browser then accepts it from this host only, so
//! that a page of a neighbouring domain cannot set it. Without TLS the prefix is not allowed. A
//! browser may have both cookies after a service has moved to TLS, and several of one name if other
//! pages of the domain set them; all of them are tried.

use axum::http::header::{COOKIE, SET_COOKIE};
use axum::http::{HeaderMap, HeaderValue};

use super::list_header::trim;

/// The cookie's name without TLS.
pub const PLAIN_NAME: &str = "session";
/// The cookie's name over TLS.
pub const TLS_NAME: &str = "__Host-session";

/// The values of all session cookies of a request, good or not: first those that only this host can
/// have set, and each kind in the order in which the client sends it.
///
/// Other cookies may hold any bytes and have any form: the header is split at each `;`, and nothing
/// else of it is interpreted. How many there are is bounded by the size of a request's head.
pub fn session_cookies(headers: &HeaderMap) -> Vec<&[u8]> {
    let values_of = |name: &'static str| {
        let lines = headers.get_all(COOKIE).iter();
        let pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';'));
        pairs.filter_map(move |pair| value_of(pair, name))
    };
    values_of(TLS_NAME).chain(values_of(PLAIN_NAME)).collect()
}

/// The cookie's value without blanks and quotes around it, if the cookie has that name.
fn value_of<'a>(pair: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let at = pair.iter().position(|byte| *byte == b'=')?;
    if trim(&pair[..at]) != name.as_bytes() {
        return None;
    }
    Some(match trim(&pair[at + 1..]) {
        [b'"', inner @ .., b'"'] => inner,
        value => value,
    })
}

/// Gives the browser a session for `max_age` seconds.
pub fn set(headers: &mut HeaderMap, secret: &str, max_age: u64, is_secure: bool) {
    let name = if is_secure { TLS_NAME } else { PLAIN_NAME };
    headers.append(SET_COOKIE, cookie(name, secret, max_age, is_secure));
}

/// Takes the cookies of both names back from the browser.
pub fn clear(headers: &mut HeaderMap, is_secure: bool) {
    headers.append(SET_COOKIE, cookie(PLAIN_NAME, "", 0, is_secure));
    // A browser refuses a cookie of this name without `Secure`, even to delete it.
    headers.append(SET_COOKIE, cookie(TLS_NAME, "", 0, true));
}

fn cookie(name: &str, secret: &str, max_age: u64, is_secure: bool) -> HeaderValue {
    let secure = if is_secure { "; Secure" } else { "" };
    format!("{name}={secret}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Lax{secure}")
        .try_into()
        .expect("names, digits and a secret in base64url are a header value")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(lines: &[&[u8]]) -> Vec<String> {
        let lines = lines.iter().map(|line| HeaderValue::from_bytes(line));
        let headers: HeaderMap = lines.map(|line| (COOKIE, line.unwrap())).collect();
        let values = session_cookies(&headers).into_iter();
        values
            .map(|value| String::from_utf8_lossy(value).into_owned())
            .collect()
    }

    #[test]
    fn the_session_is_found_beside_cookies_of_any_form() {
        for line in [
            &b"session=s3cret"[..],
            b"a=b; session=s3cret; c=d",
            b"a=b;session=s3cret;c=d",
            b"theme=gr\xc3\xb6\xc3\x9fe; session=s3cret",
            b"\xff\xfe; session=s3cret; \x80=\x80",
            b"nameless; ; =; ==; session=s3cret",
            b"json={\"a\":\"b\", \"c\"}; session=s3cret",
            b"quote=\"; session=s3cret; \"",
            b"session=\"s3cret\"",
            b"\t session\t=\ts3cret \t",
            b"a=\tb; session=s3cret",
        ] {
            assert_eq!(found(&[line]), ["s3cret"], "{line:?}");
        }
        assert_eq!(found(&[b"a=\xff", b"session=s3cret", b"c"]), ["s3cret"]);
    }

    #[test]
    fn other_names_are_no_session() {
        for line in [
            &b"sessions=x; mysession=y; session; Session=z"[..],
            b"__host-session=x; __Host-sessions=y; __Secure-session=z",
            b"a=session=x",
            b"",
        ] {
            assert_eq!(found(&[line]), [""; 0], "{line:?}");
        }
    }

    #[test]
    fn all_session_cookies_are_found_those_of_this_host_first() {
        assert_eq!(
            found(&[
                b"session=a; __Host-session=b; session=",
                b"__Host-session=c=d"
            ]),
            ["b", "c=d", "a", ""]
        );
    }

    #[test]
    fn a_long_header_is_read_to_its_end() {
        let many = "a=b; ".repeat(10_000) + "session=s3cret";
        assert_eq!(found(&[many.as_bytes()]), ["s3cret"]);
    }
}
