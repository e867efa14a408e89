//! What proves an identity: passwords, tokens, session secrets, tickets; and the limits on guessing
//! passwords.

pub mod hash_pool;
pub mod login_rate_limiter;
pub mod passwords;
pub mod sessions;
pub mod tickets;
pub mod tokens;

pub use hash_pool::HashPool;
pub use login_rate_limiter::{
    LocalLoginRateLimiter, LoginAttempt, LoginRateLimiter, RedisLoginRateLimiter,
};
pub use passwords::{Verified, is_known_hash};
pub use sessions::SessionSecret;
pub use tickets::{Grant, LocalTickets, RedisTickets, Tickets};
pub use tokens::{Claims, Keys, TokenError, TokenId, TokenType};
