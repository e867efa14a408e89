//! Retries and fallbacks.

use std::time::{Duration, Instant};

use prompt_service::domain::FailureCode;

use super::{MS, Watched, add_fallback, config};
use crate::support::{Reply, Upstream};

/// A refusal that permits a retry at once. Other tests check the waits.
fn passing(status: u16) -> Reply {
    Reply::error(status, &["retry-after-ms: 1"])
}

#[tokio::test]
async fn passing_failures_are_retried() {
    for is_streamed in [false, true] {
        for reply in [
            passing(408),
            passing(409),
            passing(429),
            passing(500),
            passing(502),
            passing(503),
            Reply::default().close(),
            Reply::default().reset(),
        ] {
            let upstream = Upstream::start().await;
            upstream.plan_many(2, &reply);
            let mut config = config(&upstream);
            config.max_retries = 2;
            let client = Watched::new(&config);
            let answer = client.call(is_streamed).await;
            assert_eq!(answer.unwrap().text, "Hello there", "{reply:?}");
            assert_eq!(upstream.requests().len(), 3, "{reply:?}");
            assert_eq!(client.count("upstream_retries_total", ""), 2);
            assert_eq!(client.ended(""), 1);
        }
    }
}

#[tokio::test]
async fn permanent_failures_are_not_retried() {
    for status in [302, 400, 401, 403, 404, 413, 422, 501] {
        let upstream = Upstream::start().await;
        upstream.plan(passing(status));
        let mut config = config(&upstream);
        config.max_retries = 2;
        let failure = Watched::new(&config).ask().await.unwrap_err();
        assert_eq!(failure.code, FailureCode::UpstreamFailed, "{status}");
        assert_eq!(upstream.requests().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn there_is_no_retry_after_the_first_piece() {
    let (upstream, other) = (Upstream::start().await, Upstream::start().await);
    upstream.plan(Reply::stream_head().delta("He").pause(50 * MS).reset());
    let mut config = config(&upstream);
    config.max_retries = 2;
    add_fallback(&mut config, &other.url(), "other", None);
    let (pieces, answer) = Watched::new(&config).stream().await;
    assert_eq!(pieces, ["He"]);
    assert_eq!(answer.unwrap_err().code, FailureCode::UpstreamFailed);
    assert_eq!((upstream.requests().len(), other.requests().len()), (1, 0));
}

#[tokio::test]
async fn the_upstreams_retry_after_is_kept() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::error(
        429,
        &["retry-after: 9", "retry-after-ms: 400"],
    ));
    let mut config = config(&upstream);
    config.max_retries = 1;
    let began = Instant::now();
    Watched::new(&config).ask().await.unwrap();
    assert!(began.elapsed() >= 400 * MS);
}

#[tokio::test]
async fn a_retry_after_of_zero_or_in_the_past_is_ignored() {
    let upstream = Upstream::start().await;
    let over = "retry-after: Sun, 06 Nov 1994 08:49:37 GMT";
    for header in ["retry-after: 0", "retry-after-ms: 0", over] {
        upstream.plan(Reply::error(429, &[header]));
        let failure = Watched::new(&config(&upstream)).ask().await.unwrap_err();
        // The service's default, as if the upstream had named no time.
        assert_eq!(
            failure.retry_after,
            Some(Duration::from_secs(5)),
            "{header}"
        );
    }
}

#[tokio::test]
async fn x_should_retry_counts_more_than_the_status() {
    for (status, word, requests) in [
        (400, "true", 3),
        (503, "false", 1),
        (429, "False", 1),
        (400, "?", 1),
    ] {
        let upstream = Upstream::start().await;
        let word = format!("x-should-retry: {word}");
        upstream.plan_many(3, &Reply::error(status, &["retry-after-ms: 1", &word]));
        let mut config = config(&upstream);
        config.max_retries = 2;
        Watched::new(&config).ask().await.unwrap_err();
        assert_eq!(upstream.requests().len(), requests, "{status} {word}");
    }
}

#[tokio::test]
async fn a_retry_after_beyond_the_deadline_fails_at_once_and_is_passed_on() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::error(503, &["retry-after: 3600"]));
    let mut config = config(&upstream);
    config.max_retries = 2;
    let failure = Watched::new(&config).ask().await.unwrap_err();
    assert_eq!(failure.code, FailureCode::UpstreamUnavailable);
    assert_eq!(failure.retry_after, Some(Duration::from_secs(3600)));
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn retries_do_not_multiply_the_load_of_an_outage() {
    let upstream = Upstream::start().await;
    upstream.plan_many(200, &passing(429));
    let mut config = config(&upstream);
    config.max_retries = 2;
    let client = Watched::new(&config);
    for _ in 0..50 {
        client.ask().await.unwrap_err();
    }
    // Ten at once, a tenth of fifty, and one in ten seconds of however long this took; without a
    // budget it would be a hundred.
    let retries = upstream.requests().len() - 50;
    assert!((10..=30).contains(&retries), "{retries}");
}

#[tokio::test]
async fn a_connection_that_breaks_late_is_not_retried() {
    for (pause, expected) in [(300 * MS, 2), (2300 * MS, 1)] {
        let upstream = Upstream::start().await;
        // On a kept connection, as with a proxy that limits how long an answer may be silent.
        upstream.plan(Reply::answer("first"));
        upstream.plan(Reply::default().pause(pause).reset());
        let mut config = config(&upstream);
        config.max_retries = 2;
        let client = Watched::new(&config);
        client.ask().await.unwrap();
        let answer = client.ask().await;
        assert_eq!(answer.is_ok(), expected == 2, "{pause:?}: {answer:?}");
        assert_eq!(upstream.requests().len() - 1, expected, "{pause:?}");
    }
}

#[tokio::test]
async fn a_fallback_is_asked_with_its_key_if_it_may_succeed() {
    for is_streamed in [false, true] {
        for reply in [
            passing(401),
            passing(404),
            passing(429),
            passing(500),
            Reply::error(429, &["retry-after: 30"]),
            Reply::of(200, "text/html", &[], "<html>"),
            Reply::default().reset(),
        ] {
            let (first, second) = (Upstream::start().await, Upstream::start().await);
            first.plan_many(2, &reply);
            let mut config = config(&first);
            config.max_retries = 1;
            add_fallback(&mut config, &second.url(), "spare", Some("sk-spare"));
            let client = Watched::new(&config);
            assert_eq!(client.call(is_streamed).await.unwrap().text, "Hello there");
            let request = &second.requests()[0];
            assert_eq!(request.header("authorization"), Some("Bearer sk-spare"));
            assert_eq!(request.body["model"], "spare");
            for request in first.requests() {
                assert_eq!(request.header("authorization"), Some("Bearer sk-primary"));
            }
            assert_eq!(client.ended(""), 1);
            assert_eq!(
                client.ended(
                    "gen_ai_provider_name=\"openai-compatible\",gen_ai_request_model=\"spare\""
                ),
                1
            );
        }
    }
}

#[tokio::test]
async fn a_hanging_whole_answer_leaves_half_of_the_time_to_the_next_upstream() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    first.plan_many(9, &Reply::default().hang());
    let mut config = config(&first);
    config.total_timeout = 2000 * MS;
    config.max_retries = 2;
    add_fallback(&mut config, &second.url(), "spare", None);
    let client = Watched::new(&config);
    let began = Instant::now();
    assert_eq!(client.ask().await.unwrap().text, "Hello there");
    assert!(began.elapsed() >= 1000 * MS, "the first has its half");
    assert_eq!((first.requests().len(), second.requests().len()), (1, 1));
    // The last upstream has all the time that is left.
    second.plan(Reply::default().hang());
    let began = Instant::now();
    let failure = client.ask().await.unwrap_err();
    assert_eq!(failure.code, FailureCode::UpstreamTimeout);
    assert!(began.elapsed() >= 1900 * MS);
    // A hang counts: after five the first upstream is not asked.
    for _ in 0..3 {
        client.ask().await.unwrap();
    }
    assert_eq!(client.breaker(), "open");
    let began = Instant::now();
    client.ask().await.unwrap();
    assert!(began.elapsed() < 1000 * MS);
    assert_eq!(first.requests().len(), 5);
}

#[tokio::test]
async fn a_fallback_with_an_open_breaker_takes_no_time_from_the_first() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    let mut config = config(&first);
    config.total_timeout = 3000 * MS;
    add_fallback(&mut config, &second.url(), "spare", None);
    second.plan_many(5, &passing(500));
    first.plan_many(5, &passing(401));
    let client = Watched::new(&config);
    for _ in 0..5 {
        client.ask().await.unwrap_err();
    }
    let slow = Reply::default().pause(1800 * MS).and(Reply::answer("slow"));
    first.plan(slow);
    assert_eq!(client.ask().await.unwrap().text, "slow");
}

#[tokio::test]
async fn a_bad_request_is_not_sent_to_a_fallback() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    first.plan(passing(400));
    let mut config = config(&first);
    add_fallback(&mut config, &second.url(), "spare", None);
    Watched::new(&config).ask().await.unwrap_err();
    assert_eq!(second.requests().len(), 0);
}

#[tokio::test]
async fn a_fallback_without_a_key_gets_none() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    first.plan(passing(500));
    let mut config = config(&first);
    add_fallback(&mut config, &second.url(), "spare", None);
    Watched::new(&config).ask().await.unwrap();
    assert_eq!(second.requests()[0].header("authorization"), None);
}

#[tokio::test]
async fn while_the_breaker_of_the_first_is_open_the_second_is_asked() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    first.plan_many(5, &passing(500));
    let mut config = config(&first);
    add_fallback(&mut config, &second.url(), "spare", None);
    let client = Watched::new(&config);
    for _ in 0..8 {
        client.ask().await.unwrap();
    }
    assert_eq!(second.requests().len(), 8);
    assert_eq!(first.requests().len(), 5);
}

#[tokio::test]
async fn an_upstream_may_restart_between_calls() {
    let upstream = Upstream::start().await;
    let (mut config, addr) = (config(&upstream), upstream.addr);
    config.max_retries = 2;
    let client = Watched::new(&config);
    client.ask().await.unwrap();
    upstream.stop().await;
    // The pooled connection is dead now, whether the client has noticed it or not.
    let upstream = Upstream::start_at(addr).await;
    client.ask().await.unwrap();
    assert_eq!(upstream.requests().len(), 1);
}
