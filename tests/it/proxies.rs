//! Clients behind trusted proxies: which of them count as different.

use prompt_service::config::Config;
use serde_json::json;

use crate::support::{App, behind_proxy, spawn_app};

/// One registration an hour for each client: a second one is refused if it counts as the same
/// client.
fn one_registration(config: &mut Config) {
    behind_proxy(config);
    config.accounts.register_throttle = "1/h".parse().unwrap();
}

/// Whether this is the first registration of its client.
async fn is_first(app: &App, forwarded_for: &[&[u8]]) -> bool {
    // Refused for its fields after it was counted: no password is hashed.
    let mut register = app.post("/api/auth/register/").json(&json!({}));
    for line in forwarded_for {
        register = register.header_bytes("x-forwarded-for", line);
    }
    match register.send().await.status {
        400 => true,
        429 => false,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn clients_are_distinguished_in_every_form_of_their_addresses() {
    let app = spawn_app(one_registration).await;
    for (first, again) in [
        ("2001:db8:1::2", "[2001:db8:1::2]"),
        ("\"[2001:db8:2::2]:443\"", "2001:db8:2::2"),
        ("198.51.100.1:4711", "::ffff:198.51.100.1"),
        ("fe80::1%eth0", "[fe80::1%25eth1]:80"),
    ] {
        assert!(is_first(&app, &[first.as_bytes()]).await, "{first}");
        assert!(!is_first(&app, &[again.as_bytes()]).await, "{again}");
    }
}

#[tokio::test]
async fn invalid_bytes_do_not_hide_the_hops_to_their_right() {
    let app = spawn_app(one_registration).await;
    assert!(is_first(&app, &[b"gr\xf6\xdfe, 198.51.100.1"]).await);
    assert!(is_first(&app, &[b"198.51.100.1, gr\xc3\xb6\xc3\x9fe, 198.51.100.2"]).await);
    assert!(is_first(&app, &[b"\xff\xff", b"198.51.100.3"]).await);
    assert!(!is_first(&app, &[b"198.51.100.3"]).await);
    // The proxy could not name its client: entries to the left of the one that the proxy added are
    // not trusted.
    assert!(is_first(&app, &[b"198.51.100.4, \xff"]).await);
    assert!(!is_first(&app, &[b"198.51.100.5, \xff"]).await);
}

#[tokio::test]
async fn header_forwarded_is_ignored() {
    let app = spawn_app(one_registration).await;
    let register = async |forwarded: &str| {
        let register = app.post("/api/auth/register/").json(&json!({}));
        register.header("forwarded", forwarded).send().await.status
    };
    assert_eq!(register("for=198.51.100.1;proto=https").await, 400);
    assert_eq!(register("for=198.51.100.2;proto=https").await, 429);
}
