//! Clients that leave, and clients that do not read.

use std::time::Duration;

use prompt_service::config::OnClientDisconnect;
use serde_json::json;

use super::{DONE, ask, chat, id_in, number, object, open, path, posting, streamed};
use crate::support::{Gate, Reply, Upstream};
use crate::upstream::{held_answer, held_stream, service, shown};

#[tokio::test]
async fn a_call_whose_client_leaves_is_finished_and_stored_with_its_usage() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate)).plan(held_answer(&gate));
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    let of_stream = id_in(&stream.next_block().await.unwrap());
    drop(stream);
    let client = posting(chat(&user, &ask("hello")));
    eventually!(upstream.requests().len() == 2);
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    gate.open();
    eventually!(super::listed(&user, "").await.len() == 2);
    for (id, text) in super::listed(&user, "")
        .await
        .iter()
        .zip(["one two three", "at last"])
    {
        let shown = shown(&user, number(id)).await;
        assert_eq!(shown["status"], "completed");
        assert_eq!(shown["response"], text);
        let usage = json!({ "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 });
        assert_eq!(shown["usage"], usage);
    }
    assert_eq!(super::listed(&user, "").await[0], of_stream);
    assert_eq!(user.similar("hello", 9).await.len(), 2);
    assert_eq!(upstream.broken_off(), 0);
}

#[tokio::test]
async fn with_cancel_a_call_ends_with_its_client() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| {
        config.calls.on_client_disconnect = OnClientDisconnect::Cancel;
    })
    .await;
    upstream
        .plan(Reply::stream_head().delta("one ").hang())
        .plan(Reply::default().hang());
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    let id = id_in(&stream.next_block().await.unwrap());
    assert_eq!(shown(&user, number(&id)).await["status"], "running");
    drop(stream);
    eventually!(upstream.broken_off() == 1);
    let client = posting(chat(&user, &ask("hello")));
    eventually!(upstream.requests().len() == 2);
    client.abort();
    eventually!(upstream.broken_off() == 2);
    for prompt in user.all_prompts().await {
        let id = prompt["id"].as_i64().unwrap();
        eventually!(shown(&user, id).await["status"] == "failed");
        assert_eq!(shown(&user, id).await["error"], "cancelled");
    }
    assert_eq!(user.get(&path(&id)).send().await.status, 404);
}

#[tokio::test]
async fn a_reader_that_stands_still_stops_no_call_and_no_other_request() {
    /// Chunks of mostly blanks, which are sent and not stored: many times what the budget and the
    /// system's buffers take.
    const CHUNKS: usize = 400;
    const BUDGET: usize = 16 << 20;
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        config.server.request_memory = BUDGET;
        config.upstream.as_mut().unwrap().max_response_bytes = 64 << 20;
    })
    .await;
    let delta = json!({ "index": 0, "delta": { "content": "x" }, "finish_reason": null });
    let mut delta = json!({ "model": "scripted-1", "choices": [delta] }).to_string();
    delta.insert_str(1, &" ".repeat(100 << 10));
    let mut reply = Reply::stream_head();
    for _ in 0..CHUNKS {
        reply = reply.event(&delta);
    }
    upstream.plan(reply.stop().usage().event("[DONE]").end());
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    // Nothing is read. The call ends all the same, and this reader takes no memory from others.
    eventually!(app.metric("calls_running").await == Some(0.0));
    let held = app.metric("request_memory_bytes").await.unwrap();
    assert!(held < 1e6, "{held}");
    let id = super::listed(&user, "").await.remove(0);
    let shown = shown(&user, number(&id)).await;
    assert_eq!(shown["response"], "x".repeat(CHUNKS));
    assert_eq!(
        shown["usage"],
        json!({ "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 })
    );
    // What was passed on before is read in order, then the stream says that it is not whole.
    let blocks = stream.rest_blocks().await;
    let (last, chunks) = blocks.split_last().unwrap();
    assert!(chunks.len() < CHUNKS, "{}", chunks.len());
    assert_ne!(last, DONE);
    assert_eq!(object(last)["error"]["code"], "overloaded");
    assert!(chunks.iter().all(|chunk| id_in(chunk) == id));
    eventually!(app.metric("request_memory_bytes").await == Some(0.0));
}

#[tokio::test]
async fn a_stop_ends_a_stream_with_an_error() {
    let upstream = Upstream::start().await;
    let (mut app, user) = service(&upstream, |config| {
        config.server.shutdown_grace = Duration::from_millis(200);
    })
    .await;
    upstream.plan(Reply::stream_head().delta("one ").hang());
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    stream.next_block().await.unwrap();
    app.begin_stop();
    let rest = stream.rest_blocks().await;
    assert!(!rest.contains(&DONE.to_owned()), "{rest:?}");
    app.stopped().await;
}
