//! What counts as an answer: a table of bodies as servers send them, each read whole and in pieces,
//! as a stream and as JSON.

mod contents;
mod packing;
mod protocol;
mod recorded;

use prompt_service::llm::{AnswerReading, read_answer};

use super::{Watched, config};
use crate::support::{Reply, Upstream};

/// A body and the expected result.
struct Case {
    name: &'static str,
    body: Vec<u8>,
    expected: Expected,
}

#[derive(Clone, Copy, Debug)]
enum Expected {
    /// An answer: its text, and its reason if it has one.
    Answer(&'static str, Option<&'static str>),
    /// A failure of one of these kinds.
    Failure(&'static str),
}

use Expected::{Answer, Failure};

fn case(name: &'static str, body: impl AsRef<[u8]>, expected: Expected) -> Case {
    Case {
        name,
        body: body.as_ref().to_vec(),
        expected,
    }
}

/// An answer that ended in order.
const fn stopped(text: &'static str) -> Expected {
    Answer(text, Some("stop"))
}

/// The events of a stream, each with its blank line.
fn events(data: &[&str]) -> String {
    data.iter()
        .map(|data| format!("data: {data}\n\n"))
        .collect()
}

/// The JSON of an event with some text.
fn delta(text: &str) -> String {
    format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}]}}"#)
}

const STOP: &str = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;

/// The JSON of a whole answer whose message has this content, as JSON.
fn message(content: &str) -> String {
    format!(
        r#"{{"choices":[{{"index":0,"message":{{"role":"assistant","content":{content}}},"finish_reason":"stop"}}]}}"#
    )
}

fn table() -> Vec<Case> {
    let mut cases = packing::cases();
    cases.extend(contents::cases());
    cases.extend(protocol::cases());
    cases
}

const MOST_TEXT: usize = 4096;

fn read(pieces: &[&[u8]]) -> AnswerReading {
    read_answer(pieces.iter().copied(), MOST_TEXT, false)
}

fn check(name: &str, reading: &AnswerReading, expected: Expected) {
    match (&reading.answer, expected) {
        (Ok(answer), Answer(text, reason)) => {
            assert_eq!(answer.text, text, "{name}");
            assert_eq!(answer.finish_reason.as_deref(), reason, "{name}");
            assert_eq!(
                reading.deltas, text,
                "{name}: what is handed over is the text"
            );
        }
        (Err(kind), Failure(expected)) => assert_eq!(*kind, expected, "{name}"),
        (answer, expected) => panic!("{name}: {answer:?} in place of {expected:?}"),
    }
}

#[test]
fn every_body_of_the_table_is_read() {
    let cases = table();
    assert!(cases.len() >= 80, "{}", cases.len());
    for Case {
        name,
        body,
        expected,
    } in &cases
    {
        check(name, &read(&[body]), *expected);
    }
}

#[test]
fn the_pieces_of_a_body_make_no_difference() {
    for Case { name, body, .. } in table() {
        let whole = read(&[&body]);
        let bytes: Vec<&[u8]> = body.chunks(1).collect();
        assert_eq!(read(&bytes), whole, "{name}: byte by byte");
        // Not at every place of a long body, because the tests are not optimised.
        for at in (1..body.len()).step_by(1 + body.len() / 300) {
            let (one, two) = body.split_at(at);
            assert_eq!(read(&[one, two]), whole, "{name}: cut at {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_request_and_the_content_type_make_no_difference() {
    let upstream = Upstream::start().await;
    for Case {
        name,
        body,
        expected,
    } in table()
    {
        for is_streamed in [false, true] {
            for label in [
                "text/event-stream",
                "application/json",
                "text/html; charset=x",
            ] {
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: {label}\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                upstream.plan(Reply::raw([head.as_bytes(), &body].concat()));
                let client = Watched::new(&config(&upstream));
                let answer = client.call(is_streamed).await;
                let name = format!("{name}, as {label}, streamed: {is_streamed}");
                match (answer, expected) {
                    (Ok(answer), Answer(text, reason)) => {
                        assert_eq!(answer.text, text, "{name}");
                        assert_eq!(answer.finish_reason.as_deref(), reason, "{name}");
                    }
                    (Err(_), Failure(kind)) => {
                        assert_eq!(client.ended(&format!("{kind:?}")), 1, "{name}");
                    }
                    (answer, expected) => panic!("{name}: {answer:?} in place of {expected:?}"),
                }
            }
        }
    }
}

/// Skipped events are counted. The usual parts of a stream beside its events are not.
#[test]
fn events_that_are_no_json_are_counted() {
    let text = delta("x");
    for (data, skipped) in [
        (vec!["", "[DONE]"], 0),
        (vec![": ping", "event: ping", "id: 7", "retry: 100"], 0),
        (vec!["{oops"], 1),
        (vec!["{oops", "\"text\"", "7", "null", "ping"], 5),
        (vec![r#"{"choices":[{"delta":{"content":"half"#], 1),
    ] {
        let lines: Vec<String> = data
            .iter()
            .map(|line| match line.contains(": ") {
                true => format!("{line}\n\n"),
                false => format!("data: {line}\n\n"),
            })
            .collect();
        let body = [events(&[&text]), lines.concat(), events(&[STOP])].concat();
        assert_eq!(read(&[body.as_bytes()]).skipped, skipped, "{data:?}");
    }
}

#[test]
fn usage_is_read_in_every_form() {
    let answer = |usage: &str| {
        let body = message(r#""x""#);
        let body = format!("{},{usage}}}", &body[..body.len() - 1]);
        let answer = read(&[body.as_bytes()]).answer.unwrap();
        (answer.prompt_tokens, answer.completion_tokens)
    };
    for (usage, tokens) in [
        (
            r#""usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}"#,
            (Some(3), Some(5)),
        ),
        (r#""usage":null"#, (None, None)),
        (r#""usage":{}"#, (None, None)),
        (r#""usage":[3,5]"#, (None, None)),
        (r#""usage":"many""#, (None, None)),
        (
            r#""usage":{"prompt_tokens":-3,"completion_tokens":5.7}"#,
            (None, Some(5)),
        ),
        (
            r#""usage":{"prompt_tokens":"3","completion_tokens":null}"#,
            (Some(3), None),
        ),
        (
            r#""usage":{"prompt_tokens":NaN,"completion_tokens":1e99}"#,
            (None, None),
        ),
        // No attempt has so many.
        (
            r#""usage":{"prompt_tokens":1000000001,"completion_tokens":1000000000}"#,
            (None, Some(1_000_000_000)),
        ),
        (
            r#""usage":{"input_tokens":3,"output_tokens":5}"#,
            (Some(3), Some(5)),
        ),
        (
            r#""usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}"#,
            (Some(2), None),
        ),
        (
            r#""usage":{"prompt_tokens":1},"usage":null"#,
            (Some(1), None),
        ),
        (
            r#""usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":2},"completion_tokens":5,"completion_tokens_details":{"reasoning_tokens":4}}"#,
            (Some(3), Some(5)),
        ),
    ] {
        assert_eq!(answer(usage), tokens, "{usage}");
    }
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}"#;
    let (text, null) = (delta("x"), r#"{"choices":[],"usage":null}"#);
    for stream in [
        &[&text, STOP, usage, "[DONE]"][..],
        &[&text, STOP, "[DONE]", usage],
        &[usage, &text, STOP, null, "[DONE]"],
    ] {
        let answer = read(&[events(stream).as_bytes()]).answer.unwrap();
        assert_eq!(
            (answer.prompt_tokens, answer.completion_tokens),
            (Some(3), Some(5)),
            "{stream:?}"
        );
    }
}

#[test]
fn a_model_is_one_line_of_text() {
    for (model, name) in [
        (r#"" gpt\n-5 ""#, "gpt-5"),
        (r#""""#, ""),
        ("7", ""),
        ("null", ""),
        (r#"{"name":"x"}"#, ""),
    ] {
        let body = message(r#""x""#).replacen('{', &format!(r#"{{"model":{model},"#), 1);
        assert_eq!(
            read(&[body.as_bytes()]).answer.unwrap().model,
            name,
            "{model}"
        );
    }
}

#[test]
fn a_body_that_is_cut_off_is_an_answer_only_if_nothing_is_missing() {
    let cut = |body: &str| read_answer([body.as_bytes()], MOST_TEXT, true);
    let whole = message(r#""all of it""#);
    let no_reason = r#"{"choices":[{"message":{"content":"x"}}]}"#;
    for (body, expected) in [
        (events(&[&delta("x"), STOP]), stopped("x")),
        (events(&[&delta("x"), "[DONE]"]), Answer("x", None)),
        (events(&[&delta("x")]), Failure("truncated")),
        (events(&[no_reason]), Failure("truncated")),
        (delta("x"), Failure("truncated")),
        (no_reason.to_owned(), Answer("x", None)),
        // The length was counted in characters, and the text has others than ASCII.
        (whole[..whole.len() - 2].to_owned(), stopped("all of it")),
        (whole[..whole.len() - 3].to_owned(), Failure("malformed")),
        (
            format!("{},\"usage\":{{\"prompt_tok", &whole[..whole.len() - 1]),
            stopped("all of it"),
        ),
        (String::new(), Failure("malformed")),
    ] {
        check(&body, &cut(&body), expected);
    }
}

#[test]
fn limits_of_bytes_are_kept() {
    let long = "x".repeat(MOST_TEXT + 1);
    let text = delta("xxxx");
    let many = events(&[text.as_str(); MOST_TEXT / 4 + 1]);
    let object = format!("{{\"x\":\"{}\"", "x".repeat(1 << 20));
    let spaces = " \n".repeat(3 << 20);
    for (name, body) in [
        ("a whole text", message(&format!("{long:?}"))),
        ("a text in pieces", many),
        ("an object without end", object.clone()),
        ("an event without end", format!("data: {object}")),
        ("a line without end", "x".repeat(1 << 20)),
        (
            "lines of data without end",
            "data: {\"x\":\ndata: 7\n".repeat(1 << 16),
        ),
        ("nothing without end", spaces),
    ] {
        let pieces: Vec<&[u8]> = body.as_bytes().chunks(1 << 14).collect();
        check(name, &read(&pieces), Failure("too_long"));
    }
    // The answer before it was whole.
    let late = [events(&[&delta("x"), STOP]), "x".repeat(1 << 20)].concat();
    let pieces: Vec<&[u8]> = late.as_bytes().chunks(1 << 14).collect();
    check("late", &read(&pieces), stopped("x"));
}

#[test]
fn a_hostile_body_takes_linear_time() {
    let depth = 200_000;
    let nested = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let whole = message(r#""x""#).replacen('{', &format!("{{\"deep\":{nested},"), 1);
    let most = 1 << 20;
    let read = |body: &str| read_answer([body.as_bytes()], most, false);
    check("deep", &read(&whole), stopped("x"));
    for body in [
        "{\"a\":{".repeat(depth),
        "{\n".repeat(depth),
        "{\"a\n".repeat(depth),
        "data: {\"a\":[\n".repeat(depth / 2),
        "data: {\"a\n\n".repeat(depth / 2),
        "{\"choices\":[".repeat(depth / 2),
        "\\".repeat(depth),
        "\"".repeat(depth),
    ] {
        // Quadratic work would take minutes.
        assert!(read(&body).answer.is_err());
    }
}
