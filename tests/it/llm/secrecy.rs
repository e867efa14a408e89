//! Secrets that must not be seen, and the log lines that must.

use std::time::Duration;

use serde_json::json;

use super::{Watched, config, primary};
use crate::support::{Log, Reply, Upstream};

#[tokio::test]
async fn the_log_has_each_attempt_without_key_and_text() {
    let log = Log::default();
    let _guard = tracing::dispatcher::set_default(&log.dispatch());
    let upstream = Upstream::start().await;
    upstream.plan(Reply::error(
        500,
        &["retry-after-ms: 1", "x-request-id: req-500"],
    ));
    upstream.plan(Reply::answer("the-answer"));
    upstream.plan(Reply::stream(&["the-", "answer"], Duration::ZERO));
    upstream.plan(Reply::error(401, &["x-request-id: bad id <script>"]));
    upstream.plan(
        Reply::stream_head()
            .delta("the-answer")
            .event("{\"error\": \"upstream-secret-words\"}"),
    );
    let mut config = config(&upstream);
    config.max_retries = 1;
    config.system_prompt = Some("the-system-prompt".to_owned());
    let client = Watched::new(&config);
    client.ask().await.unwrap();
    client.stream().await.1.unwrap();
    let refused = client.ask().await.unwrap_err();
    let failed = client.stream().await.1.unwrap_err();

    let lines = log.lines();
    let ours: Vec<_> = lines
        .iter()
        .filter(|line| line["upstream"] == "primary")
        // Lines of other crates are written in the attempt's span too.
        .filter(|line| line["target"] == "prompt_service::llm::openai::attempt")
        .collect();
    let told: Vec<_> = ours
        .iter()
        .map(|line| {
            (
                line["level"].as_str().unwrap(),
                line["attempt"].as_u64().unwrap(),
                line["status"].as_u64(),
                line["upstream_request_id"].as_str(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("WARN", 1, Some(500), Some("req-500")),
            ("INFO", 2, Some(200), Some("req-7")),
            ("INFO", 1, Some(200), Some("req-8")),
            ("ERROR", 1, Some(401), None),
            ("WARN", 1, Some(200), Some("req-8")),
        ]
    );
    let metrics = String::from_utf8(client.metrics.render()).unwrap();
    let all = format!(
        "{}{metrics}{refused:?}{refused}{failed:?}{failed}{:?}{config:?}",
        log.text(),
        client.client
    );
    for secret in ["sk-primary", "the-prompt", "the-answer"] {
        assert!(!all.contains(secret), "{secret}");
    }
    // The upstream's message is only for the operator.
    let failures: Vec<_> = ours.iter().filter(|line| line["level"] != "INFO").collect();
    assert_eq!(failures.len(), 3);
    for line in failures {
        assert_eq!(line["url"], format!("{}/chat/completions", upstream.url()));
        assert_eq!(line["upstream_message"], "upstream-secret-words");
    }
    let told = format!("{metrics}{refused:?}{refused}{failed:?}{failed}");
    assert!(!told.contains("upstream-secret-words"));
}

#[tokio::test]
async fn prompt_and_key_in_an_upstreams_message_are_not_logged() {
    let log = Log::default();
    let _guard = tracing::dispatcher::set_default(&log.dispatch());
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.system_prompt = Some("Answer as Admiral Featherstone would.".to_owned());
    let client = Watched::new(&config);
    let message = "Incorrect API key provided: sk-prim****ary (the-prompt; Featherstone)\n";
    let error = json!({ "error": { "message": message } }).to_string();
    upstream.plan(Reply::of(401, "application/json", &[], &error));
    upstream.plan(Reply::of(200, "application/json", &[], &error));
    upstream.plan(Reply::stream_head().event(&error).end());
    client.ask().await.unwrap_err();
    client.ask().await.unwrap_err();
    client.stream().await.1.unwrap_err();
    let lines = log.lines();
    let shown: Vec<_> = lines
        .iter()
        .filter_map(|line| line["upstream_message"].as_str())
        .collect();
    assert_eq!(shown.len(), 3);
    for shown in shown {
        assert!(shown.starts_with("Incorrect API key "), "{shown}");
        for secret in ["prim", "ary", "prompt", "Featherstone"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_does_not_get_the_key() {
    let (upstream, elsewhere) = (Upstream::start().await, Upstream::start().await);
    for status in [301, 302, 303, 307, 308] {
        let location = format!("location: {}/chat/completions", elsewhere.url());
        upstream.plan(Reply::error(status, &[&location]));
        let failure = Watched::new(&config(&upstream)).ask().await.unwrap_err();
        assert_eq!(failure.detail, "The upstream answered with an error.");
    }
    assert_eq!(upstream.requests().len(), 5);
    assert_eq!(elsewhere.requests().len(), 0);
}

#[tokio::test]
async fn a_name_of_this_machine_may_be_asked_without_tls() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    let url = format!("http://localhost:{}/v1/", upstream.addr.port());
    config.endpoints[0] = primary(&url, None);
    Watched::new(&config).ask().await.unwrap();
    assert_eq!(
        upstream.requests()[0].line,
        "POST /v1/chat/completions HTTP/1.1"
    );
}
