//! What proves an identity: passwords, tokens, API keys, session secrets, tickets; and the limits
//! on guessing passwords.

pub mod api_key;
pub mod hash_pool;
pub mod login_rate_limiter;
pub mod passwords;
pub mod sessions;
pub mod tickets;
pub mod tokens;

pub use api_key::ApiKeyText;
pub use hash_pool::HashPool;
pub use login_rate_limiter::{
    LocalLoginRateLimiter, LoginAttempt, LoginRateLimiter, RedisLoginRateLimiter,
};
pub use passwords::{Verified, is_known_hash};
pub use sessions::SessionSecret;
pub use tickets::{Grant, LocalTickets, RedisTickets, Tickets};
pub use tokens::{Claims, Keys, TokenError, TokenId, TokenType};

/// Lower-case hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
