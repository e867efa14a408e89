//! The scripted upstream. Each answer says when it was asked for and when it was sent.
//!
//! The model's name selects the pace: `instant` answers at once, `think-50` after 50 ms, and
//! `paced-100x660` sends 660 pieces, one in 100 ms.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::http::{Body, Connection};

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Nanoseconds on the clock of this program.
pub fn now() -> u64 {
    EPOCH.elapsed().as_nanos() as u64
}

/// How it responds to one request.
#[derive(Clone, Copy)]
struct Pace {
    /// Before the first piece, or a whole answer.
    thought: Duration,
    /// Pieces of a streamed answer.
    pieces: usize,
    /// Between two of them.
    pace: Duration,
}

impl Pace {
    fn of(model: &str) -> Self {
        let number = |text: &str| text.parse().unwrap_or(0);
        let (kind, numbers) = model.split_once('-').unwrap_or((model, ""));
        let (first, second) = numbers.split_once('x').unwrap_or((numbers, ""));
        let milliseconds = Duration::from_millis(number(first));
        let (thought, pieces, pace) = match kind {
            "paced" => (Duration::ZERO, number(second) as usize, milliseconds),
            "think" => (milliseconds, 16, Duration::ZERO),
            _ => (Duration::ZERO, 16, Duration::ZERO),
        };
        Self {
            thought,
            pieces,
            pace,
        }
    }
}

/// Serves until it is dropped.
pub fn serve(listener: TcpListener) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(answer_all(stream));
            while connections.try_join_next().is_some() {}
        }
    });
    tasks
}

async fn answer_all(stream: TcpStream) {
    let mut connection = Connection::new(stream);
    while let Some(head) = connection.read_head().await {
        let mut body = Vec::new();
        let mut reading = Body::of(&head);
        while let Some(part) = connection.read_part(&mut reading).await {
            body.extend_from_slice(&part);
        }
        let asked = now();
        let request: Value = serde_json::from_slice(&body).unwrap_or_default();
        let pace = Pace::of(request["model"].as_str().unwrap_or_default());
        let answered = match (request["stream"].as_bool(), head.starts_with("get ")) {
            (_, true) => models(&mut connection.stream).await,
            (Some(true), _) => in_pieces(&mut connection.stream, &request, pace, asked).await,
            _ => whole(&mut connection.stream, &request, pace, asked).await,
        };
        if answered.is_err() {
            return;
        }
    }
}

async fn respond(stream: &mut TcpStream, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length:";
    let answer = format!("{head} {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await
}

async fn models(stream: &mut TcpStream) -> std::io::Result<()> {
    let one = json!({ "id": "instant", "object": "model", "created": 1, "owned_by": "bench" });
    respond(stream, &json!({ "object": "list", "data": [one] })).await
}

fn usage(pieces: usize) -> Value {
    json!({ "prompt_tokens": 9, "completion_tokens": pieces, "total_tokens": 9 + pieces })
}

async fn whole(
    stream: &mut TcpStream,
    request: &Value,
    pace: Pace,
    asked: u64,
) -> std::io::Result<()> {
    if !pace.thought.is_zero() {
        tokio::time::sleep(pace.thought).await;
    }
    let text = format!("{asked}-{}", now());
    let message = json!({ "role": "assistant", "content": text, "refusal": null });
    let choice =
        json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": "stop" });
    let answer = json!({
        "id": "chatcmpl-bench", "object": "chat.completion", "created": 1,
        "model": request["model"], "choices": [choice], "usage": usage(2),
    });
    respond(stream, &answer).await
}

async fn in_pieces(
    stream: &mut TcpStream,
    request: &Value,
    pace: Pace,
    asked: u64,
) -> std::io::Result<()> {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let object = |choices: Value| {
        json!({
            "id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1,
            "model": request["model"], "choices": choices,
        })
    };
    let delta = |delta: Value, reason: Value| {
        object(json!([{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": reason }]))
    };
    let began = tokio::time::Instant::now() + pace.thought;
    for number in 0..pace.pieces {
        if !(pace.thought + pace.pace).is_zero() {
            tokio::time::sleep_until(began + pace.pace * number as u32).await;
        }
        let role = (number == 0).then_some("assistant");
        let content = format!("{asked}-{} ", now());
        let piece = match role {
            Some(role) => json!({ "role": role, "content": content }),
            None => json!({ "content": content }),
        };
        let event = event(&delta(piece, Value::Null).to_string());
        stream.write_all(event.as_bytes()).await?;
    }
    let mut end = event(&delta(json!({}), json!("stop")).to_string());
    if request["stream_options"]["include_usage"] == true {
        let mut last = object(json!([]));
        last["usage"] = usage(pace.pieces);
        end += &event(&last.to_string());
    }
    end += &event("[DONE]");
    end += "0\r\n\r\n";
    stream.write_all(end.as_bytes()).await
}

fn event(data: &str) -> String {
    let event = format!("data: {data}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len())
}
