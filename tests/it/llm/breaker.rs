//! The circuit breaker: when an upstream is not asked, and when it is asked again.

use std::time::{Duration, Instant};

use prompt_service::domain::FailureCode;

use super::{MS, Watched, config};
use crate::support::{Gate, Reply, Upstream, chunk};

/// A refusal that permits a retry at once.
fn passing(status: u16) -> Reply {
    Reply::error(status, &["retry-after-ms: 1"])
}

/// A client whose upstream has just failed five times.
async fn opened(upstream: &Upstream) -> Watched {
    upstream.plan_many(5, &passing(500));
    let client = Watched::new(&config(upstream));
    for _ in 0..5 {
        client.ask().await.unwrap_err();
    }
    assert_eq!(client.breaker(), "open");
    client
}

#[tokio::test]
async fn an_upstream_that_keeps_failing_is_not_asked() {
    let upstream = Upstream::start().await;
    upstream.plan_many(5, &passing(500));
    let client = Watched::new(&config(&upstream));
    for _ in 0..5 {
        let failure = client.ask().await.unwrap_err();
        assert_eq!(failure.code, FailureCode::UpstreamFailed);
    }
    let failure = client.ask().await.unwrap_err();
    assert_eq!(failure.code, FailureCode::UpstreamUnavailable);
    assert!(failure.retry_after.unwrap() <= Duration::from_secs(6));
    assert_eq!(upstream.requests().len(), 5);
    assert_eq!(client.breaker(), "open");
    // The breaker closes by itself.
    eventually!(client.ask().await.is_ok());
    assert_eq!(upstream.requests().len(), 6);
    assert!(client.ask().await.is_ok());
    assert_eq!(client.breaker(), "closed");
}

#[tokio::test]
async fn refusals_do_not_open_the_breaker() {
    for status in [400, 401, 429] {
        let upstream = Upstream::start().await;
        upstream.plan_many(15, &passing(status));
        let client = Watched::new(&config(&upstream));
        for _ in 0..15 {
            client.ask().await.unwrap_err();
        }
        client.ask().await.unwrap();
        assert_eq!(client.breaker(), "closed");
    }
}

#[tokio::test]
async fn cancelled_calls_do_not_open_the_breaker() {
    let upstream = Upstream::start().await;
    upstream.plan_many(10, &Reply::default().hang());
    let client = Watched::new(&config(&upstream));
    for n in 1..=10 {
        tokio::select! {
            answer = client.ask() => panic!("{answer:?}"),
            () = async { eventually!(upstream.requests().len() == n) } => {}
        }
    }
    client.ask().await.unwrap();
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn the_first_token_of_a_probe_closes_the_breaker() {
    let upstream = Upstream::start().await;
    let client = opened(&upstream).await;
    let gate = Gate::new();
    let thought = r#"{"choices": [{"delta": {"reasoning_content": "hm"}}]}"#;
    let long = Reply::stream_head().event(thought).wait(&gate);
    upstream.plan(long.delta("at last").stop().event("[DONE]").end());
    let meanwhile = async {
        eventually!(upstream.requests().len() == 6);
        // The probe is still running, and no call is refused.
        eventually!(client.breaker() == "closed");
        client.ask().await.unwrap();
        gate.open();
    };
    let (answer, ()) = tokio::join!(client_stream(&client), meanwhile);
    assert_eq!(answer, "at last");
}

/// Streams as soon as the breaker admits it.
async fn client_stream(client: &Watched) -> String {
    loop {
        match client.stream().await.1 {
            Ok(answer) => return answer.text,
            Err(failure) => assert_eq!(failure.code, FailureCode::UpstreamUnavailable),
        }
        tokio::time::sleep(50 * MS).await;
    }
}

#[tokio::test]
async fn a_hanging_probe_is_joined_by_another_and_a_cancelled_one_is_replaced() {
    let upstream = Upstream::start().await;
    let client = opened(&upstream).await;
    upstream.plan_many(2, &Reply::default().hang());
    let given_up = async {
        eventually!(upstream.requests().len() == 6);
    };
    tokio::select! {
        text = client_stream(&client) => panic!("{text}"),
        () = given_up => {}
    }
    assert_eq!(client.breaker(), "half-open");
    let hanging = client_stream(&client);
    let other = async {
        eventually!(upstream.requests().len() == 7);
        let began = Instant::now();
        assert!(client.ask().await.is_err(), "a probe is out");
        eventually!(client.ask().await.is_ok());
        assert!(began.elapsed() < Duration::from_secs(20));
    };
    tokio::select! {
        text = hanging => panic!("{text}"),
        () = other => {}
    }
    assert_eq!(client.breaker(), "closed");
}

#[tokio::test]
async fn long_answers_that_run_out_of_time_do_not_open_the_breaker() {
    const TOKEN: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n";
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.total_timeout = 300 * MS;
    let endless = Reply::stream_head().forever(chunk(TOKEN), 20 * MS);
    upstream.plan_many(6, &endless);
    let client = Watched::new(&config);
    for _ in 0..6 {
        let failure = client.stream().await.1.unwrap_err();
        assert_eq!(failure.code, FailureCode::UpstreamTimeout);
    }
    client.stream().await.1.unwrap();
    assert_eq!(client.breaker(), "closed");
}

#[tokio::test]
async fn an_attempt_with_too_little_time_does_not_open_the_breaker() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.max_retries = 1;
    config.total_timeout = 300 * MS;
    let client = Watched::new(&config);
    for _ in 0..5 {
        // A refusal, which does not count, then a hang with only a part of the time.
        upstream.plan(passing(429));
        upstream.plan(Reply::default().hang());
        client.ask().await.unwrap_err();
    }
    client.ask().await.unwrap();
    assert_eq!(client.breaker(), "closed");
    // A hang with all of the time counts.
    upstream.plan_many(5, &Reply::default().hang());
    for _ in 0..5 {
        client.ask().await.unwrap_err();
    }
    assert_eq!(client.breaker(), "open");
}
