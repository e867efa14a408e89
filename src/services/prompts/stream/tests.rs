use std::time::Duration;

use super::reader::PIECE_BYTES;
use super::*;
use crate::domain::{CallDetails, FailureCode, PromptSource, PromptStatus, Timestamp};
use crate::memory_budget::{MemoryBudget, Owner};

/// The answer to prompt 7 of user 1.
fn stream() -> Arc<ResponseStream> {
    let memory = MemoryBudget::new(1 << 20).hold(Owner::default(), 0);
    ResponseStream::new(UserId(1), PromptId(7), memory)
}

fn prompt(status: PromptStatus, response: Option<&str>) -> Prompt {
    Prompt {
        id: PromptId(7),
        user_id: UserId(1),
        source: PromptSource::Api,
        prompt: "Why?".to_owned(),
        response: response.map(str::to_owned),
        model: "mock".to_owned(),
        status,
        error: (status == PromptStatus::Failed).then_some(FailureCode::UpstreamFailed),
        created_at: Timestamp(0),
        call: CallDetails::default(),
    }
}

fn completed(response: &str) -> StreamEnd {
    StreamEnd::Completed(Arc::new(prompt(PromptStatus::Completed, Some(response))))
}

/// The next event as a short text.
async fn next(reader: &mut StreamReader) -> String {
    match reader.next().await {
        Some(StreamEvent::Started(_)) => "started".to_owned(),
        Some(StreamEvent::Delta(text)) => text,
        Some(StreamEvent::Ended(StreamEnd::Completed(_))) => "completed".to_owned(),
        Some(StreamEvent::Ended(StreamEnd::Failed(failed))) => failed.code.as_str().to_owned(),
        Some(StreamEvent::Ended(StreamEnd::Deleted(_))) => "deleted".to_owned(),
        None => "end".to_owned(),
    }
}

/// All that is left to read.
async fn rest(reader: &mut StreamReader) -> Vec<String> {
    let mut events = Vec::new();
    loop {
        let event = next(reader).await;
        if event == "end" {
            return events;
        }
        events.push(event);
    }
}

#[tokio::test]
async fn an_answer_holds_memory_until_its_last_reader_is_gone() {
    let budget = MemoryBudget::new(1 << 20);
    let memory = budget.hold(Owner::user(UserId(1)), "Why?".len());
    let stream = ResponseStream::new(UserId(1), PromptId(7), memory);
    stream.push("Because");
    stream.push(".");
    assert_eq!(budget.held(), "Why?Because.".len());
    let mut reader = stream.read(None);
    stream.end(completed("Because."));
    drop(stream);
    assert_eq!(rest(&mut reader).await.last().unwrap(), "completed");
    assert_eq!(budget.held(), "Why?Because.".len());
    drop(reader);
    assert_eq!(budget.held(), 0);
}

#[tokio::test]
async fn a_reader_gets_each_piece_as_it_arrives_and_then_the_end() {
    let stream = stream();
    let mut reader = stream.read(None);
    assert_eq!(next(&mut reader).await, "started");
    stream.push("Be");
    assert_eq!(next(&mut reader).await, "Be");
    stream.push("cau");
    stream.push("se.");
    assert_eq!(
        next(&mut reader).await,
        "cause.",
        "text that arrived meanwhile is one piece"
    );
    stream.end(completed("Because."));
    assert_eq!(rest(&mut reader).await, ["completed"]);
    // A late reader gets the same text.
    assert_eq!(
        rest(&mut stream.read(None)).await,
        ["started", "Because.", "completed"]
    );
}

#[tokio::test]
async fn a_slow_reader_gets_a_long_text_in_small_pieces_cut_between_characters() {
    let stream = stream();
    let mut reader = stream.read(None);
    let text = "ü€😀".repeat(5_000);
    for piece in text.as_bytes().chunks(9) {
        stream.push(std::str::from_utf8(piece).unwrap());
    }
    stream.end(completed(&text));
    let events = rest(&mut reader).await;
    let (first, rest) = events.split_first().unwrap();
    let (last, pieces) = rest.split_last().unwrap();
    assert_eq!((first.as_str(), last.as_str()), ("started", "completed"));
    assert!(pieces.iter().all(|piece| piece.len() <= PIECE_BYTES));
    assert_eq!(pieces.concat(), text);
}

#[tokio::test]
async fn a_reader_resumes_at_the_offset_it_reached() {
    let stream = stream();
    let mut first = stream.read(None);
    next(&mut first).await;
    let beginning = first.offset();
    stream.push("Be");
    next(&mut first).await;
    let offset = first.offset();
    drop(first);
    stream.push("cause.");
    assert_eq!(next(&mut stream.read(Some(offset))).await, "cause.");
    assert_eq!(next(&mut stream.read(Some(beginning))).await, "Because.");
    stream.end(completed("Because."));
    assert_eq!(
        rest(&mut stream.read(Some(offset))).await,
        ["cause.", "completed"]
    );
}

#[tokio::test]
async fn an_offset_into_another_text_starts_again() {
    let stream = stream();
    stream.push("Because.");
    let old = StreamOffset::default().after("Well");
    let beyond = StreamOffset::default().after("Because. And");
    for offset in [old, beyond] {
        let mut reader = stream.read(Some(offset));
        assert_eq!(next(&mut reader).await, "started");
        assert_eq!(next(&mut reader).await, "Because.");
    }
}

#[tokio::test]
async fn a_reader_of_a_replaced_text_continues_or_starts_again() {
    for (replacement, expected) in [
        ("Because it is.", &[" it is.", "completed"][..]),
        ("Because", &["completed"]),
        ("Well.", &["started", "Well.", "completed"]),
        ("Be", &["started", "Be", "completed"]),
    ] {
        let stream = stream();
        let mut reader = stream.read(None);
        stream.push("Because");
        assert_eq!(next(&mut reader).await, "started");
        assert_eq!(next(&mut reader).await, "Because");
        let StreamEnd::Completed(prompt) = completed(replacement) else {
            unreachable!();
        };
        stream.end_replaced(prompt);
        stream.end(completed("Because."));
        assert_eq!(rest(&mut reader).await, expected, "{replacement}");
        let late = rest(&mut stream.read(None)).await;
        assert_eq!(late, ["started", replacement, "completed"]);
    }
}

#[tokio::test]
async fn a_failure_comes_after_the_text_that_arrived() {
    let stream = stream();
    stream.push("Be");
    let mut reader = stream.read(None);
    let mut resumed = stream.read(Some(StreamOffset::default().after("gone")));
    stream.end(StreamEnd::Failed(FailedPrompt::of(&prompt(
        PromptStatus::Failed,
        None,
    ))));
    stream.end(completed("Because."));
    assert_eq!(
        rest(&mut reader).await,
        ["started", "Be", "upstream_failed"]
    );
    assert_eq!(rest(&mut resumed).await, ["Be", "upstream_failed"]);
}

#[tokio::test]
async fn readers_end_when_the_answer_is_dropped_without_an_end() {
    let stream = stream();
    stream.push("Be");
    let mut reader = stream.read(None);
    drop(stream);
    assert_eq!(rest(&mut reader).await, ["started", "Be"]);
}

#[tokio::test]
async fn an_answer_is_abandoned_when_its_last_reader_leaves() {
    let stream = stream();
    let (one, other) = (stream.read(None), stream.read(None));
    drop(one);
    let waited = tokio::time::timeout(Duration::from_millis(20), stream.abandoned()).await;
    assert!(waited.is_err());
    drop(other);
    stream.abandoned().await;
}

#[tokio::test]
async fn waiting_for_text_ends_with_the_answer() {
    let stream = stream();
    stream.push("Be");
    let (text, offset) = stream.text_after(StreamOffset::default()).await.unwrap();
    assert_eq!((text.as_str(), offset.bytes()), ("Be", 2));
    assert_eq!(stream.text_from(offset), None);
    stream.push("cause.");
    assert_eq!(stream.text_from(offset).as_deref(), Some("cause."));
    stream.end(StreamEnd::Failed(FailedPrompt::of(&prompt(
        PromptStatus::Failed,
        None,
    ))));
    let (_, end) = stream.text_after(offset).await.unwrap();
    assert!(stream.text_after(end).await.is_none());
}

#[tokio::test]
async fn no_text_of_a_deleted_prompt_is_returned() {
    let stream = stream();
    stream.push("Be");
    assert!(!stream.is_deleted());
    stream.end(StreamEnd::Deleted(PromptId(7)));
    assert!(stream.is_deleted());
    assert!(stream.text_after(StreamOffset::default()).await.is_none());
    assert_eq!(stream.text_from(StreamOffset::default()), None);
}
