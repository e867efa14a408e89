//! Successful calls.

use std::time::Duration;

use prompt_service::domain::UserId;
use prompt_service::llm::TextSink;
use serde_json::json;

use super::{MS, USER, Watched, config, memory};
use crate::support::{Reply, Upstream, chunk, spawn_app};

#[tokio::test]
async fn a_whole_answer_comes_with_model_reason_and_usage() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.system_prompt = Some("Be brief.".to_owned());
    config.max_tokens = Some(64);
    config.temperature = Some(0.5);
    config.top_p = Some(0.25);
    let answer = Watched::new(&config).ask().await.unwrap();
    assert_eq!(answer.text, "Hello there");
    assert_eq!(answer.model, "scripted-1");
    assert_eq!(answer.finish_reason.as_deref(), Some("stop"));
    assert_eq!(
        (answer.prompt_tokens, answer.completion_tokens),
        (Some(3), Some(5))
    );
    assert!(answer.upstream_duration > Duration::ZERO);

    let request = &upstream.requests()[0];
    assert_eq!(request.line, "POST /v1/chat/completions HTTP/1.1");
    for (name, value) in [
        ("host", upstream.addr.to_string().as_str()),
        ("authorization", "Bearer sk-primary"),
        ("accept-encoding", "identity"),
        ("content-type", "application/json"),
    ] {
        assert_eq!(request.header(name), Some(value), "{name}");
    }
    let expected = json!({
        "model": "asked-1", "stream": false, "max_tokens": 64, "temperature": 0.5, "top_p": 0.25,
        "messages": [{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "the-prompt" }],
    });
    assert_eq!(request.body, expected);
}

#[tokio::test]
async fn a_streamed_answer_is_handed_over_piece_by_piece() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::stream(&["One", " two", " — three"], 20 * MS));
    let client = Watched::new(&config(&upstream));
    let (pieces, answer) = client.stream().await;
    let answer = answer.unwrap();
    assert_eq!(pieces, ["One", " two", " — three"]);
    assert_eq!(answer.text, "One two — three");
    assert_eq!(answer.finish_reason.as_deref(), Some("stop"));
    assert_eq!(
        (answer.prompt_tokens, answer.completion_tokens),
        (Some(3), Some(5))
    );
    assert!(answer.upstream_duration >= 60 * MS);
    assert_eq!(
        client.count(
            "gen_ai_client_operation_time_to_first_chunk_seconds_count",
            ""
        ),
        1
    );
    let body = &upstream.requests()[0].body;
    assert_eq!(body["stream"], true);
    assert_eq!(body["stream_options"], json!({ "include_usage": true }));
}

#[tokio::test]
async fn a_piece_is_handed_over_before_the_next_one_has_come() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::stream_head().delta("first").hang());
    let client = Watched::new(&config(&upstream));
    let (tell, told) = tokio::sync::oneshot::channel();
    let mut tell = Some(tell);
    let mut sink = TextSink(|piece: &str| {
        let tell = tell.take().unwrap();
        tell.send(piece.to_owned()).unwrap();
    });
    let permit = client.client.admit(USER).unwrap();
    let question = client.question("x");
    let call = client
        .client
        .complete(permit, memory(), question, Some(&mut sink));
    tokio::select! {
        piece = told => assert_eq!(piece.unwrap(), "first"),
        answer = call => panic!("the upstream never ends: {answer:?}"),
    }
    // The permit of the cancelled call was returned, and the call was counted, because it was paid
    // for.
    assert_eq!(client.in_flight(), 0);
    assert_eq!(client.ended(""), 1);
    assert_eq!(client.ended("\"cancelled\""), 1);
    assert_eq!(
        client.count(
            "gen_ai_client_operation_time_to_first_chunk_seconds_count",
            ""
        ),
        1
    );
}

#[tokio::test]
async fn connections_are_reused_after_any_answer() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::answer("one"));
    upstream.plan(Reply::stream(&["two"], Duration::ZERO));
    upstream.plan(Reply::error(400, &[]));
    upstream.plan(Reply::error(429, &[]));
    let client = Watched::new(&config(&upstream));
    client.ask().await.unwrap();
    client.stream().await.1.unwrap();
    client.ask().await.unwrap_err();
    client.ask().await.unwrap_err();
    client.ask().await.unwrap();
    let connections: Vec<usize> = upstream
        .requests()
        .iter()
        .map(|each| each.connection)
        .collect();
    assert_eq!(connections, [0; 5]);
}

#[tokio::test]
async fn answers_of_different_servers_are_read() {
    let upstream = Upstream::start().await;
    let until_close =
        "HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream\r\nconnection: close\r\n\r\n";
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"é\"}}]}\r\n\r\n".as_bytes();
    let inside_the_character = event.iter().position(|byte| *byte == 0xc3).unwrap() + 1;
    let (one, two) = event.split_at(inside_the_character);
    for reply in [
        // Lines end in CRLF, comments come between, a character comes in two pieces, no blank line
        // after the end.
        Reply::raw(until_close)
            .then(": warming up\r\n\r\n")
            .then(one.to_vec())
            .pause(20 * MS)
            .then(two.to_vec())
            .then("data: [DONE]")
            .close(),
        // No [DONE], but a reason.
        Reply::stream_head().delta("é").stop().end(),
        // The same, and the connection breaks after the whole answer.
        Reply::stream_head().delta("é").stop().close(),
        // The same, and the body does not end.
        Reply::stream_head().delta("é").stop().hang(),
        // No stream at all.
        Reply::answer("é"),
    ] {
        upstream.plan(reply.clone());
        let (pieces, answer) = Watched::new(&config(&upstream)).stream().await;
        assert_eq!(
            (pieces, answer.unwrap().text),
            (vec!["é".to_owned()], "é".to_owned()),
            "{reply:?}"
        );
    }
}

#[tokio::test]
async fn the_wait_after_the_reason_is_short() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.token_timeout = 1000 * MS;
    config.total_timeout = 2500 * MS;
    let client = Watched::new(&config);
    let said = || Reply::stream_head().delta("whole").stop();
    let late = said().pause(300 * MS).usage().event("[DONE]").end();
    upstream.plan(late);
    let answer = client.stream().await.1.unwrap();
    assert_eq!(answer.completion_tokens, Some(5), "usage comes last");
    // A whole answer stays one, whatever follows: silence, comments, or the end of the time.
    for end in [
        said().hang(),
        said().forever(chunk(": ping\n\n"), 20 * MS),
        said().reset(),
    ] {
        upstream.plan(end.clone());
        let (pieces, answer) = client.stream().await;
        assert_eq!(pieces, ["whole"]);
        let answer = answer.unwrap_or_else(|failure| panic!("{end:?}: {failure:?}"));
        assert_eq!(answer.finish_reason.as_deref(), Some("stop"));
    }
}

#[tokio::test]
async fn an_answer_without_text_is_empty_and_not_retried() {
    for is_streamed in [false, true] {
        let (upstream, other) = (Upstream::start().await, Upstream::start().await);
        let mut config = config(&upstream);
        config.max_retries = 2;
        super::add_fallback(&mut config, &other.url(), "spare", None);
        let client = Watched::new(&config);
        for reason in ["length", "content_filter"] {
            let choice = json!({ "finish_reason": reason, "message": { "content": null } });
            let usage = json!({ "prompt_tokens": 3, "completion_tokens": 64 });
            upstream.plan(match is_streamed {
                false => Reply::json(&json!({ "choices": [choice], "usage": usage })),
                true => Reply::stream_head()
                    .event(
                        &json!({ "choices": [{ "delta": {}, "finish_reason": reason }] })
                            .to_string(),
                    )
                    .event("[DONE]")
                    .end(),
            });
            let answer = client.call(is_streamed).await.unwrap();
            assert_eq!(answer.text, "");
            assert_eq!(answer.finish_reason.as_deref(), Some(reason));
        }
        assert_eq!((upstream.requests().len(), other.requests().len()), (2, 0));
    }
}

#[tokio::test]
async fn an_answer_without_a_model_has_the_requested_one() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::json(
        &json!({ "choices": [{ "message": { "content": "x" } }] }),
    ));
    let answer = Watched::new(&config(&upstream)).ask().await.unwrap();
    assert_eq!(
        (answer.model.as_str(), answer.completion_tokens),
        ("asked-1", None)
    );
}

#[tokio::test]
async fn beyond_the_limit_a_call_is_refused_at_once() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.max_in_flight = 2;
    let client = Watched::new(&config);
    let one = client.client.admit(USER).unwrap();
    // Half of the permits are for other users.
    assert!(client.client.admit(USER).is_err());
    let two = client.client.admit(UserId(2)).unwrap();
    assert!(client.client.admit(UserId(3)).is_err());
    drop((one, two));
    client.ask().await.unwrap();
    assert_eq!(client.metrics.overloaded.get(), 2);
}

#[tokio::test]
async fn the_service_responds_with_the_upstreams_answer_and_counts_it() {
    let upstream = Upstream::start().await;
    let config = config(&upstream);
    let app = spawn_app(move |app| app.upstream = Some(config)).await;
    let user = app.user("alice").await;
    let answer = user.try_prompt("hello").await;
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.json()["response"], "Hello there");
    assert_eq!(answer.json()["model"], "scripted-1");
    let labels = "gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"openai-compatible\",gen_ai_request_model=\"asked-1\"";
    for (series, value) in [
        (
            format!("gen_ai_client_operation_duration_seconds_count{{error_type=\"\",{labels}}}"),
            1.0,
        ),
        (
            format!("gen_ai_client_token_usage_sum{{{labels},gen_ai_token_type=\"input\"}}"),
            3.0,
        ),
        (
            format!("gen_ai_client_token_usage_sum{{{labels},gen_ai_token_type=\"output\"}}"),
            5.0,
        ),
        ("upstream_calls_in_flight".to_owned(), 0.0),
        (
            "upstream_breaker_state{upstream=\"primary\"}".to_owned(),
            0.0,
        ),
    ] {
        assert_eq!(app.metric(&series).await, Some(value), "{series}");
    }
}
