//! An upstream with planned replies: good, bad, slow or none. It remembers all requests.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::DEADLINE;

/// A server of the chat-completions protocol on a free port. Each request gets the next planned
/// reply, or a good answer if none is planned. It ends when this is dropped.
pub struct Upstream {
    /// Where it listens.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    models: Mutex<Option<Reply>>,
    model_requests: AtomicUsize,
    plan: Mutex<VecDeque<Reply>>,
    requests: Mutex<Vec<Received>>,
    broken_off: AtomicUsize,
}

/// A request as it was received.
#[derive(Clone, Debug)]
pub struct Received {
    /// Method and path.
    pub line: String,
    /// Header lines, their names in lower case.
    pub headers: Vec<(String, String)>,
    /// The JSON of the body.
    pub body: Value,
    /// The body as it came.
    pub bytes: Bytes,
    /// The number of its connection, from 0.
    pub connection: usize,
}

impl Received {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(known, _)| known == name);
        header.map(|(_, value)| value.as_str())
    }
}

/// What happens after one request.
#[derive(Clone, Debug, Default)]
pub struct Reply(Vec<Step>);

#[derive(Clone, Debug)]
enum Step {
    Write(Bytes),
    Pause(Duration),
    Wait(watch::Receiver<bool>),
    /// Writes the same again and again.
    Forever(Bytes, Duration),
    Hang,
    Close,
    Reset,
}

impl Reply {
    /// Those bytes as they are.
    pub fn raw(bytes: impl Into<Bytes>) -> Self {
        Self::default().then(bytes)
    }

    /// A status with header lines and a body of that type.
    pub fn of(status: u16, kind: &str, headers: &[&str], body: &str) -> Self {
        let mut head = format!(
            "HTTP/1.1 {status} Whatever\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n",
            body.len()
        );
        for line in headers {
            head.push_str(line);
            head.push_str("\r\n");
        }
        Self::raw(format!("{head}\r\n{body}"))
    }

    /// An error with header lines, and a body that must be shown to no client.
    pub fn error(status: u16, headers: &[&str]) -> Self {
        let body = json!({ "error": { "message": "upstream-secret-words", "code": "x" } });
        Self::of(status, "application/json", headers, &body.to_string())
    }

    /// JSON.
    pub fn json(body: &Value) -> Self {
        let headers = ["x-request-id: req-7"];
        Self::of(200, "application/json", &headers, &body.to_string())
    }

    /// A whole answer.
    pub fn answer(text: &str) -> Self {
        Self::json(&json!({
            "id": "c-1", "object": "chat.completion", "model": "scripted-1",
            "choices": [{ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": text } }],
            "usage": { "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 },
        }))
    }

    /// The head of a stream, whose pieces follow in chunks.
    pub fn stream_head() -> Self {
        Self::raw(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-request-id: req-8\r\n\
             transfer-encoding: chunked\r\n\r\n",
        )
    }

    /// A streamed answer from its head to its end, with a pause before each piece.
    pub fn stream(pieces: &[&str], pace: Duration) -> Self {
        let mut reply = Self::stream_head().delta("");
        for piece in pieces {
            reply = reply.pause(pace).delta(piece);
        }
        reply.stop().usage().event("[DONE]").end()
    }

    /// Further bytes.
    pub fn then(mut self, bytes: impl Into<Bytes>) -> Self {
        self.0.push(Step::Write(bytes.into()));
        self
    }

    /// Bytes as a chunk.
    pub fn chunk(self, bytes: &str) -> Self {
        self.then(chunk(bytes))
    }

    /// An event.
    pub fn event(self, data: &str) -> Self {
        self.chunk(&format!("data: {data}\n\n"))
    }

    /// A streamed answer of these objects, one for each event.
    pub fn events(objects: &[&str]) -> Self {
        let mut reply = Self::stream_head();
        for object in objects {
            reply = reply.event(object);
        }
        reply.event("[DONE]").end()
    }

    /// An event with text.
    pub fn delta(self, text: &str) -> Self {
        let choice = json!({ "index": 0, "delta": { "content": text }, "finish_reason": null });
        self.event(&json!({ "model": "scripted-1", "choices": [choice] }).to_string())
    }

    /// The event that says why the answer ends.
    pub fn stop(self) -> Self {
        let choice = json!({ "index": 0, "delta": {}, "finish_reason": "stop" });
        self.event(&json!({ "model": "scripted-1", "choices": [choice] }).to_string())
    }

    /// The event that says what it cost.
    pub fn usage(self) -> Self {
        let usage = json!({ "prompt_tokens": 3, "completion_tokens": 5 });
        self.event(&json!({ "choices": [], "usage": usage }).to_string())
    }

    /// The end of a chunked body.
    pub fn end(self) -> Self {
        self.then("0\r\n\r\n")
    }

    /// A pause.
    pub fn pause(mut self, pause: Duration) -> Self {
        self.0.push(Step::Pause(pause));
        self
    }

    /// Adds what another reply does after this one.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// A pause that the test ends.
    pub fn wait(mut self, gate: &Gate) -> Self {
        self.0.push(Step::Wait(gate.0.subscribe()));
        self
    }

    /// The same bytes without end, with a pause before each.
    pub fn forever(mut self, bytes: impl Into<Bytes>, pause: Duration) -> Self {
        self.0.push(Step::Forever(bytes.into(), pause));
        self
    }

    /// Sends nothing more and keeps the connection open.
    pub fn hang(mut self) -> Self {
        self.0.push(Step::Hang);
        self
    }

    /// An orderly close of the connection.
    pub fn close(mut self) -> Self {
        self.0.push(Step::Close);
        self
    }

    /// A reset of the connection.
    pub fn reset(mut self) -> Self {
        self.0.push(Step::Reset);
        self
    }
}

/// Makes replies wait until it is opened. Dropping it opens it.
pub struct Gate(watch::Sender<bool>);

impl Gate {
    /// A closed one.
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Lets them go on.
    pub fn open(&self) {
        self.0.send_replace(true);
    }
}

/// Bytes as a chunk of a body.
pub fn chunk(bytes: &str) -> String {
    format!("{:x}\r\n{bytes}\r\n", bytes.len())
}

impl Upstream {
    /// Starts one.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap()).await
    }

    /// Starts one at an address, such as that of a server that has ended.
    pub async fn start_at(addr: SocketAddr) -> Self {
        let deadline = Instant::now() + DEADLINE;
        let listener = loop {
            match TcpListener::bind(addr).await {
                Ok(listener) => break listener,
                // The connections of the server before may not have ended yet, and another process
                // may have its port for a moment.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    assert!(Instant::now() < deadline, "{error}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        let (addr, shared) = (listener.local_addr().unwrap(), Arc::<Shared>::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&shared)));
        Self {
            addr,
            shared,
            tasks,
        }
    }

    /// Ends it: its port is free when this returns, and its connections break.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }

    /// Its base URL.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    /// Sets the reply to each request for its models. Without it there is no such list. These
    /// requests are not among [`Self::requests`].
    pub fn show_models(&self, reply: Reply) -> &Self {
        *self.shared.models.lock().unwrap() = Some(reply);
        self
    }

    /// How many requests for its models there were.
    pub fn model_requests(&self) -> usize {
        self.shared.model_requests.load(Ordering::Acquire)
    }

    /// Plans the reply to a coming request.
    pub fn plan(&self, reply: Reply) -> &Self {
        self.shared.plan.lock().unwrap().push_back(reply);
        self
    }

    /// Plans the same reply to many coming requests.
    pub fn plan_many(&self, count: usize, reply: &Reply) -> &Self {
        for _ in 0..count {
            self.plan(reply.clone());
        }
        self
    }

    /// How many replies the client did not read to the end.
    pub fn broken_off(&self) -> usize {
        self.shared.broken_off.load(Ordering::Acquire)
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<Received> {
        self.shared.requests.lock().unwrap().clone()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    for number in 0.. {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        stream.set_nodelay(true).unwrap();
        connections.spawn(serve(stream, number, Arc::clone(&shared)));
    }
}

/// Serves the requests of one connection until either side closes it. A client that disconnects is
/// no error.
async fn serve(mut stream: TcpStream, number: usize, shared: Arc<Shared>) {
    while let Ok(Some(request)) = read_request(&mut stream, number).await {
        let reply = if request.line.starts_with("GET ") {
            shared.model_requests.fetch_add(1, Ordering::AcqRel);
            let models = shared.models.lock().unwrap().clone();
            let is_there = request.line.starts_with("GET /v1/");
            models
                .filter(|_| is_there)
                .unwrap_or_else(|| Reply::error(404, &[]))
        } else {
            let is_streamed = request.body["stream"] == json!(true);
            let planned = shared.plan.lock().unwrap().pop_front();
            shared.requests.lock().unwrap().push(request);
            planned.unwrap_or_else(|| match is_streamed {
                true => Reply::stream(&["Hello", " there"], Duration::ZERO),
                false => Reply::answer("Hello there"),
            })
        };
        for step in reply.0 {
            let done = match step {
                Step::Write(bytes) => stream.write_all(&bytes).await,
                Step::Pause(pause) => {
                    tokio::time::sleep(pause).await;
                    Ok(())
                }
                Step::Wait(mut opened) => {
                    tokio::select! {
                        // The gate was opened or dropped.
                        _ = opened.wait_for(|opened| *opened) => Ok(()),
                        _ = stream.readable() => Err(io::ErrorKind::ConnectionAborted.into()),
                    }
                }
                Step::Forever(bytes, pause) => loop {
                    tokio::time::sleep(pause).await;
                    if let Err(error) = stream.write_all(&bytes).await {
                        break Err(error);
                    }
                },
                Step::Hang => {
                    // Until the client closes.
                    let gone = stream.read(&mut [0; 1]).await;
                    gone.and(Err(io::ErrorKind::ConnectionAborted.into()))
                }
                Step::Close => return,
                Step::Reset => {
                    stream.set_zero_linger().unwrap();
                    return;
                }
            };
            if done.is_err() {
                shared.broken_off.fetch_add(1, Ordering::AcqRel);
                return;
            }
        }
    }
}

async fn read_request(stream: &mut TcpStream, connection: usize) -> io::Result<Option<Received>> {
    let (mut bytes, mut piece) = (Vec::new(), [0; 16 << 10]);
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        match stream.read(&mut piece).await? {
            0 => return Ok(None),
            length => bytes.extend_from_slice(&piece[..length]),
        }
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap().to_owned();
    let headers: Vec<(String, String)> = lines
        .map(|line| line.split_once(':').unwrap())
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length: usize = length.map_or(0, |(_, value)| value.parse().unwrap());
    let mut body = bytes.split_off(head_end + 4);
    while body.len() < length {
        match stream.read(&mut piece).await? {
            0 => return Ok(None),
            read => body.extend_from_slice(&piece[..read]),
        }
    }
    Ok(Some(Received {
        line,
        headers,
        body: match body.is_empty() {
            true => Value::Null,
            // Null for half a surrogate pair, which upstreams take and this parser does not.
            false => serde_json::from_slice(&body).unwrap_or_default(),
        },
        bytes: body.into(),
        connection,
    }))
}
