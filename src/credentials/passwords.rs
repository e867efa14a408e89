//! Password hashes: Argon2id for our own, PBKDF2 as Django stores it for imported accounts.
//!
//! Hashing takes tens of milliseconds and 19 MiB, so only the threads of
//! [`HashPool`](super::HashPool) do it.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use argon2::{Algorithm, Argon2, Block, Params, Version};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// KiB of memory, passes and lanes of a new hash: the least that the contract, and OWASP's list of
/// 2024, ask for.
const MEMORY_KIB: u32 = 19_456;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// Bytes of a new hash and of its salt (RFC 9106, section 4).
const HASH_BYTES: usize = 32;
/// Bytes of a new salt.
pub const SALT_BYTES: usize = 16;

/// The most work that a stored hash may ask of a thread, so that one unusual row cannot occupy it
/// for minutes: some seconds in either case. Django 5.2 itself uses 1,000,000 iterations.
const MAX_PBKDF2_ITERATIONS: u32 = 10_000_000;
const MAX_MEMORY_KIB: u32 = 256 * 1024;
const MAX_PASSES: u32 = 16;
const MAX_LANES: u32 = 16;

/// Used in place of the salt of an account that does not exist.
const NOBODYS_SALT: [u8; SALT_BYTES] = *b"no account's own";

/// The result of comparing a password; by default it is wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// The password is the account's.
    pub ok: bool,
    /// The password is right, but its hash has another algorithm or other costs than new ones:
    /// store a new hash.
    pub needs_rehash: bool,
}

/// A stored hash has an unknown form, or asks for more work than allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored password hash is malformed")]
pub struct MalformedHash;

/// The memory that Argon2 works in, kept from one hash to the next: at a hundred hashes a second,
/// it would cost too much to have the system clear 19 MiB of pages for each.
#[derive(Default)]
pub(super) struct Workspace {
    blocks: Vec<Block>,
    /// Bytes held by all workspaces that share this count.
    held_bytes: Arc<AtomicUsize>,
}

impl Workspace {
    /// Holds nothing yet; adds what it holds later to the count.
    pub(super) fn counted_in(held_bytes: &Arc<AtomicUsize>) -> Self {
        Self {
            blocks: Vec::new(),
            held_bytes: Arc::clone(held_bytes),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.capacity() == 0
    }

    /// Frees the memory.
    pub(super) fn free(&mut self) {
        let freed = std::mem::take(&mut self.blocks).capacity() * Block::SIZE;
        self.held_bytes.fetch_sub(freed, Ordering::Relaxed);
    }

    fn grow(&mut self, blocks: usize) {
        let before = self.blocks.capacity();
        self.blocks.resize(blocks, Block::new());
        let grown = (self.blocks.capacity() - before) * Block::SIZE;
        self.held_bytes.fetch_add(grown, Ordering::Relaxed);
    }

    fn derive(
        &mut self,
        argon2: &Argon2<'_>,
        password: &[u8],
        salt: &[u8],
        hash: &mut [u8],
    ) -> Result<(), MalformedHash> {
        let blocks = argon2.params().block_count();
        if self.blocks.len() < blocks {
            self.grow(blocks);
        }
        argon2
            .hash_password_into_with_memory(password, salt, hash, &mut self.blocks[..blocks])
            .map_err(|_| MalformedHash)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        self.free();
    }
}

/// Hashes a new password: a PHC string, `$argon2id$v=19$m=19456,t=2,p=1$salt$hash`.
pub(super) fn hash(password: &str, salt: [u8; SALT_BYTES], workspace: &mut Workspace) -> String {
    let hash = current_hash(password, salt, workspace);
    let (salt, hash) = (STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(hash));
    format!("$argon2id$v=19$m={MEMORY_KIB},t={PASSES},p={LANES}${salt}${hash}")
}

/// Whether passwords can be compared with a stored hash: for hashes that come from elsewhere.
pub fn is_known_hash(stored: &str) -> bool {
    parse_argon2id(stored).is_ok() || parse_pbkdf2(stored).is_ok()
}

/// Compares a password with a stored hash. `None` is an account that does not exist, and a hash
/// that starts with `!` for one without a password (Django marks them so). Both are always wrong,
/// and cost as much time as one of our own hashes.
pub(super) fn verify(
    password: &str,
    stored: Option<&str>,
    workspace: &mut Workspace,
) -> Result<Verified, MalformedHash> {
    match stored {
        Some(stored) if stored.starts_with("$argon2id$") => {
            verify_argon2id(password, stored, workspace)
        }
        Some(stored) if stored.starts_with("pbkdf2_sha256$") => verify_pbkdf2(password, stored),
        Some(stored) if !stored.starts_with('!') => Err(MalformedHash),
        Some(_) | None => {
            black_box(current_hash(password, NOBODYS_SALT, workspace));
            Ok(Verified::default())
        }
    }
}

fn current_hash(
    password: &str,
    salt: [u8; SALT_BYTES],
    workspace: &mut Workspace,
) -> [u8; HASH_BYTES] {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, Some(HASH_BYTES))
        .expect("the parameters are in Argon2's ranges");
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let mut hash = [0; HASH_BYTES];
    workspace
        .derive(&argon2, password.as_bytes(), &salt, &mut hash)
        .expect(
            "passwords are shorter than 4 GiB, and salt and hash have lengths that Argon2 takes",
        );
    hash
}

/// The parts of `$argon2id$v=19$m=…,t=…,p=…$salt$hash`: the costs and the length of the hash, the
/// salt, and the hash.
fn parse_argon2id(stored: &str) -> Result<(Params, Vec<u8>, Vec<u8>), MalformedHash> {
    let mut parts = stored
        .strip_prefix("$argon2id$")
        .ok_or(MalformedHash)?
        .split('$');
    let mut part = || parts.next().ok_or(MalformedHash);
    let (version, costs, salt, hash) = (part()?, part()?, part()?, part()?);
    if version != "v=19" || parts.next().is_some() {
        return Err(MalformedHash);
    }
    let [memory, passes, lanes] = parse_costs(costs).ok_or(MalformedHash)?;
    let salt = STANDARD_NO_PAD.decode(salt).map_err(|_| MalformedHash)?;
    let hash = STANDARD_NO_PAD.decode(hash).map_err(|_| MalformedHash)?;
    if !(16..=64).contains(&hash.len()) {
        return Err(MalformedHash);
    }
    let params = Params::new(memory, passes, lanes, Some(hash.len())).map_err(|_| MalformedHash)?;
    Ok((params, salt, hash))
}

fn verify_argon2id(
    password: &str,
    stored: &str,
    workspace: &mut Workspace,
) -> Result<Verified, MalformedHash> {
    let (params, salt, hash) = parse_argon2id(stored)?;
    let costs = [params.m_cost(), params.t_cost(), params.p_cost()];
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let mut found = vec![0; hash.len()];
    workspace.derive(&argon2, password.as_bytes(), &salt, &mut found)?;
    let ok = bool::from(found.ct_eq(&hash));
    let is_current = costs == [MEMORY_KIB, PASSES, LANES] && hash.len() == HASH_BYTES;
    Ok(Verified {
        ok,
        needs_rehash: ok && !is_current,
    })
}

/// Reads `m=19456,t=2,p=1`: memory in KiB, passes and lanes.
fn parse_costs(text: &str) -> Option<[u32; 3]> {
    let mut parts = text.split(',');
    let mut cost = |name: &str, most: u32| {
        let cost = parts.next()?.strip_prefix(name)?.parse().ok()?;
        (cost <= most).then_some(cost)
    };
    let costs = [
        cost("m=", MAX_MEMORY_KIB)?,
        cost("t=", MAX_PASSES)?,
        cost("p=", MAX_LANES)?,
    ];
    parts.next().is_none().then_some(costs)
}

/// Django's form: `pbkdf2_sha256$iterations$salt$hash`, the salt as text and the hash in padded
/// base64. Returns these three.
fn parse_pbkdf2(stored: &str) -> Result<(u32, &str, Vec<u8>), MalformedHash> {
    let mut parts = stored
        .strip_prefix("pbkdf2_sha256$")
        .ok_or(MalformedHash)?
        .split('$');
    let mut part = || parts.next().ok_or(MalformedHash);
    let (iterations, salt, hash) = (part()?, part()?, part()?);
    let iterations = iterations.parse().map_err(|_| MalformedHash)?;
    let hash = STANDARD.decode(hash).map_err(|_| MalformedHash)?;
    if parts.next().is_some()
        || !(1..=MAX_PBKDF2_ITERATIONS).contains(&iterations)
        || hash.len() != HASH_BYTES
    {
        return Err(MalformedHash);
    }
    Ok((iterations, salt, hash))
}

fn verify_pbkdf2(password: &str, stored: &str) -> Result<Verified, MalformedHash> {
    let (iterations, salt, hash) = parse_pbkdf2(stored)?;
    let mut found = [0; HASH_BYTES];
    pbkdf2::pbkdf2_hmac::<Sha256>(password.as_bytes(), salt.as_bytes(), iterations, &mut found);
    let ok = bool::from(found.ct_eq(hash.as_slice()));
    Ok(Verified {
        ok,
        needs_rehash: ok,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(password: &str, stored: &str) -> Result<Verified, MalformedHash> {
        verify(password, Some(stored), &mut Workspace::default())
    }

    const RIGHT: Verified = Verified {
        ok: true,
        needs_rehash: false,
    };
    const RIGHT_BUT_OLD: Verified = Verified {
        ok: true,
        needs_rehash: true,
    };

    #[test]
    fn hash_names_its_parameters_and_is_verified() {
        let mut workspace = Workspace::default();
        let stored = hash("secret123", [7; SALT_BYTES], &mut workspace);
        assert!(
            stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$BwcHBwcHBwcHBwcHBwcHBw$"),
            "{stored}"
        );
        assert_eq!(
            verify("secret123", Some(&stored), &mut workspace),
            Ok(RIGHT)
        );
        assert_eq!(
            verify("secret124", Some(&stored), &mut workspace),
            Ok(Verified::default())
        );
        assert_eq!(
            verify("", Some(&stored), &mut workspace),
            Ok(Verified::default())
        );
    }

    #[test]
    fn used_workspace_changes_no_hash() {
        let mut used = Workspace::default();
        hash("another password", [1; SALT_BYTES], &mut used);
        let fresh = hash("secret123", [7; SALT_BYTES], &mut Workspace::default());
        assert_eq!(hash("secret123", [7; SALT_BYTES], &mut used), fresh);
    }

    #[test]
    fn argon2id_hash_with_other_costs_is_verified_and_needs_a_rehash() {
        // argon2-cffi 25.1: PasswordHasher(2, 64, 2, 24, 16).hash("secret123",
        // salt=b"0123456789abcdef").
        let stored =
            "$argon2id$v=19$m=64,t=2,p=2$MDEyMzQ1Njc4OWFiY2RlZg$Paqcb6b03I1lT1Mgb8ghtOeqPbNV3rEH";
        assert_eq!(verified("secret123", stored), Ok(RIGHT_BUT_OLD));
        assert_eq!(verified("secret124", stored), Ok(Verified::default()));
    }

    #[test]
    fn django_hash_is_verified_and_needs_a_rehash() {
        // Django 5.2: make_password("secret123", salt="NaCl", hasher) with 1,000 iterations.
        let stored = "pbkdf2_sha256$1000$NaCl$0MSd5KkeNflhVp8jkOSFG8Gmzvd/WJE5ghwSLcAfQro=";
        assert_eq!(verified("secret123", stored), Ok(RIGHT_BUT_OLD));
        assert_eq!(verified("secret124", stored), Ok(Verified::default()));
    }

    #[test]
    fn password_of_a_missing_account_and_unusable_password_are_always_wrong() {
        let mut workspace = Workspace::default();
        assert_eq!(
            verify("secret123", None, &mut workspace),
            Ok(Verified::default())
        );
        // The work was done in full, as for an existing account.
        assert!(workspace.held_bytes.load(Ordering::Relaxed) >= 19_456 * 1024);
        let mut workspace = Workspace::default();
        assert_eq!(
            verify("secret123", Some("!Xk2"), &mut workspace),
            Ok(Verified::default())
        );
        assert!(workspace.held_bytes.load(Ordering::Relaxed) >= 19_456 * 1024);
    }

    #[test]
    fn malformed_and_excessive_hashes_are_refused_at_once() {
        let salt_and_hash = "MDEyMzQ1Njc4OWFiY2RlZg$QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0NTY";
        let mut malformed: Vec<String> = [
            "",
            "$",
            "secret123",
            "$argon2id$",
            "$argon2id$v=19",
            "$argon2i$v=19$m=64,t=2,p=1$x$y",
            "md5$salt$hash",
            "pbkdf2_sha256$",
            "pbkdf2_sha256$1000$salt",
            "pbkdf2_sha256$x$salt$aGFzaA==",
            "pbkdf2_sha256$1000$salt$aGFzaA==",
            "pbkdf2_sha256$0$salt$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=",
            "pbkdf2_sha256$10000001$salt$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=",
            "pbkdf2_sha256$99999999999$salt$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=",
            "pbkdf2_sha256$1$salt$MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=$more",
            "$argon2id$v=19$m=64,t=2,p=1$MDEyMzQ1Njc4OWFiY2RlZg$QUJD",
            "$argon2id$v=19$m=64,t=2,p=1$QQ$QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0NTY",
        ]
        .map(str::to_owned)
        .into();
        for costs in [
            "m=4000000,t=2,p=1",
            "m=64,t=17,p=1",
            "m=64,t=0,p=1",
            "m=64,t=2,p=17",
            "m=64,t=2,p=0",
            "m=4,t=2,p=1",
            "m=64,t=2",
            "t=2,m=64,p=1",
            "m=64,t=2,p=1,x=1",
            "m=-64,t=2,p=1",
            "",
        ] {
            malformed.push(format!("$argon2id$v=19${costs}${salt_and_hash}"));
        }
        malformed.push(format!("$argon2id$v=16$m=64,t=2,p=1${salt_and_hash}"));
        malformed.push(format!("$argon2id$v=19$m=64,t=2,p=1${salt_and_hash}$more"));
        for stored in malformed {
            assert_eq!(
                verified("secret123", &stored),
                Err(MalformedHash),
                "{stored}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_stored_text_is_judged_without_a_panic(
            text: String,
            costs in "m=[0-9]{1,2},t=[0-9],p=[0-9]",
            tail in "[A-Za-z0-9$+/=]{0,90}",
        ) {
            for stored in [format!("pbkdf2_sha256${text}"), format!("$argon2id$v=19${costs}${tail}")] {
                let right = verified("x", &stored).is_ok_and(|verified| verified.ok);
                proptest::prop_assert!(!right);
            }
        }
    }
}
