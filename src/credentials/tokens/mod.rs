//! Access and refresh tokens: JSON Web Tokens as SimpleJWT makes and checks them, HS256 only.
//!
//! Services that share the secret key verify these tokens with SimpleJWT, and we verify theirs.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use serde_json::{Map, Value};
use sha2::Sha256;

use crate::domain::{Timestamp, UserId};

/// The longest token that is checked, in bytes. Ours have about 250; no server in use accepts
/// headers of more than 8 KiB.
const MAX_TOKEN_BYTES: usize = 8192;
/// Bytes of a token's id, at most: what the list of revoked tokens keeps.
const MAX_ID_BYTES: usize = 255;
/// The last second of the year 9999: the latest time that the recorded system, and our timestamps,
/// can represent.
const MAX_EXPIRY: i64 = 253_402_300_799;
/// `{"alg":"HS256","typ":"JWT"}`.
const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9";

type HmacSha256 = Hmac<Sha256>;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenType {
    /// Authenticates requests, for minutes.
    Access,
    /// Is exchanged for access tokens, for a day or so.
    Refresh,
}

impl TokenType {
    /// The value of the `token_type` claim.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Refresh => "refresh",
        }
    }
}

/// Why a token is refused. Clients are sent these texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No token, not signed by us, of another algorithm, or with claims of the wrong kind.
    #[error("Token is invalid")]
    Invalid,
    /// It has expired.
    #[error("Token is expired")]
    Expired,
    /// It would never expire.
    #[error("Token has no 'exp' claim")]
    NoExpiry,
    /// It could not be revoked.
    #[error("Token has no id")]
    NoId,
    /// It does not say what it is for.
    #[error("Token has no type")]
    NoType,
    /// It is for something else.
    #[error("Token has wrong type")]
    WrongType,
    /// It does not name a user, or its value cannot be an account.
    #[error("Token contained no recognizable user identification")]
    NoUser,
}

/// The unique id of a token: 128 random bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenId([u8; 16]);

impl TokenId {
    /// An id that no other token has. Errors: the system has no randomness.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

/// The `jti` claim: 32 lower-case hexadecimal digits.
impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What a verified token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Its id, at most 255 bytes.
    pub jti: String,
    /// The user; `None` if the claim is left out. The account need not exist.
    pub user_id: Option<UserId>,
    /// When it was issued, to the second; `None` if the claim is left out.
    pub issued_at: Option<Timestamp>,
    /// From this instant on it has expired.
    pub expires_at: Timestamp,
}

impl Claims {
    /// The user. Errors: `NoUser` if the token does not name one.
    pub fn user(&self) -> Result<UserId, TokenError> {
        self.user_id.ok_or(TokenError::NoUser)
    }
}

/// The secret keys that sign and verify tokens.
#[derive(Clone)]
pub struct Keys {
    /// The key that signs, then those that verify only.
    keys: Vec<HmacSha256>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(hidden)")
    }
}

#[derive(Serialize)]
struct Payload<'a> {
    token_type: &'a str,
    exp: i64,
    iat: i64,
    jti: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
}

impl Keys {
    /// Keys from settings: the bytes of each text. The first signs and verifies, the others verify
    /// only.
    pub fn new<'a>(secret: &'a str, fallbacks: impl IntoIterator<Item = &'a str>) -> Self {
        let key = |text: &str| {
            HmacSha256::new_from_slice(text.as_bytes()).expect("HMAC takes keys of any length")
        };
        let keys = std::iter::once(secret).chain(fallbacks).map(key).collect();
        Self { keys }
    }

    /// Makes a token that is valid from the second of `issued_at` for `lifetime`, both in whole
    /// seconds rounded down. Without a user the claim is left out; such a token authenticates no
    /// user.
    pub fn sign(
        &self,
        token_type: TokenType,
        user: Option<UserId>,
        id: TokenId,
        issued_at: Timestamp,
        lifetime: Duration,
    ) -> String {
        let iat = issued_at.unix_seconds();
        let payload = Payload {
            token_type: token_type.as_str(),
            exp: iat.saturating_add_unsigned(lifetime.as_secs()),
            iat,
            jti: id.to_string(),
            user_id: user.map(|user| user.to_string()),
        };
        let payload = serde_json::to_vec(&payload).expect("a struct of texts and integers is JSON");
        let mut token = format!("{HEADER}.{}", URL_SAFE_NO_PAD.encode(payload));
        let mac = self.keys[0].clone().chain_update(token.as_bytes());
        let signature = mac.finalize().into_bytes();
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        token
    }

    /// Checks a token of any bytes and returns its claims. Without leeway: at the second of `exp`
    /// it has expired. The order of the checks decides which fault is reported of a token with
    /// several, and is SimpleJWT's.
    ///
    /// Whether `iat` is acceptable is left to the caller, which knows the account: see
    /// [`User::credential_state`](crate::domain::User::credential_state).
    ///
    /// Without `now`, a token that is not valid yet or has expired has claims too: the clock may be
    /// wrong, and a token that is logged out must stay so when the clock is right again.
    pub fn verify(
        &self,
        token: &str,
        token_type: TokenType,
        now: Option<Timestamp>,
    ) -> Result<Claims, TokenError> {
        let now = now.map(Timestamp::unix_seconds);
        let claims = self.signed_claims(token).ok_or(TokenError::Invalid)?;
        let jti = match claims.get("jti") {
            None => None,
            Some(Value::String(jti)) if jti.len() <= MAX_ID_BYTES => Some(jti),
            Some(_) => return Err(TokenError::Invalid),
        };
        let issued_at = seconds(&claims, "iat")?;
        let not_before = seconds(&claims, "nbf")?;
        if not_before.zip(now).is_some_and(|(from, now)| from > now) {
            return Err(TokenError::Invalid);
        }
        let expires_at = match seconds(&claims, "exp")? {
            Some(exp) if exp > MAX_EXPIRY => return Err(TokenError::Invalid),
            Some(exp) if now.is_some_and(|now| exp <= now) => return Err(TokenError::Expired),
            Some(exp) => Timestamp::from_unix_seconds(exp),
            None => return Err(TokenError::NoExpiry),
        };
        let jti = jti.ok_or(TokenError::NoId)?.clone();
        let found = claims.get("token_type").ok_or(TokenError::NoType)?;
        if found.as_str() != Some(token_type.as_str()) {
            return Err(TokenError::WrongType);
        }
        let user_id = claims.get("user_id").map(user_id).transpose()?;
        Ok(Claims {
            jti,
            user_id,
            issued_at: issued_at.map(Timestamp::from_unix_seconds),
            expires_at,
        })
    }

    /// The claims of a token with a valid signature. Nothing of an unsigned token is parsed, except
    /// a header that differs from ours.
    fn signed_claims(&self, token: &str) -> Option<Map<String, Value>> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, payload) = signed.split_once('.')?;
        if header != HEADER && !is_plain_hs256(header) {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        self.keys.iter().find(|key| {
            let mac = (*key).clone().chain_update(signed.as_bytes());
            mac.verify_slice(&signature).is_ok()
        })?;
        let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
        serde_json::from_slice(&payload).ok()
    }
}

/// Whether the header names HS256 and no extension that would change what a token means (RFC 7515,
/// section 4.1.11; RFC 7797).
fn is_plain_hs256(header: &str) -> bool {
    let header = URL_SAFE_NO_PAD.decode(header).ok();
    let header = header.and_then(|json| serde_json::from_slice::<Map<String, Value>>(&json).ok());
    header.is_some_and(|header| {
        header.get("alg").and_then(Value::as_str) == Some("HS256")
            && !header.contains_key("crit")
            && !header.contains_key("b64")
    })
}

/// A claim in seconds since the epoch, fractions cut off, capped at the ends of the range. Errors:
/// `Invalid` if it is not a number.
fn seconds(claims: &Map<String, Value>, name: &str) -> Result<Option<i64>, TokenError> {
    let Some(value) = claims.get(name) else {
        return Ok(None);
    };
    let number = match value {
        Value::Number(number) => number,
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            return Err(TokenError::Invalid);
        }
    };
    // Integers that i64 does not hold come out of as_f64, and the cast saturates.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "whole seconds are meant, and the range is capped"
    )]
    let capped = number
        .as_i64()
        .or_else(|| number.as_f64().map(|float| float as i64));
    capped.map(Some).ok_or(TokenError::Invalid)
}

/// The `user_id` claim: digits in a text (SimpleJWT from 5.4 on) or a number (before).
fn user_id(claim: &Value) -> Result<UserId, TokenError> {
    let id = match claim {
        Value::String(text) if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        Value::Number(number) => number.as_i64(),
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            None
        }
    };
    id.map(UserId).ok_or(TokenError::NoUser)
}

#[cfg(test)]
mod tests;
