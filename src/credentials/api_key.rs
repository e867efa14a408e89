//! The texts of API keys: `ps_`, 8 characters of id, 32 of secret and 6 of checksum, all base62.
//!
//! The prefix and the checksum let scanners of source code recognise a key that leaked, and let
//! this service refuse any other text without asking the store.

use std::fmt;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::domain::ApiKeyId;
use crate::domain::api_key::base62_digit;

/// What every key begins with. No access token does: it would begin with `ey`.
const PREFIX: &str = "ps_";
/// Characters of the secret: 190 bits.
const SECRET: usize = 32;
/// Characters of the checksum: 62⁶ is more than 2³².
const CHECKSUM: usize = 6;
/// Where the checksum begins.
const PAYLOAD: usize = PREFIX.len() + ApiKeyId::LENGTH + SECRET;
/// Characters of a key.
const LENGTH: usize = PAYLOAD + CHECKSUM;

/// The whole text of an API key. Only its user keeps it.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKeyText {
    id: ApiKeyId,
    text: String,
}

impl ApiKeyText {
    /// A key with a new id and a secret that cannot be guessed. Errors: the system has no
    /// randomness.
    pub fn random() -> Result<Self, getrandom::Error> {
        let id = String::from_utf8(random_characters(ApiKeyId::LENGTH)?).ok();
        let id = id.and_then(|id| ApiKeyId::parse(&id));
        Self::with_id(id.expect("random characters are base62"))
    }

    /// A key of that id with a new secret. Errors: the system has no randomness.
    pub fn with_id(id: ApiKeyId) -> Result<Self, getrandom::Error> {
        let secret = random_characters(SECRET)?;
        let mut text = format!("{PREFIX}{id}");
        text.extend(secret.into_iter().map(char::from));
        let checksum = checksum(text.as_bytes());
        text.extend(checksum.map(char::from));
        Ok(Self { id, text })
    }

    /// Reads a key; `None` if the text is none. That it is one says nothing about whether it was
    /// ever given out.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let is_base62 = bytes
            .get(PREFIX.len()..)?
            .iter()
            .all(u8::is_ascii_alphanumeric);
        if bytes.len() != LENGTH || !is_base62 || !Self::is_meant(text) {
            return None;
        }
        let (payload, sum) = bytes.split_at(PAYLOAD);
        let id = ApiKeyId::parse(&text[PREFIX.len()..PREFIX.len() + ApiKeyId::LENGTH])?;
        (checksum(payload) == sum).then(|| Self {
            id,
            text: text.to_owned(),
        })
    }

    /// Whether a bearer token is meant to be an API key, well-formed or not.
    pub fn is_meant(token: &str) -> bool {
        token.starts_with(PREFIX)
    }

    /// The key's id.
    pub fn id(&self) -> ApiKeyId {
        self.id
    }

    /// The text that the user gets.
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// The last four characters, by which a user tells one key from another. They are of the
    /// checksum.
    pub fn last_four(&self) -> &str {
        &self.text[LENGTH - 4..]
    }

    /// What the store keeps: SHA-256 of the whole text. Plain and unsalted is enough for 190 random
    /// bits.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.text.as_bytes()).into()
    }
}

impl fmt::Debug for ApiKeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeyText({}, hidden)", self.id)
    }
}

/// Compares hashes of keys, in a time that does not depend on where they differ.
pub fn is_same_hash(one: &[u8; 32], other: &[u8; 32]) -> bool {
    one.ct_eq(other).into()
}

/// Random characters of base62, each as likely as the others.
fn random_characters(count: usize) -> Result<Vec<u8>, getrandom::Error> {
    let mut characters = Vec::with_capacity(count);
    let mut bytes = [0_u8; 64];
    while characters.len() < count {
        getrandom::fill(&mut bytes)?;
        // Six bits are a number below 64; 62 and 63 are passed over. A remainder would make some
        // characters more likely than others.
        let drawn = bytes
            .iter()
            .filter_map(|byte| base62_digit(usize::from(byte & 63)));
        characters.extend(drawn.take(count - characters.len()));
    }
    Ok(characters)
}

/// The CRC-32 of the bytes as six digits of base62, the highest first.
fn checksum(payload: &[u8]) -> [u8; CHECKSUM] {
    let mut rest = crc32(payload);
    let mut digits = [b'0'; CHECKSUM];
    for digit in digits.iter_mut().rev() {
        *digit = base62_digit(rest as usize % 62).unwrap_or(b'0');
        rest /= 62;
    }
    digits
}

/// CRC-32 as in gzip (RFC 1952, section 8), bit by bit: 43 bytes take a third of a microsecond.
fn crc32(bytes: &[u8]) -> u32 {
    let sum = bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg())
        })
    });
    !sum
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn key_has_the_documented_form_and_is_read_back() {
        let key = ApiKeyText::random().unwrap();
        let text = key.expose();
        assert_eq!(text.len(), 49);
        assert_eq!(&text[..11], format!("ps_{}", key.id()));
        assert!(text.ends_with(key.last_four()) && key.last_four().len() == 4);
        assert_eq!(ApiKeyText::parse(text), Some(key));
    }

    #[test]
    fn checksum_is_that_of_gzip_in_base_62() {
        // The check value of CRC-32/ISO-HDLC.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(checksum(b"123456789"), *b"3jZRME");
        let zeros = "ps_".to_owned() + &"0".repeat(40);
        let text = zeros.clone() + std::str::from_utf8(&checksum(zeros.as_bytes())).unwrap();
        assert_eq!(ApiKeyText::parse(&text).unwrap().id().as_str(), "00000000");
    }

    #[test]
    fn another_secret_keeps_the_id() {
        let first = ApiKeyText::random().unwrap();
        let second = ApiKeyText::with_id(first.id()).unwrap();
        assert_eq!(first.id(), second.id());
        assert_ne!(first.hash(), second.hash());
        assert!(!is_same_hash(&first.hash(), &second.hash()));
        assert!(is_same_hash(&first.hash(), &first.clone().hash()));
    }

    #[test]
    fn stored_hash_is_sha_256_of_the_whole_text() {
        let key = ApiKeyText::random().unwrap();
        let expected: [u8; 32] = Sha256::digest(key.expose()).into();
        assert_eq!(key.hash(), expected);
    }

    #[test]
    fn one_changed_character_breaks_a_key() {
        let key = ApiKeyText::random().unwrap();
        for at in 0..LENGTH {
            for other in (0..62).filter_map(base62_digit) {
                let mut text = key.expose().as_bytes().to_vec();
                if text[at] != other {
                    text[at] = other;
                    let text = String::from_utf8(text).unwrap();
                    assert_eq!(ApiKeyText::parse(&text), None, "{text}");
                }
            }
        }
    }

    #[test]
    fn other_texts_are_no_keys() {
        let key = ApiKeyText::random().unwrap();
        let text = key.expose();
        for bad in [
            "",
            "ps_",
            "ps",
            &text[1..],
            &text[..48],
            &format!("{text}0"),
            &format!(" {text}"),
            &text.replacen("ps_", "PS_", 1),
            &"é".repeat(24),
            &format!("ps_{}", "é".repeat(23)),
            &"0".repeat(1 << 20),
        ] {
            assert_eq!(ApiKeyText::parse(bad), None, "{bad:.60}");
        }
    }

    #[test]
    fn every_character_is_drawn_about_as_often() {
        let mut counts: BTreeMap<u8, u32> = BTreeMap::new();
        for character in random_characters(62_000).unwrap() {
            *counts.entry(character).or_default() += 1;
        }
        assert_eq!(counts.len(), 62);
        // A thousand of each is expected, with a standard deviation of 32: ten of them is an
        // accident that never happens, and a bias by a remainder would be 250.
        for (character, count) in counts {
            assert!((680..1320).contains(&count), "{character}: {count}");
        }
    }

    #[test]
    fn debug_output_hides_the_secret() {
        let key = ApiKeyText::random().unwrap();
        assert!(!format!("{key:?}").contains(&key.expose()[11..]));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_refused_without_a_panic(text: String, near in "ps_[0-9A-Za-z]{46}") {
            proptest::prop_assert_eq!(ApiKeyText::parse(&text), None);
            let read = ApiKeyText::parse(&near);
            proptest::prop_assert!(read.is_none_or(|key| key.expose() == near));
        }
    }
}
