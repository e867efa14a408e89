use bytes::Bytes;

use super::*;
use crate::llm::ChatRequest;

const PRICES: &str = r#"{
    "small": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
              "max_input_tokens": 1000, "max_output_tokens": 100},
    "priority": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
                 "input_cost_per_token_priority": 3e-6, "output_cost_per_token_priority": 4e-6,
                 "max_input_tokens": 1000, "max_output_tokens": 100},
    "unbounded": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}
}"#;
const MICRO: i64 = 1_000_000;

fn metering() -> Metering {
    Metering {
        prices: PriceTable::bundled().overlaid(PRICES, "test").unwrap(),
        providers: HashMap::new(),
        is_mock: false,
        max_tokens: Some(10),
        system_bytes: 0,
        service: None,
    }
}

fn chat(members: &str) -> ChatRequest {
    let body = format!(
        r#"{{"model": "small", "messages": [{{"role": "user", "content": "Hi"}}]{members}}}"#
    );
    ChatRequest::parse(Bytes::from(body)).unwrap()
}

fn most(model: &str, members: &str) -> Option<i64> {
    most_of(model, &chat(members))
}

fn most_of(model: &str, request: &ChatRequest) -> Option<i64> {
    let metering = metering();
    let row = metering.find("primary", model)?;
    let size = metering.size(Content::Chat(request));
    let (input, output) = most_tokens(&row, size)?;
    Some(row.prices.most_cost(input, output, size.tier).0 / MICRO)
}

fn attempt(usage: Option<TokenUsage>, outcome: &'static str) -> Attempt {
    Attempt {
        upstream: "primary".to_owned(),
        model: "small".to_owned(),
        answering_model: None,
        usage,
        outcome,
    }
}

fn tokens(input: u64, output: u64) -> TokenUsage {
    TokenUsage {
        input,
        output,
        ..TokenUsage::default()
    }
}

#[test]
fn the_most_follows_the_bytes_of_the_request_and_the_bounds_of_the_answer() {
    let plain = i64::try_from(chat("").body().len()).unwrap() + 64;
    assert_eq!(most("small", ""), Some(plain + 200));
    let few = r#", "max_tokens": 5"#;
    let with = |members: &str| i64::try_from(members.len()).unwrap() + plain;
    assert_eq!(most("small", few), Some(with(few) + 10));
    let several = r#", "max_completion_tokens": 5, "n": 3"#;
    assert_eq!(most("small", several), Some(with(several) + 30));
    // More than the model makes cannot be used.
    let many = r#", "max_tokens": 1000"#;
    assert_eq!(most("small", many), Some(with(many) + 200));
}

/// The same for a request with that content and those members.
fn most_with(model: &str, content: &str, members: &str) -> Option<i64> {
    let messages = format!(r#"[{{"role": "user", "content": {content}}}]"#);
    let body = format!(r#"{{"model": "small", "messages": {messages}{members}}}"#);
    most_of(model, &ChatRequest::parse(Bytes::from(body)).unwrap())
}

#[test]
fn an_input_that_may_exceed_its_bytes_counts_as_the_longest_of_the_model() {
    let media = [
        r#"[{"type": "image_url"}]"#,
        r#"[{"type": "text", "text": "Hi"}, {"type": "input_audio"}]"#,
        r#"[{"type": "file"}]"#,
        r#"[{"type": "\u0069mage_url"}]"#,
        r#"[{"type": "image", "source": {}}]"#,
        r#"[{"type": "document_url"}]"#,
        r#"[{"type": "some-later-kind"}]"#,
        r#"[{"type": "text", "text": "Hi"}, {}]"#,
        r#"null, "audio": {"id": "audio_7"}"#,
    ];
    let additions = [
        r#", "web_search_options": {}"#,
        r#", "plugins": [{"id": "web"}]"#,
        r#", "tools": [{"type": "function"}, {"type": "web_search"}]"#,
        r#", "tools": [{"name": "of-another-protocol"}]"#,
    ];
    let media = media.map(|content| (content, ""));
    let additions = additions.map(|members| (r#""Hi""#, members));
    for (content, members) in media.into_iter().chain(additions) {
        let most = |model| most_with(model, content, members);
        assert_eq!(most("small"), Some(1_000 + 200), "{content} {members}");
        assert_eq!(most("unbounded"), None, "{content} {members}");
    }
}

#[test]
fn a_request_of_texts_counts_by_its_bytes() {
    for (content, members) in [
        (r#""Draw an \"image\" of a file""#, ""),
        (r#"[{"type": "text", "text": "an image_url"}]"#, ""),
        (r#"[]"#, r#", "tools": null, "plugins": null"#),
        (
            r#""Hi""#,
            r#", "tools": [{"type": "function", "function": {"name": "read", "parameters":
                {"properties": {"file": {}, "image": {}}}}}, {"type": "custom"}]"#,
        ),
    ] {
        let most = most_with("small", content, members);
        assert!(most.unwrap() < 1_000, "{content} {members}");
    }
}

#[test]
fn of_two_bounds_of_the_answer_the_greater_counts() {
    let two = r#", "max_completion_tokens": 1, "max_tokens": 50"#;
    let bytes = i64::try_from(chat(two).body().len()).unwrap() + 64;
    assert_eq!(most("small", two), Some(bytes + 100));
}

#[test]
fn without_a_bound_or_a_price_the_most_is_not_known() {
    assert_eq!(most("unbounded", ""), None);
    assert!(most("unbounded", r#", "max_tokens": 5"#).is_some());
    assert_eq!(most("nobodys-model", ""), None);
}

#[test]
fn a_dearer_service_tier_counts_if_it_is_asked_for() {
    let plain = r#", "service_tier": "default", "max_tokens": 1"#;
    let dear = r#", "service_tier": "priority", "max_tokens": 1"#;
    let bytes = |members: &str| i64::try_from(chat(members).body().len()).unwrap() + 64;
    assert_eq!(most("priority", plain), Some(bytes(plain) + 2));
    assert_eq!(most("priority", dear), Some(3 * bytes(dear) + 4));
    let escaped = r#", "service_tier": "\u0070riority", "max_tokens": 1"#;
    assert_eq!(most("priority", escaped), Some(3 * bytes(escaped) + 4));
}

#[test]
fn what_the_upstream_counted_is_priced_exactly() {
    let entries = metering().entries(
        &[attempt(Some(tokens(7, 3)), llm::COMPLETED)],
        Content::Prompt("Why?"),
        CallEnd {
            answer_bytes: Some(9),
            most_cost: Some(Picodollars(1)),
        },
    );
    let [entry] = &entries[..] else {
        panic!("{entries:?}");
    };
    assert_eq!(entry.cost, Some(Picodollars(13 * MICRO)));
    assert_eq!(entry.price_version.as_deref(), Some("test"));
    assert_eq!(entry.outcome, UsageOutcome::Answered);
    assert!(!entry.is_estimated);
}

#[test]
fn the_price_of_the_model_that_was_asked_for_decides_and_else_that_of_the_answering_one() {
    let cost = |asked: &str, answering: &str| {
        let attempt = Attempt {
            model: asked.to_owned(),
            answering_model: Some(answering.to_owned()),
            ..attempt(Some(tokens(7, 3)), llm::COMPLETED)
        };
        let end = CallEnd {
            answer_bytes: None,
            most_cost: None,
        };
        let entries = metering().entries(&[attempt], Content::Prompt("Why?"), end);
        assert_eq!(entries[0].model, answering);
        entries[0].cost.map(|cost| cost.0 / MICRO)
    };
    assert_eq!(cost("small", "gpt-4o"), Some(13));
    assert_eq!(cost("nobodys-alias", "small"), Some(13));
    assert_eq!(cost("nobodys-alias", "nobodys-model"), None);
}

#[test]
fn what_nobody_counted_is_counted_from_above_within_the_most() {
    let (metering, content) = (metering(), Content::Prompt("Why?"));
    let end = |answer_bytes, most: i64| CallEnd {
        answer_bytes,
        most_cost: Some(Picodollars(most * MICRO)),
    };
    let answered = [attempt(None, llm::COMPLETED)];
    let entries = metering.entries(&answered, content, end(Some(6), 1_000));
    // Four bytes and 64 tokens around them, and six bytes of answer.
    assert_eq!(entries[0].tokens, Some(tokens(68, 6)));
    assert_eq!(entries[0].cost, Some(Picodollars(80 * MICRO)));
    assert!(entries[0].is_estimated);
    let several = [
        attempt(None, "token_timeout"),
        attempt(None, llm::CANCELLED),
        attempt(Some(tokens(50, 10)), llm::COMPLETED),
    ];
    let entries = metering.entries(&several, content, end(None, 168));
    let costs: Vec<_> = entries
        .iter()
        .map(|entry| entry.cost.unwrap().0 / MICRO)
        .collect();
    // 168 for all: 70 are known, 88 are the most of one, and 10 are left for the other.
    assert_eq!(costs, [88, 10, 70]);
    let outcomes = [
        UsageOutcome::Failed,
        UsageOutcome::Cancelled,
        UsageOutcome::Answered,
    ];
    assert_eq!(
        entries
            .iter()
            .map(|entry| entry.outcome)
            .collect::<Vec<_>>(),
        outcomes
    );
}

#[test]
fn a_model_without_a_price_has_its_tokens_and_no_cost() {
    let unknown = Attempt {
        model: "nobodys-model".to_owned(),
        ..attempt(Some(tokens(1, 2)), llm::COMPLETED)
    };
    let end = CallEnd {
        answer_bytes: None,
        most_cost: None,
    };
    let entries = metering().entries(&[unknown], Content::Prompt("Why?"), end);
    assert_eq!(
        (entries[0].tokens, entries[0].cost),
        (Some(tokens(1, 2)), None)
    );
    assert_eq!(entries[0].price_version, None);
}

#[test]
fn the_mock_costs_nothing() {
    let mock = Metering::new(PriceTable::bundled(), None, None);
    let end = CallEnd {
        answer_bytes: None,
        most_cost: Some(Picodollars(0)),
    };
    let answered = Attempt {
        upstream: "mock".to_owned(),
        model: "mock".to_owned(),
        ..attempt(Some(tokens(1, 2)), llm::COMPLETED)
    };
    let entries = mock.entries(&[answered], Content::Prompt("Why?"), end);
    assert_eq!(entries[0].cost, Some(Picodollars(0)));
    assert!(!entries[0].is_estimated);
}
