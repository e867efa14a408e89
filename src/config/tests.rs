//! The configuration that settings give, and settings that are refused.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

fn load(flags: &[&str], secrets: Secrets) -> Result<Config, Error> {
    let flags = std::iter::once("prompt-service").chain(flags.iter().copied());
    Config::load(Line::parse_from(flags).settings, secrets)
}

#[test]
fn without_settings_the_defaults_of_the_embedded_store_apply() {
    let config = load(&[], Secrets::default()).unwrap();
    assert_eq!(config.server.bind_addr, "127.0.0.1:8000".parse().unwrap());
    assert_eq!(
        config.accounts.access_token_lifetime,
        Duration::from_secs(300)
    );
    assert_eq!(
        config.accounts.refresh_token_lifetime,
        Duration::from_secs(86_400)
    );
    assert_eq!(config.max_prompt_chars, 32_000);
    assert!(
        matches!(config.store, StoreConfig::Sqlite { path, .. } if path.ends_with("prompt-service.sqlite3"))
    );
}

#[test]
fn an_error_names_the_setting_and_hides_the_value() {
    let short = Secrets {
        secret_key: Some(Secret::new("hunter2")),
        ..Secrets::default()
    };
    let error = load(&[], short).unwrap_err().to_string();
    assert!(error.starts_with("SECRET_KEY: "), "{error}");
    assert!(!error.contains("hunter2"), "{error}");

    let short = Secrets {
        secret_key: Some(Secret::new("k".repeat(32))),
        secret_key_fallbacks: vec![Secret::new("k".repeat(32)), Secret::new("hunter2")],
        ..Secrets::default()
    };
    let error = load(&[], short).unwrap_err().to_string();
    assert!(error.starts_with("SECRET_KEY_FALLBACKS: "), "{error}");
    assert!(!error.contains("hunter2"), "{error}");

    let url = Secrets {
        database_url: Some(Secret::new("mysql://root:hunter2@db")),
        ..Secrets::default()
    };
    let error = load(&[], url).unwrap_err().to_string();
    assert!(error.starts_with("DATABASE_URL: "), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn the_url_picks_the_store() {
    let store = |url: &str| {
        let secrets = Secrets {
            database_url: Some(Secret::new(url)),
            ..Secrets::default()
        };
        load(&["--database-pool-size", "3"], secrets).map(|config| config.store)
    };
    for scheme in ["postgres", "postgresql"] {
        let url = format!("{scheme}://me:hunter2@db/prompts");
        let config = store(&url).unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
        assert!(
            matches!(config, StoreConfig::Postgres { url: kept, pool_size: 3, .. } if kept.expose() == url)
        );
    }
    assert!(
        matches!(store("sqlite://a/b.db").unwrap(), StoreConfig::Sqlite { path, .. } if path.ends_with("b.db"))
    );
    assert!(store("postgres://").is_err());
    assert!(store("sqlite://").is_err());
}

#[test]
fn redis_needs_a_common_store_and_a_common_key() {
    let refusal = |redis: &str, database: Option<&str>, key: Option<&str>| {
        let secrets = Secrets {
            redis_url: Some(Secret::new(redis)),
            database_url: database.map(Secret::new),
            secret_key: key.map(Secret::new),
            ..Secrets::default()
        };
        load(&[], secrets).unwrap_err().to_string()
    };
    let (key, postgres) = ("k".repeat(32), Some("postgres://u:hunter2@db/x"));
    for database in [None, Some("sqlite:///tmp/x")] {
        let error = refusal("redis://:hunter2@r", database, Some(&key));
        assert!(error.starts_with("REDIS_URL: "), "{error}");
        assert!(error.contains("DATABASE_URL"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
    let error = refusal("redis://r", postgres, None);
    assert!(error.starts_with("SECRET_KEY: "), "{error}");
    let error = refusal("http://hunter2@r", postgres, Some(&key));
    assert!(error.starts_with("REDIS_URL: "), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn open_registration_must_be_explicit_with_a_paid_upstream() {
    let secrets = || Secrets {
        openai_api_key: Some(Secret::new("sk-x")),
        ..Secrets::default()
    };
    let public = ["--bind-addr", "0.0.0.0:8000"];
    let error = load(&public, secrets()).unwrap_err().to_string();
    assert!(error.starts_with("REGISTRATION: "), "{error}");
    for flags in [
        &["--bind-addr", "[::1]:8000"][..],
        &["--bind-addr", "0.0.0.0:8000", "--registration", "open"],
        &["--bind-addr", "0.0.0.0:8000", "--registration", "closed"],
    ] {
        assert!(load(flags, secrets()).unwrap().upstream.is_some());
    }
    let mock = load(&public, Secrets::default()).unwrap();
    assert!(mock.upstream.is_none());
}

#[test]
fn throttles_and_origins_are_checked() {
    for flags in [
        ["--prompt-throttle", "often"],
        ["--register-throttle", "0/min"],
        ["--cors-allowed-origins", "https://a.example/path"],
        ["--cors-allowed-origins", "*"],
        ["--access-token-lifetime", "10ms"],
        ["--redis-prefix", "a{b}"],
    ] {
        let error = load(&flags, Secrets::default()).unwrap_err().to_string();
        let name = flags[0]
            .trim_start_matches('-')
            .replace('-', "_")
            .to_uppercase();
        assert!(error.starts_with(&name), "{error}");
    }
    let off = load(&["--prompt-throttle", "off"], Secrets::default()).unwrap();
    assert!(off.prompt_throttle.as_slice().is_empty());
}
