use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;

use super::first_line;
use crate::credentials::{ApiKeyText, Claims, Keys, TokenError, TokenType};
use crate::domain::Timestamp;

const SECRET: &str = "a secret of thirty-two bytes....";
const OTHER: &str = "another one of thirty-two bytes.";
/// 2026-11-24T12:00:00Z.
const NOW: Timestamp = Timestamp(1_795_521_600_000_000);

/// A token: the first line is its header, the rest its payload. It is signed here, because no
/// fuzzer finds a signature. The bytes as they are serve as a token without one.
///
/// A token that is not signed by one of the keys is invalid, and so is a signed one with any byte
/// changed. The claims of a valid token are those that a JSON parser finds in its payload.
///
/// The bytes are an API key, too: one that is read has the right checksum, and any other character
/// in it breaks it.
pub fn tokens(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Some(key) = ApiKeyText::parse(text)
    {
        assert_eq!(key.expose(), text);
        assert!(ApiKeyText::is_meant(text) && text[3..].starts_with(key.id().as_str()));
        assert_eq!(ApiKeyText::parse(&changed(text, data.len() % 46)), None);
    }
    let keys = Keys::new(SECRET, []);
    if let Ok(token) = std::str::from_utf8(data) {
        let verified = keys.verify(token, TokenType::Access, Some(NOW));
        let is_signed = token
            .rsplit_once('.')
            .is_some_and(|(signed, signature)| signature == sign(signed));
        assert!(is_signed || verified == Err(TokenError::Invalid));
    }
    let (header, payload) = first_line(data);
    let signed = [header, payload].map(|part| URL_SAFE_NO_PAD.encode(part));
    let signed = signed.join(".");
    let token = format!("{signed}.{}", sign(&signed));
    let [access, refresh] = [TokenType::Access, TokenType::Refresh].map(|token_type| {
        let verified = keys.verify(&token, token_type, Some(NOW));
        let rotated = Keys::new(OTHER, [SECRET]);
        assert_eq!(rotated.verify(&token, token_type, Some(NOW)), verified);
        let foreign = Keys::new(OTHER, []).verify(&token, token_type, Some(NOW));
        assert_eq!(foreign, Err(TokenError::Invalid));
        if let Ok(claims) = &verified {
            assert_eq!(keys.verify(&token, token_type, None).as_ref(), Ok(claims));
            check(claims, header, payload, token_type);
        }
        verified
    });
    assert!(access.is_err() || refresh.is_err());
    if access.is_ok() {
        let changed = changed(&token, data.len());
        let verified = keys.verify(&changed, TokenType::Access, Some(NOW));
        assert_eq!(verified, Err(TokenError::Invalid));
    }
}

fn sign(signed: &str) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("any length");
    let signature = mac.chain_update(signed).finalize().into_bytes();
    URL_SAFE_NO_PAD.encode(signature)
}

/// The token with another character at one place.
fn changed(token: &str, choice: usize) -> String {
    let at = choice % token.len();
    let other = if token.as_bytes()[at] == b'A' {
        "B"
    } else {
        "A"
    };
    let mut changed = token.to_owned();
    changed.replace_range(at..=at, other);
    changed
}

/// Compares the claims with what a JSON parser finds.
fn check(claims: &Claims, header: &[u8], payload: &[u8], token_type: TokenType) {
    let json = |bytes| serde_json::from_slice::<Value>(bytes).expect("a token that counts is JSON");
    let (header, payload) = (json(header), json(payload));
    assert_eq!(header["alg"], "HS256");
    assert_eq!(payload["token_type"], token_type.as_str());
    assert_eq!(payload["jti"], claims.jti.as_str());
    let expires = payload["exp"].as_f64().expect("a number");
    assert!(expires > 1_795_521_600.0 && claims.expires_at > NOW);
    let user = payload.get("user_id").map(|user| match user.as_str() {
        Some(digits) => digits.parse::<i64>().ok(),
        None => user.as_i64(),
    });
    assert_eq!(user, claims.user_id.map(|user| Some(user.0)));
}
