use proptest::prelude::*;

use super::*;

fn table(text: &str) -> PriceTable {
    PriceTable {
        layers: vec![Layer::read(text, "test").unwrap()],
    }
}

fn only(text: &str) -> ModelPrices {
    let table = table(&format!("{{\"m\": {text}}}"));
    table.find(None, "m").unwrap().prices.clone()
}

fn usage(input: u64, cache_read: u64, cache_write: u64, output: u64, reasoning: u64) -> TokenUsage {
    TokenUsage {
        input,
        cache_read,
        cache_write,
        output,
        reasoning,
    }
}

#[test]
fn the_bundled_table_is_read_and_has_a_version() {
    let table = PriceTable::bundled();
    assert!(table.rows().len() > 3_000);
    assert_eq!(table.unpriced().count(), 0);
    let [version] = table.versions().collect::<Vec<_>>()[..] else {
        panic!("one table");
    };
    assert!(version.starts_with("litellm-"), "{version}");
    let row = table.find(Some("openai"), "gpt-6-luna").unwrap();
    let cost = row
        .prices
        .cost(&usage(1_000_000, 0, 0, 0, 0), ServiceTier::Standard);
    // Above 272,000 tokens of input, twice 0.10 dollars a million.
    assert_eq!(cost.to_string(), "0.20");
}

#[test]
fn each_kind_has_its_price_and_falls_back_on_its_side() {
    let full = only(
        r#"{"input_cost_per_token": 1e-6, "cache_read_input_token_cost": 1e-7,
            "cache_creation_input_token_cost": 1.25e-6, "output_cost_per_token": 4e-6,
            "output_cost_per_reasoning_token": 5e-6}"#,
    );
    let standard = ServiceTier::Standard;
    let each = usage(1, 10, 100, 1_000, 10_000);
    assert_eq!(full.cost(&each, standard), Picodollars(54_127_000_000));
    let plain = only(r#"{"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6}"#);
    assert_eq!(plain.cost(&each, standard), Picodollars(44_111_000_000));
}

#[test]
fn a_cost_is_rounded_once_half_up() {
    // Half a picodollar a token.
    let half = only(r#"{"input_cost_per_token": 5e-13, "output_cost_per_token": 4.99e-13}"#);
    let cost = |usage| half.cost(&usage, ServiceTier::Standard).0;
    assert_eq!(cost(usage(1, 0, 0, 0, 0)), 1);
    assert_eq!(cost(usage(3, 0, 0, 0, 0)), 2);
    assert_eq!(cost(usage(0, 0, 0, 1, 0)), 0);
    assert_eq!(cost(usage(1, 0, 0, 1, 0)), 1);
}

#[test]
fn the_length_of_the_whole_input_decides_about_every_token() {
    let tiered = only(
        r#"{"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
            "cache_read_input_token_cost": 1e-7,
            "input_cost_per_token_above_200k_tokens": 3e-6,
            "output_cost_per_token_above_200k_tokens": 4e-6}"#,
    );
    let cost = |usage| tiered.cost(&usage, ServiceTier::Standard).0;
    assert_eq!(cost(usage(200_000, 0, 0, 1, 0)), 200_002_000_000);
    assert_eq!(cost(usage(200_001, 0, 0, 1, 0)), 600_007_000_000);
    // The cache has one price for all lengths, and its tokens count for the length.
    assert_eq!(cost(usage(1, 200_000, 0, 0, 0)), 20_003_000_000);
}

#[test]
fn ranges_of_tiers_are_the_same_as_prices_above_a_length() {
    let ranges = only(
        r#"{"tiered_pricing": [
            {"range": [0, 32000.0], "input_cost_per_token": 1e-6, "output_cost_per_token": 5e-6},
            {"range": [32000.0, 128000.0], "input_cost_per_token": 2e-6, "output_cost_per_token": 6e-6}]}"#,
    );
    let above = only(
        r#"{"input_cost_per_token": 1e-6, "output_cost_per_token": 5e-6,
            "input_cost_per_token_above_32k_tokens": 2e-6,
            "output_cost_per_token_above_32k_tokens": 6e-6}"#,
    );
    assert_eq!(ranges, above);
}

#[test]
fn a_service_tier_has_its_own_prices_or_the_standard_ones() {
    let model = only(
        r#"{"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
            "cache_read_input_token_cost": 1e-7,
            "input_cost_per_token_priority": 2e-6, "output_cost_per_token_priority": 4e-6}"#,
    );
    let each = usage(1, 1, 0, 1, 0);
    let cost = |word| model.cost(&each, ServiceTier::of(word)).0;
    assert_eq!(cost(Some("priority")), 6_100_000);
    for standard in [None, Some("auto"), Some("default"), Some("flex")] {
        assert_eq!(cost(standard), 3_100_000, "{standard:?}");
    }
}

#[test]
fn a_model_is_found_by_its_name_and_by_certain_other_forms_of_it() {
    let table = table(
        r#"{"gpt-x": {"litellm_provider": "openai", "input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6},
            "groq/gpt-x": {"litellm_provider": "groq", "input_cost_per_token": 2e-6, "output_cost_per_token": 1e-6},
            "gpt-x-2026-01-31": {"litellm_provider": "openai", "input_cost_per_token": 3e-6, "output_cost_per_token": 1e-6},
            "mine": {"input_cost_per_token": 4e-6, "output_cost_per_token": 1e-6}}"#,
    );
    let name = |provider, model| table.find(provider, model).map(|row| row.name);
    assert_eq!(name(None, "gpt-x"), Some("gpt-x"));
    assert_eq!(name(Some("openai"), "gpt-x"), Some("gpt-x"));
    assert_eq!(name(Some("groq"), "gpt-x"), Some("groq/gpt-x"));
    assert_eq!(
        name(Some("mistral"), "gpt-x"),
        None,
        "another provider's row"
    );
    assert_eq!(name(None, "openai/gpt-x"), Some("gpt-x"));
    assert_eq!(name(None, "groq/gpt-x"), Some("groq/gpt-x"));
    assert_eq!(name(None, "mistral/gpt-x"), None);
    assert_eq!(name(None, "gpt-x-2026-01-31"), Some("gpt-x-2026-01-31"));
    assert_eq!(name(None, "gpt-x-2026-02-28"), Some("gpt-x"));
    assert_eq!(name(Some("groq"), "gpt-x-20260228"), Some("groq/gpt-x"));
    for other in [
        "gpt-x-2026-13-01",
        "gpt-x-20260001",
        "gpt-x-mini",
        "GPT-X",
        "-2026-01-31",
        "",
    ] {
        assert_eq!(name(None, other), None, "{other}");
    }
    assert_eq!(
        name(Some("groq"), "mine"),
        Some("mine"),
        "a row of no provider"
    );
}

#[test]
fn the_operators_prices_go_before_the_bundled_ones() {
    let bundled = PriceTable::bundled();
    let before = bundled.rows().len();
    let table = bundled
        .overlaid(
            r#"{"gpt-6-luna": {"input_cost_per_token": 7e-6, "output_cost_per_token": 8e-6},
                "own-model": {"input_cost_per_token": 0, "output_cost_per_token": 0},
                "sample_spec": {"input_cost_per_token": "a text"},
                "painter": {"mode": "image_generation", "input_cost_per_token": 1e-6}}"#,
            "PRICES_FILE",
        )
        .unwrap();
    let row = table.find(Some("openai"), "gpt-6-luna").unwrap();
    assert_eq!(
        (
            &**row.version,
            row.prices.bands(ServiceTier::Standard).len()
        ),
        ("PRICES_FILE", 1)
    );
    assert!(table.find(None, "own-model").is_some());
    assert!(table.find(None, "painter").is_none());
    assert!(table.find(None, "gpt-4o").is_some());
    assert_eq!(table.rows().len(), before + 1);
}

#[test]
fn rows_without_a_price_of_tokens_are_named_and_not_used() {
    // As LiteLLM's list has them.
    let table = table(
        r#"{"z-chat": {"litellm_provider": "nobody", "max_tokens": 1},
            "priced": {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6},
            "speaker": {"input_cost_per_character": 1e-6},
            "painter": {"mode": "image_generation", "input_cost_per_token": 1e-6},
            "null": {"input_cost_per_token": null},
            "paged": {"tiered_pricing": []},
            "sample_spec": {"is": "a description"}}"#,
    );
    let unpriced: Vec<&str> = table.unpriced().collect();
    assert_eq!(unpriced, ["z-chat", "speaker", "painter", "null", "paged"]);
    let used: Vec<&str> = table.rows().iter().map(|row| row.name).collect();
    assert_eq!(used, ["priced"]);
}

#[test]
fn a_wrong_table_is_refused_with_the_place_and_the_problem() {
    for (text, problem) in [
        ("", "EOF"),
        ("[]", "an object of models"),
        (r#"{"m": 3}"#, "an object of a model's prices"),
        (r#"{"m": {"input_cost_per_token": "1e-6"}}"#, "string"),
        (r#"{"m": {"input_cost_per_token": -1e-6}}"#, "not negative"),
        (r#"{"m": {"input_cost_per_token": 2.5}}"#, "for one token"),
        (
            r#"{"m": {"input": 1e-6, "output": 1e-5}}"#,
            "\"m\" has no member of LiteLLM's form",
        ),
        (r#"{"m": {}}"#, "\"m\" has no member of LiteLLM's form"),
        (
            r#"{"m": {"input_cost_per_token": 1e-6}}"#,
            "\"m\" has no price of output tokens",
        ),
        (
            r#"{"m": {"output_cost_per_token": 1e-6}}"#,
            "\"m\" has no price of input tokens",
        ),
    ] {
        let error = PriceTable::bundled()
            .overlaid(text, "PRICES_FILE")
            .unwrap_err();
        assert!(error.to_string().contains(problem), "{text}: {error}");
        assert!(error.to_string().contains("line 1"), "{text}: {error}");
    }
}

fn any_usage() -> impl Strategy<Value = TokenUsage> {
    let tokens = || prop_oneof![Just(0), 0..1_000_u64, 0..400_000_u64, 0..5_000_000_u64];
    (tokens(), tokens(), tokens(), tokens(), tokens())
        .prop_map(|(a, b, c, d, e)| usage(a, b, c, d, e))
}

proptest! {
    #[test]
    fn no_usage_costs_more_than_the_most_it_can_cost(
        uses in proptest::collection::vec((any_usage(), 0..10_000_usize, 0..1_000_u64, 0..1_000_u64), 50),
    ) {
        static TABLE: std::sync::LazyLock<PriceTable> = std::sync::LazyLock::new(PriceTable::bundled);
        let rows = TABLE.rows();
        for (usage, index, more_input, more_output) in uses {
            let prices = rows[index % rows.len()].prices;
            for tier in [ServiceTier::Standard, ServiceTier::Flex, ServiceTier::Priority] {
                let most = prices.most_cost(
                    usage.total_input() + more_input,
                    usage.total_output() + more_output,
                    tier,
                );
                prop_assert!(prices.cost(&usage, tier) <= most);
            }
        }
    }
}
