use std::time::Duration;

use super::reader::PIECE_BYTES;
use super::*;
use crate::domain::{CallDetails, FailureCode, PromptStatus, Timestamp};
use crate::memory_budget::{MemoryBudget, Owner};

/// An answer of prompt 7, user 1.
fn live() -> Arc<Live> {
    let memory = MemoryBudget::new(1 << 20).hold(Owner::default(), 0);
    Live::new(UserId(1), PromptId(7), memory)
}

fn prompt(status: PromptStatus, response: Option<&str>) -> Prompt {
    Prompt {
        id: PromptId(7),
        user_id: UserId(1),
        prompt: "Why?".to_owned(),
        response: response.map(str::to_owned),
        model: "mock".to_owned(),
        status,
        error: (status == PromptStatus::Failed).then_some(FailureCode::UpstreamFailed),
        created_at: Timestamp(0),
        call: CallDetails::default(),
    }
}

fn completed(response: &str) -> End {
    End::Completed(Arc::new(prompt(PromptStatus::Completed, Some(response))))
}

/// The next event as a short text.
async fn next(reader: &mut Reader) -> String {
    match reader.next().await {
        Some(Event::Started(_)) => "started".to_owned(),
        Some(Event::Delta(text)) => text,
        Some(Event::Completed(_)) => "completed".to_owned(),
        Some(Event::Failed(failed)) => failed.code.as_str().to_owned(),
        Some(Event::Deleted(_)) => "deleted".to_owned(),
        None => "end".to_owned(),
    }
}

/// All that is left to read.
async fn rest(reader: &mut Reader) -> Vec<String> {
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
    let live = Live::new(UserId(1), PromptId(7), memory);
    live.push("Because");
    live.push(".");
    assert_eq!(budget.held(), "Why?Because.".len());
    let mut reader = live.read(None);
    live.end(completed("Because."));
    drop(live);
    assert_eq!(rest(&mut reader).await.last().unwrap(), "completed");
    assert_eq!(budget.held(), "Why?Because.".len());
    drop(reader);
    assert_eq!(budget.held(), 0);
}

#[tokio::test]
async fn a_reader_gets_each_piece_as_it_comes_and_the_end() {
    let live = live();
    let mut reader = live.read(None);
    assert_eq!(next(&mut reader).await, "started");
    live.push("Be");
    assert_eq!(next(&mut reader).await, "Be");
    live.push("cau");
    live.push("se.");
    assert_eq!(
        next(&mut reader).await,
        "cause.",
        "what came meanwhile is one piece"
    );
    live.end(completed("Because."));
    assert_eq!(rest(&mut reader).await, ["completed"]);
    // One who comes late reads the same.
    assert_eq!(
        rest(&mut live.read(None)).await,
        ["started", "Because.", "completed"]
    );
}

#[tokio::test]
async fn a_slow_reader_gets_a_long_text_in_small_pieces_cut_between_characters() {
    let live = live();
    let mut reader = live.read(None);
    let text = "ü€😀".repeat(5_000);
    for piece in text.as_bytes().chunks(9) {
        live.push(std::str::from_utf8(piece).unwrap());
    }
    live.end(completed(&text));
    let events = rest(&mut reader).await;
    let (first, rest) = events.split_first().unwrap();
    let (last, pieces) = rest.split_last().unwrap();
    assert_eq!((first.as_str(), last.as_str()), ("started", "completed"));
    assert!(pieces.iter().all(|piece| piece.len() <= PIECE_BYTES));
    assert_eq!(pieces.concat(), text);
}

#[tokio::test]
async fn a_reader_goes_on_at_the_place_it_reached() {
    let live = live();
    let mut first = live.read(None);
    next(&mut first).await;
    let beginning = first.place();
    live.push("Be");
    next(&mut first).await;
    let place = first.place();
    drop(first);
    live.push("cause.");
    assert_eq!(next(&mut live.read(Some(place))).await, "cause.");
    assert_eq!(next(&mut live.read(Some(beginning))).await, "Because.");
    live.end(completed("Because."));
    assert_eq!(
        rest(&mut live.read(Some(place))).await,
        ["cause.", "completed"]
    );
}

#[tokio::test]
async fn a_place_in_another_text_begins_again() {
    let live = live();
    live.push("Because.");
    let old = Place::default().after("Well");
    let beyond = Place::default().after("Because. And");
    for place in [old, beyond] {
        let mut reader = live.read(Some(place));
        assert_eq!(next(&mut reader).await, "started");
        assert_eq!(next(&mut reader).await, "Because.");
    }
}

#[tokio::test]
async fn a_reader_of_a_text_that_another_process_replaced_goes_on_or_begins_anew() {
    for (replacement, told) in [
        ("Because it is.", &[" it is.", "completed"][..]),
        ("Because", &["completed"]),
        ("Well.", &["started", "Well.", "completed"]),
        ("Be", &["started", "Be", "completed"]),
    ] {
        let live = live();
        let mut reader = live.read(None);
        live.push("Because");
        assert_eq!(next(&mut reader).await, "started");
        assert_eq!(next(&mut reader).await, "Because");
        let End::Completed(prompt) = completed(replacement) else {
            unreachable!();
        };
        live.end_replaced(prompt);
        live.end(completed("Because."));
        assert_eq!(rest(&mut reader).await, told, "{replacement}");
        let late = rest(&mut live.read(None)).await;
        assert_eq!(late, ["started", replacement, "completed"]);
    }
}

#[tokio::test]
async fn a_failure_is_told_after_the_text_there_was() {
    let live = live();
    live.push("Be");
    let mut reader = live.read(None);
    let mut resumed = live.read(Some(Place::default().after("gone")));
    live.end(End::Failed(FailedPrompt::of(&prompt(
        PromptStatus::Failed,
        None,
    ))));
    live.end(completed("Because."));
    assert_eq!(
        rest(&mut reader).await,
        ["started", "Be", "upstream_failed"]
    );
    assert_eq!(rest(&mut resumed).await, ["Be", "upstream_failed"]);
}

#[tokio::test]
async fn readers_end_when_the_answer_is_dropped_without_an_end() {
    let live = live();
    live.push("Be");
    let mut reader = live.read(None);
    drop(live);
    assert_eq!(rest(&mut reader).await, ["started", "Be"]);
}

#[tokio::test]
async fn an_answer_is_deserted_when_its_last_reader_has_gone() {
    let live = live();
    let (one, other) = (live.read(None), live.read(None));
    drop(one);
    let waited = tokio::time::timeout(Duration::from_millis(20), live.deserted()).await;
    assert!(waited.is_err());
    drop(other);
    live.deserted().await;
}

#[tokio::test]
async fn text_is_waited_for_and_ends_with_the_answer() {
    let live = live();
    live.push("Be");
    let (text, place) = live.text_after(Place::default()).await.unwrap();
    assert_eq!((text.as_str(), place.bytes()), ("Be", 2));
    assert_eq!(live.text_from(place), None);
    live.push("cause.");
    assert_eq!(live.text_from(place).as_deref(), Some("cause."));
    live.end(End::Failed(FailedPrompt::of(&prompt(
        PromptStatus::Failed,
        None,
    ))));
    let (_, end) = live.text_after(place).await.unwrap();
    assert!(live.text_after(end).await.is_none());
}

#[tokio::test]
async fn no_more_text_of_a_deleted_prompt_is_passed_on() {
    let live = live();
    live.push("Be");
    assert!(!live.is_deleted());
    live.end(End::Deleted);
    assert!(live.is_deleted());
    assert!(live.text_after(Place::default()).await.is_none());
    assert_eq!(live.text_from(Place::default()), None);
}
