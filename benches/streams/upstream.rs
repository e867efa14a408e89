//! The scripted upstream. Its answers have stamps of when it was asked and when it sent them.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::client::read_head;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Nanoseconds on the clock of this program.
pub fn now() -> u64 {
    EPOCH.elapsed().as_nanos() as u64
}

/// How it responds.
#[derive(Clone, Copy)]
pub struct Pace {
    /// Before the first piece, or a whole answer.
    pub thought: Duration,
    /// Pieces of a streamed answer.
    pub pieces: usize,
    /// Between two of them.
    pub pace: Duration,
}

/// Gone when dropped.
pub struct Upstream {
    /// Where it listens.
    pub addr: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Upstream {
    /// Starts one.
    pub async fn start(pace: Pace) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("an address");
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, pace));
            }
        });
        Self {
            addr,
            _tasks: tasks,
        }
    }
}

async fn serve(mut stream: TcpStream, pace: Pace) {
    stream.set_nodelay(true).expect("an option of TCP");
    let mut buffer = Vec::new();
    while let Some((_, body)) = read_head(&mut stream, &mut buffer).await {
        let asked = now();
        let is_streamed = body.windows(13).any(|part| part == b"\"stream\":true");
        let answered = match is_streamed {
            true => answer_in_pieces(&mut stream, pace, asked).await,
            false => answer(&mut stream, pace, asked).await,
        };
        if answered.is_err() {
            return;
        }
    }
}

async fn answer(stream: &mut TcpStream, pace: Pace, asked: u64) -> std::io::Result<()> {
    if !pace.thought.is_zero() {
        tokio::time::sleep(pace.thought).await;
    }
    let body = format!(
        r#"{{"model":"scripted","choices":[{{"finish_reason":"stop","message":{{"content":"{asked}-{}"}}}}]}}"#,
        now()
    );
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length:";
    let answer = format!("{head} {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await
}

async fn answer_in_pieces(stream: &mut TcpStream, pace: Pace, asked: u64) -> std::io::Result<()> {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let began = tokio::time::Instant::now() + pace.thought;
    for number in 0..pace.pieces {
        tokio::time::sleep_until(began + pace.pace * number as u32).await;
        let data = format!(
            r#"{{"model":"scripted","choices":[{{"delta":{{"content":"{asked}-{} "}}}}]}}"#,
            now()
        );
        stream.write_all(event(&data).as_bytes()).await?;
    }
    let stop = event(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#);
    let end = format!("{stop}{}0\r\n\r\n", event("[DONE]"));
    stream.write_all(end.as_bytes()).await
}

fn event(data: &str) -> String {
    let event = format!("data: {data}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len())
}
