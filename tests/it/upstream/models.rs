//! What `check` and the start report about an upstream's list of models.

use prompt_service::config::{BaseUrl, UpstreamConfig};
use serde_json::{Value, json};

use super::service;
use crate::support::{Folder, Reply, Upstream, config_in};
use crate::transfer::check::{checked, line};

/// The line of `check` on an upstream, and whether the check fails. `must_be_right`: with
/// `--upstream`.
async fn look(
    upstream: &Upstream,
    must_be_right: bool,
    adjust: impl Fn(&mut UpstreamConfig),
) -> (String, bool) {
    let folder = Folder::new();
    let mut config = config_in(folder.path());
    let mut asked = crate::llm::config(upstream);
    adjust(&mut asked);
    config.upstream = Some(asked);
    let (lines, error) = checked(Ok(config), must_be_right).await;
    (line(&lines, "upstream").to_owned(), error.is_some())
}

fn models(models: &[Value]) -> Reply {
    Reply::json(&json!({ "object": "list", "data": models }))
}

/// The day that is so many days from now.
fn day(days: u64) -> String {
    let time = std::time::SystemTime::now() + std::time::Duration::from_secs(days * 86_400);
    humantime::format_rfc3339_seconds(time).to_string()[..10].to_owned()
}

#[tokio::test]
async fn a_check_says_whether_address_key_and_model_are_right() {
    let upstream = Upstream::start().await;
    for (reply, part, is_right) in [
        (
            models(&[json!({ "id": "asked-1" })]),
            "has the model asked-1",
            true,
        ),
        (
            models(&[json!({ "id": "asked-1:latest" })]),
            "has the model asked-1",
            true,
        ),
        (
            models(&[json!({ "id": "asked-2" })]),
            "no asked-1, but asked-2: set OPENAI_MODEL",
            false,
        ),
        (models(&[]), "among its 0 models", false),
        (
            Reply::error(401, &[]),
            "refuses the key (status 401): set OPENAI_API_KEY",
            false,
        ),
        (
            Reply::error(404, &[]),
            "is the path in OPENAI_BASE_URL right?",
            false,
        ),
        (
            Reply::of(200, "text/html", &[], "<html>"),
            "no list of models there",
            false,
        ),
        (Reply::error(503, &[]), "just now (status 503)", false),
        (Reply::default().close(), "cannot be reached", false),
    ] {
        upstream.show_models(reply);
        let (line, fails) = look(&upstream, true, |_| ()).await;
        assert!(line.contains(part), "{line}");
        assert!(
            line.contains(&format!("{}/models", upstream.url())),
            "{line}"
        );
        assert!(!line.contains("sk-primary"), "{line}");
        assert_eq!(fails, !is_right, "{line}");
        assert_eq!(line.starts_with("ok"), is_right, "{line}");
        // Without the flag, a problem that may end by itself is only a note.
        let (line, fails) = look(&upstream, false, |_| ()).await;
        assert!(
            line.starts_with(if is_right { "ok" } else { "note" }),
            "{line}"
        );
        assert!(!fails, "{line}");
    }
    // No request was sent that costs anything.
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_list_without_a_name_is_believed_less_than_the_model_itself() {
    let upstream = Upstream::start().await;
    // One reply serves both requests: it is a list for the first and a model for the second.
    upstream.show_models(Reply::json(
        &json!({ "data": [{ "id": "other" }], "id": "asked-1" }),
    ));
    let (line, fails) = look(&upstream, true, |_| ()).await;
    assert!(line.starts_with("ok") && !fails, "{line}");
}

#[tokio::test]
async fn a_missing_version_in_the_path_is_named() {
    let upstream = Upstream::start().await;
    upstream.show_models(models(&[json!({ "id": "asked-1" })]));
    let (line, fails) = look(&upstream, true, |config| {
        config.endpoints[0].base_url =
            BaseUrl::parse(&format!("http://{}", upstream.addr)).unwrap();
    })
    .await;
    assert!(
        line.ends_with(&format!(
            "under {}: set OPENAI_BASE_URL to that",
            upstream.url()
        )),
        "{line}"
    );
    assert!(fails);
}

#[tokio::test]
async fn each_upstream_has_its_own_line_with_its_own_settings() {
    let (upstream, other) = (Upstream::start().await, Upstream::start().await);
    upstream.show_models(models(&[json!({ "id": "asked-1" })]));
    other.show_models(models(&[json!({ "id": "b" })]));
    let mut asked = crate::llm::config(&upstream);
    crate::llm::add_fallback(&mut asked, &other.url(), "a", None);
    let folder = Folder::new();
    let mut config = config_in(folder.path());
    config.upstream = Some(asked);
    let (lines, error) = checked(Ok(config), true).await;
    let lines: Vec<_> = lines
        .iter()
        .filter(|line| line.contains(" upstream: "))
        .collect();
    assert_eq!(lines.len(), 2);
    assert!(
        lines[0].starts_with("ok    upstream: primary ("),
        "{lines:?}"
    );
    assert!(
        lines[1].starts_with("fault upstream: fallback-1 ("),
        "{lines:?}"
    );
    assert!(
        lines[1].ends_with("set model of entry 1 of OPENAI_FALLBACK"),
        "{lines:?}"
    );
    assert_eq!(error.as_deref(), Some("1 fault"));
}

#[tokio::test]
async fn each_model_of_a_list_of_upstreams_has_its_own_line() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    a.show_models(models(&[
        json!({ "id": "gpt-6" }),
        json!({ "id": "gpt-7" }),
    ]));
    b.show_models(models(&[json!({ "id": "llama3.2" })]));
    let mut asked = crate::llm::config(&a);
    asked.is_list = true;
    asked.default_model = "llama3.2".to_owned();
    asked.endpoints = vec![
        crate::llm::named("a", &a, &["gpt-*"], &[], &[]),
        crate::llm::named("b", &b, &["llama3.2"], &[("slow", "llama3.1")], &[]),
        crate::llm::named("c", &b, &["claude-*"], &[], &[]),
    ];
    let folder = Folder::new();
    let mut config = config_in(folder.path());
    config.upstream = Some(asked);
    let (lines, error) = checked(Ok(config), true).await;
    let lines: Vec<_> = lines
        .iter()
        .filter(|line| line.contains(" upstream: "))
        .collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    for (line, start, end) in [
        (lines[0], "ok    upstream: a (", "2 of its models match"),
        (
            lines[1],
            "fault upstream: b (",
            "no llama3.1, but llama3.2: set models of b in UPSTREAMS",
        ),
        (lines[2], "ok    upstream: b (", "it has the model llama3.2"),
        (
            lines[3],
            "fault upstream: c (",
            "none of its models matches: set models of c in UPSTREAMS",
        ),
    ] {
        assert!(line.starts_with(start) && line.ends_with(end), "{line}");
    }
    assert_eq!(error.as_deref(), Some("2 faults"));
}

#[tokio::test]
async fn a_model_that_ends_soon_is_reported_by_check_and_at_the_start() {
    let upstream = Upstream::start().await;
    for (shutdown, is_told) in [
        (json!(day(89)), true),
        (json!(day(0)), true),
        (json!("2020-01-01T00:00:00Z"), true),
        (json!(day(92)), false),
        (json!(null), false),
        (json!("soon"), false),
    ] {
        upstream.show_models(models(&[
            json!({ "id": "asked-1", "shutdown_date": shutdown }),
        ]));
        let (line, fails) = look(&upstream, true, |_| ()).await;
        assert_eq!(
            line.contains("asked-1 ends on 20"),
            is_told,
            "{shutdown}: {line}"
        );
        assert_eq!(line.starts_with("note"), is_told, "{line}");
        assert!(!fails, "{line}");
    }
    upstream.show_models(models(&[
        json!({ "id": "asked-1", "shutdown_date": day(30) }),
    ]));
    let (app, user) = service(&upstream, |_| ()).await;
    eventually!(app.log.text().contains("the upstream ends this model soon"));
    let lines = app.log.lines();
    let warning = lines
        .iter()
        .find(|line| line["shutdown_date"] == day(30))
        .unwrap();
    assert_eq!(
        (&warning["level"], &warning["model"]),
        (&json!("WARN"), &json!("asked-1"))
    );
    user.prompt("hello").await;
}

#[tokio::test]
async fn an_upstream_that_does_not_show_its_models_holds_nothing_up() {
    let upstream = Upstream::start().await;
    upstream.show_models(Reply::default().hang());
    let (app, user) = service(&upstream, |_| ()).await;
    user.prompt("hello").await;
    app.stop().await;
}
