//! Session secrets: what the `session` cookie holds, and what the store keeps of it.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

/// 32 random bytes that identify a session. A holder of them can act as the user, so only the
/// browser keeps them.
#[derive(Clone, PartialEq, Eq)]
pub struct SessionSecret([u8; 32]);

impl SessionSecret {
    /// A secret that cannot be guessed. Errors: the system has no randomness.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a cookie's value; `None` if it is not what [`cookie_value`](Self::cookie_value)
    /// writes.
    pub fn from_cookie(value: &[u8]) -> Option<Self> {
        // 43 letters hold 32 bytes; longer texts are not decoded at all.
        if value.len() != 43 {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(value).ok()?;
        bytes.try_into().ok().map(Self)
    }

    /// The value of the cookie: 43 letters of base64url.
    pub fn cookie_value(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// What the store keeps: SHA-256 of the bytes. Plain and unsalted is enough for 256 random
    /// bits.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0).into()
    }
}

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_differ() {
        assert_ne!(
            SessionSecret::random().unwrap(),
            SessionSecret::random().unwrap()
        );
    }

    #[test]
    fn stored_hash_is_sha_256_of_the_bytes() {
        let hash = SessionSecret([0; 32]).hash();
        assert_eq!(hash[..4], [0x66, 0x68, 0x7a, 0xad]);
        assert_ne!(hash, SessionSecret([1; 32]).hash());
    }

    #[test]
    fn other_cookies_are_no_secret() {
        let value = SessionSecret([0xff; 32]).cookie_value();
        assert_eq!(value, "_".repeat(42) + "8");
        for broken in [
            "",
            "x",
            &value[1..],
            &format!("{value}="),
            &("_".repeat(42) + "9"),
            &("+".repeat(42) + "8"),
            &"ñ".repeat(22),
        ] {
            let read = SessionSecret::from_cookie(broken.as_bytes());
            assert_eq!(read, None, "{broken}");
        }
        assert_eq!(SessionSecret::from_cookie(&[b'A'; 1 << 20]), None);
    }

    #[test]
    fn debug_output_hides_the_secret() {
        assert_eq!(
            format!("{:?}", SessionSecret([1; 32])),
            "SessionSecret(hidden)"
        );
    }

    proptest::proptest! {
        #[test]
        fn secret_survives_the_cookie(bytes: [u8; 32]) {
            let secret = SessionSecret(bytes);
            proptest::prop_assert_eq!(SessionSecret::from_cookie(secret.cookie_value().as_bytes()), Some(secret));
        }

        #[test]
        fn any_cookie_is_read_or_refused_without_a_panic(value: Vec<u8>, letters in "[A-Za-z0-9_-]{43}") {
            for value in [value, letters.into_bytes()] {
                let read = SessionSecret::from_cookie(&value);
                proptest::prop_assert!(read.is_none_or(|secret| secret.cookie_value().as_bytes() == value));
            }
        }
    }
}
