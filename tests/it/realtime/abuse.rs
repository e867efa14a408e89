//! Clients that misbehave on a socket, without harm to other clients.

use futures_util::SinkExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use super::{PATH, announce, assert_next, assert_open, close_code, open};
use crate::support::{App, DEADLINE, Socket, spawn_app};

/// The longest message that is accepted, in bytes.
const MAX_MESSAGE: usize = 64 << 10;

fn frame(opcode: OpCode, payload: &[u8], is_last: bool) -> Message {
    Message::Frame(Frame::message(payload.to_vec(), opcode, is_last))
}

/// Writes bytes beneath the WebSocket.
async fn write_raw(socket: &mut Socket, bytes: &[u8]) {
    let stream = socket.stream().get_mut();
    stream.write_all(bytes).await.unwrap();
}

#[tokio::test]
async fn a_message_over_64_kib_closes_the_socket_with_a_reason() {
    let app = spawn_app(|config| config.server.socket_timings.closing = DEADLINE).await;
    let alice = app.user("alice").await;
    let mut longest = open(&app, &alice.access).await;
    longest.send_text(&"x".repeat(MAX_MESSAGE)).await;
    assert_open(&mut longest, &alice).await;
    for length in [MAX_MESSAGE + 1, 1 << 20, 8 << 20] {
        let mut socket = open(&app, &alice.access).await;
        // The close frame may come while the client is still sending.
        let _ = socket
            .stream()
            .send(Message::text("x".repeat(length)))
            .await;
        assert_eq!(close_code(&mut socket).await, 1009, "{length} bytes");
    }
    let mut in_parts = open(&app, &alice.access).await;
    let part = vec![b'x'; MAX_MESSAGE / 2];
    in_parts
        .send(frame(OpCode::Data(Data::Text), &part, false))
        .await;
    in_parts
        .send(frame(OpCode::Data(Data::Continue), &part, false))
        .await;
    in_parts
        .send(frame(OpCode::Data(Data::Continue), b"x", true))
        .await;
    assert_eq!(close_code(&mut in_parts).await, 1009);
    assert_open(&mut longest, &alice).await;
}

#[tokio::test]
async fn client_that_sends_too_much_gets_a_close_frame() {
    let app = spawn_app(|config| config.server.socket_timings.closing = DEADLINE).await;
    let alice = app.user("alice").await;
    let mut stream = open_narrow(&app, &alice.access).await;
    let length = 8_u64 << 20;
    stream.write_all(b"\x81\xff").await.unwrap();
    stream.write_u64(length).await.unwrap();
    let masked = vec![0; 4 + usize::try_from(length).unwrap()];
    // Closing with unread data would reset the connection, and on some systems lose the data that
    // was sent before.
    timeout(DEADLINE, stream.write_all(&masked))
        .await
        .expect("all is read")
        .expect("the connection holds");
    read_message(&mut stream).await;
    let (is_close, reason) = read_message(&mut stream).await;
    assert!(is_close);
    assert_eq!(reason[..2], 1009_u16.to_be_bytes());
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_text_that_is_no_utf8_closes_the_socket_with_1007() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    for bad in [&b"\xff"[..], b"ok \xed\xa0\x80", b"cut \xe2\x82"] {
        let mut socket = open(&app, &alice.access).await;
        socket
            .send(frame(OpCode::Data(Data::Text), bad, true))
            .await;
        assert_eq!(close_code(&mut socket).await, 1007, "{bad:?}");
    }
    // A letter may be cut in two by the frames of a message.
    let mut socket = open(&app, &alice.access).await;
    socket
        .send(frame(OpCode::Data(Data::Text), b"\xe2\x82", false))
        .await;
    socket
        .send(frame(OpCode::Data(Data::Continue), b"\xac", true))
        .await;
    assert_open(&mut socket, &alice).await;
}

#[tokio::test]
async fn what_is_no_websocket_frame_closes_the_socket_with_1002() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    for (what, bytes) in [
        ("unmasked", &b"\x81\x01x"[..]),
        ("reserved opcode", b"\x83\x80\0\0\0\0"),
        ("reserved control opcode", b"\x8b\x80\0\0\0\0"),
        ("reserved bit", b"\xc1\x80\0\0\0\0"),
        ("continuation of nothing", b"\x80\x80\0\0\0\0"),
        ("long control frame", b"\x89\xfe\x00\x7e\0\0\0\0"),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n"),
    ] {
        let mut socket = open(&app, &alice.access).await;
        let padded = [bytes, &[0; 200]].concat();
        write_raw(&mut socket, &padded).await;
        assert_eq!(close_code(&mut socket).await, 1002, "{what}");
    }
}

/// A socket of a client with the smallest possible receive buffer.
async fn open_narrow(app: &App, access: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(app.addr).await.unwrap();
    let request = format!(
        "GET {PATH}?token={access} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        app.addr
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    stream
}

/// The payload of the next message, and whether it is a close frame.
async fn read_message(stream: &mut TcpStream) -> (bool, Vec<u8>) {
    let mut message = Vec::new();
    loop {
        let first = stream.read_u8().await.unwrap();
        let length = match stream.read_u8().await.unwrap() {
            126 => u64::from(stream.read_u16().await.unwrap()),
            127 => stream.read_u64().await.unwrap(),
            short => u64::from(short),
        };
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut payload).await.unwrap();
        match first {
            // The last frame of a text, whole or not.
            0x81 | 0x80 => {
                message.extend(payload);
                return (false, message);
            }
            0x01 | 0x00 => message.extend(payload),
            0x88 => return (true, payload),
            0x89 => {}
            other => panic!("a frame {other:#x}"),
        }
    }
}

#[tokio::test]
async fn a_slow_reader_is_closed_with_1013_and_disturbs_no_other_socket() {
    let app = spawn_app(|config| config.server.socket_timings.closing = DEADLINE).await;
    let alice = app.user("alice").await;
    let mut slow = open_narrow(&app, &alice.access).await;
    let mut other = open(&app, &alice.access).await;
    // The same text each time, so that its embedding is known after the first.
    let prompt = "\u{1f40c}".repeat(32_000);
    let closed = "websockets_closed_total{code=\"1013\"}";
    let mut events = Vec::new();
    while app.metric(closed).await.is_none() {
        // The kernel's buffers on both sides, and a queue of 64. If more than that can be unread,
        // some buffer is unbounded.
        assert!(events.len() < 400, "the reader was never found too slow");
        let event = announce(&alice, &prompt).await;
        assert_next(&mut other, &event).await;
        events.push(event);
    }
    assert_eq!(app.metric("websockets_open").await, Some(1.0));

    // It reads again: it gets the first events, complete and in order, and then the reason for the
    // close.
    let (_, hello) = read_message(&mut slow).await;
    assert!(hello.starts_with(b"{\"message\": \"WebSocket connected\""));
    let mut read = 0;
    let code = loop {
        match read_message(&mut slow).await {
            (true, payload) => break u16::from_be_bytes([payload[0], payload[1]]),
            (false, text) => {
                // The close frame may have cut off the last event, which is then no message.
                assert!(text == events[read].as_bytes(), "event {read}");
                read += 1;
            }
        }
    };
    assert_eq!(code, 1013);
    assert!(read < events.len());
    assert_open(&mut other, &alice).await;
}

#[tokio::test]
async fn pongs_for_a_client_that_never_reads_are_bounded() {
    // Pings of the service itself would come between its pongs.
    let app = spawn_app(|config| config.server.socket_timings.ping_every = 2 * DEADLINE).await;
    let alice = app.user("alice").await;
    let mut stream = open_narrow(&app, &alice.access).await;
    // 32 MiB of pings; the kernel buffers a few of the pongs. A client's frame is masked, here with
    // zeros.
    let ping = [&[0x89, 0x80 | 125, 0, 0, 0, 0][..], &[b'x'; 125]].concat();
    let batch = ping.repeat(1000);
    let count: usize = 250;
    for _ in 0..count {
        timeout(DEADLINE, stream.write_all(&batch))
            .await
            .expect("the service reads on")
            .unwrap();
    }
    // The service replies to the last ping, as the standard requires, but not to all.
    let last = [&[0x89, 0x80 | 4, 0, 0, 0, 0][..], b"last"].concat();
    stream.write_all(&last).await.unwrap();
    read_message(&mut stream).await;
    let mut answered = 0;
    loop {
        let (first, length) = (
            stream.read_u8().await.unwrap(),
            stream.read_u8().await.unwrap(),
        );
        assert_eq!(first, 0x8a);
        let mut payload = vec![0; usize::from(length)];
        stream.read_exact(&mut payload).await.unwrap();
        if payload == b"last" {
            break;
        }
        answered += 1;
    }
    assert!(answered < 1000 * count / 2, "{answered} answers were kept");
}
