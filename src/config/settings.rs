//! The settings as an operator gives them: one field each, with its flag, variable, default and
//! help text.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use ipnet::{IpNet, Ipv4Net};

use super::{LogFilter, UpstreamSettings};
use crate::domain::{Budget, UserId};

/// Who may register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Registration {
    /// Anybody.
    Open,
    /// Nobody: the operator makes accounts.
    Closed,
}

/// Whose prompts a search finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SimilarScope {
    /// The caller's own.
    Own,
    /// Everybody's.
    Shared,
}

impl SimilarScope {
    /// Whose prompts a search of `caller` finds; `None` means everybody's.
    pub fn owner(self, caller: UserId) -> Option<UserId> {
        match self {
            Self::Own => Some(caller),
            Self::Shared => None,
        }
    }
}

/// When the session cookie is marked `Secure`, and so named `__Host-session`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CookieSecure {
    /// When the request came by TLS.
    Auto,
    /// Always: the operator says that clients come by TLS only.
    Always,
    /// Never.
    Never,
}

/// What becomes of a call whose caller hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnClientDisconnect {
    /// It is finished, stored and announced.
    Finish,
    /// It is broken off, and its prompt fails.
    Cancel,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For reading at a terminal.
    Pretty,
}

/// A number of bytes, written with a binary unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            _ => return Err("a size is a whole number with KiB, MiB or GiB, such as 512MiB"),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| "a size is a whole number with KiB, MiB or GiB, such as 512MiB")?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or("the size is too large")
    }
}

/// Reads a network such as 10.0.0.0/8; an address alone is a network of one host. Bits beyond the
/// prefix are ignored. IPv4 written as IPv6 becomes IPv4, because the peers are compared as such.
fn network(text: &str) -> Result<IpNet, &'static str> {
    let text = text.trim();
    let network = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "each is a network such as 10.0.0.0/8 or 2001:db8::/32, or an address")?;
    if let IpNet::V6(v6) = network
        && let (Some(v4), Some(prefix)) =
            (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96))
        && let Ok(v4) = Ipv4Net::new(v4, prefix)
    {
        return Ok(IpNet::V4(v4.trunc()));
    }
    Ok(network.trunc())
}

/// What the operator has set, as opposed to what is left at its default.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// The settings, secrets left out, by the names of their variables.
    pub settings: Vec<String>,
    /// The names of all variables of the environment that are not empty.
    pub variables: Vec<String>,
}

// The groups of settings in the help, in the order of their first fields. A field without a heading
// is a limit.
const LISTENING: &str = "Listening";
const DATA: &str = "Data";
const ACCOUNTS: &str = "Accounts";
const PROMPTS: &str = "Prompts";
const LIMITS: &str = "Limits";
const SEARCH: &str = "Search";
const LOG: &str = "Log";
const STOPPING: &str = "Stopping";
const UPSTREAM: &str = "Upstream";

/// Every setting that is no secret: an environment variable and a flag each.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = LIMITS)]
pub struct Settings {
    /// Listening address; port 0 picks a free one and logs it
    #[arg(long, env, default_value = "127.0.0.1:8000", value_name = "ADDR", help_heading = LISTENING, global = true)]
    pub bind_addr: SocketAddr,

    /// Folder of the SQLite file and the generated key; made with mode 0700
    #[arg(long, env, default_value = "./data", value_name = "DIR", help_heading = DATA, global = true)]
    pub data_dir: PathBuf,

    /// What the names of all keys and channels in Redis begin with
    #[arg(long, env, default_value = "prompt-service:", value_name = "TEXT", help_heading = DATA, global = true)]
    pub redis_prefix: String,

    /// Connections to PostgreSQL that one server keeps at most
    #[arg(long, env, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N", help_heading = DATA, global = true)]
    pub database_pool_size: u32,

    /// How long an access token holds (90s, 5m, 1d)
    #[arg(long, env, default_value = "5m", value_name = "TIME", help_heading = ACCOUNTS, global = true)]
    pub access_token_lifetime: humantime::Duration,

    /// How long a refresh token and a session cookie hold
    #[arg(long, env, default_value = "1d", value_name = "TIME", help_heading = ACCOUNTS, global = true)]
    pub refresh_token_lifetime: humantime::Duration,

    /// Who may register: anybody, or nobody (the operator makes accounts by `prompt-service user
    /// create`) [default: open]
    #[arg(long, env, value_name = "open|closed", hide_possible_values = true, help_heading = ACCOUNTS, global = true)]
    pub registration: Option<Registration>,

    /// Sessions of one user: a login that asks for one more ends the oldest
    #[arg(long, env, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N", help_heading = ACCOUNTS, global = true)]
    pub max_sessions_per_user: u32,

    /// Registrations for each client (an IPv4 address, an IPv6 /48): rates such as 5/min,100/day,
    /// or off
    #[arg(long, env, default_value = "300/min", value_name = "RATES", help_heading = ACCOUNTS, global = true)]
    pub register_throttle: String,

    /// Proxies whose X-Forwarded-For and X-Forwarded-Proto are believed: networks or single
    /// addresses, separated by commas
    #[arg(long, env, value_delimiter = ',', value_parser = network, value_name = "NETWORKS", help_heading = LISTENING, global = true)]
    pub trusted_proxies: Vec<IpNet>,

    /// What all calls together may cost, in US dollars for each day, week, month or in total, such
    /// as 100.00/month: a call that may cost more than is left is refused [default: no limit]
    #[arg(long, env, value_name = "AMOUNT/PERIOD", global = true)]
    pub budget: Option<Budget>,

    /// Prices over those of this program, in the form of LiteLLM's list: a JSON file of
    /// {"model": {"input_cost_per_token": 2.5e-6, "output_cost_per_token": 1e-5}, …}
    #[arg(long, env, value_name = "FILE", help_heading = PROMPTS, global = true)]
    pub prices_file: Option<PathBuf>,

    /// Posts that go to the upstream a UTC day, over all users and replicas; retries and fallbacks
    /// do not count [default: no limit]
    #[arg(long, env, value_name = "N", global = true)]
    pub upstream_daily_limit: Option<u64>,

    /// What becomes of a call whose caller hangs up: it is finished, stored and announced, or
    /// cancelled
    #[arg(long, env, default_value = "finish", value_name = "finish|cancel", hide_possible_values = true, help_heading = PROMPTS, global = true)]
    pub on_client_disconnect: OnClientDisconnect,

    /// How long a call counts as running without a word from its process: after that, a process
    /// that died has failed it
    #[arg(long, env, default_value = "60s", value_name = "TIME", help_heading = PROMPTS, global = true)]
    pub call_lease: humantime::Duration,

    /// Posted prompts for each user: rates such as 1/s,10/min (s, min, h, day; up to 10000 each),
    /// or off
    #[arg(long, env, default_value = "1/s,10/min", value_name = "RATES", help_heading = PROMPTS, global = true)]
    pub prompt_throttle: String,

    /// Calls of /v1 for each user: rates such as 20/s,600/min, or off
    #[arg(long, env = "V1_THROTTLE", default_value = "20/s,600/min", value_name = "RATES", help_heading = PROMPTS, global = true)]
    pub v1_throttle: String,

    /// Largest body of a chat call (1MiB to 256MiB)
    #[arg(long, env = "MAX_V1_BODY", default_value = "32MiB", value_name = "SIZE", help_heading = PROMPTS, global = true)]
    pub max_v1_body: ByteSize,

    /// Prompts that one user may keep, failed ones included: a post beyond that is refused until
    /// some are deleted [default: no limit]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N", help_heading = PROMPTS, global = true)]
    pub max_prompts_per_user: Option<u32>,

    /// Whose prompts a search finds: the caller's own, or everybody's
    #[arg(long, env, default_value = "own", value_name = "own|shared", hide_possible_values = true, help_heading = SEARCH, global = true)]
    pub similar_scope: SimilarScope,

    /// Memory for vectors (512MiB, 2GiB): in own scope the least recently searched users' are let
    /// go beyond it
    #[arg(long, env, default_value = "1GiB", value_name = "SIZE", help_heading = SEARCH, global = true)]
    pub search_memory: ByteSize,

    /// Longest prompt or query, in characters
    #[arg(long, env, default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N", help_heading = PROMPTS, global = true)]
    pub max_prompt_chars: u32,

    /// WebSockets that one user may hold open
    #[arg(long, env, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N", global = true)]
    pub max_sockets_per_user: u32,

    /// Connections in all; beyond it idle ones are closed, and where none is idle, health checks
    /// alone are answered
    #[arg(long, env, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N", global = true)]
    pub max_connections: u32,

    /// Connections of one client network (an IPv4 address, an IPv6 /64); trusted proxies are exempt
    /// [default: a quarter of MAX_CONNECTIONS, at least 64]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N", global = true)]
    pub max_connections_per_network: Option<u32>,

    /// Memory for request bodies and answers in flight (64MiB, 1GiB); beyond it requests are
    /// answered 503
    #[arg(
        long,
        env,
        default_value = "128MiB",
        value_name = "SIZE",
        global = true
    )]
    pub request_memory: ByteSize,

    /// A sentence-transformers folder to use in place of the bundled all-MiniLM-L6-v2
    #[arg(long, env, value_name = "DIR", help_heading = SEARCH, global = true)]
    pub embedding_model_dir: Option<PathBuf>,

    /// Form of the log lines on standard output [default: pretty on a terminal, json elsewhere]
    #[arg(long, env, value_name = "json|pretty", hide_possible_values = true, help_heading = LOG, global = true)]
    pub log_format: Option<LogFormat>,

    /// What is logged: a level, or target=level pairs separated by commas
    #[arg(long, env = "RUST_LOG", default_value = "info", value_name = "FILTER", help_heading = LOG, global = true)]
    pub rust_log: LogFilter,

    /// Address of a listener of its own for /metrics and the health routes
    #[arg(long, env, value_name = "ADDR", help_heading = LISTENING, global = true)]
    pub metrics_addr: Option<SocketAddr>,

    /// Whether the session cookie is marked Secure, and so named __Host-session: auto means when
    /// the request came by TLS
    #[arg(long, env, default_value = "auto", value_name = "auto|always|never", hide_possible_values = true, help_heading = ACCOUNTS, global = true)]
    pub cookie_secure: CookieSecure,

    /// Origins of browser pages elsewhere that may call the API and use the session cookie,
    /// separated by commas
    #[arg(long, env, value_delimiter = ',', value_name = "ORIGINS", help_heading = LISTENING, global = true)]
    pub cors_allowed_origins: Vec<String>,

    /// How long the service goes on accepting after it was told to stop
    #[arg(long, env, default_value = "0s", value_name = "TIME", help_heading = STOPPING, global = true)]
    pub shutdown_delay: humantime::Duration,

    /// How long requests in flight may take to finish after that
    #[arg(long, env, default_value = "30s", value_name = "TIME", help_heading = STOPPING, global = true)]
    pub shutdown_grace: humantime::Duration,

    /// The LLM that answers. The heading holds for the fields that follow too, so this one is last.
    #[command(flatten, next_help_heading = UPSTREAM)]
    pub upstream: UpstreamSettings,

    /// What of this, and of the environment, was set.
    #[arg(skip)]
    pub given: Given,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trusted_proxy_is_a_network_or_one_address() {
        for (text, read) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            (" 192.0.2.7 ", "192.0.2.7/32"),
            ("2001:db8::7", "2001:db8::7/128"),
            ("2001:db8::7/32", "2001:db8::/32"),
            ("::ffff:192.0.2.7", "192.0.2.7/32"),
            ("::ffff:192.0.2.7/120", "192.0.2.0/24"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(network(text).unwrap().to_string(), read, "{text}");
        }
        for bad in [
            "",
            "proxy",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.1:80",
            "[::1]",
        ] {
            assert!(network(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_take_binary_units() {
        assert_eq!("512MiB".parse(), Ok(ByteSize(512 << 20)));
        assert_eq!("2g".parse(), Ok(ByteSize(2 << 30)));
        assert_eq!("17".parse(), Ok(ByteSize(17)));
        for bad in ["", "MiB", "1.5GiB", "9 apples", "99999999999999GiB", "-1"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }
}
