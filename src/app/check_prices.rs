//! What an operator should know of the prices: rows that are not used, and models that a budget
//! makes unusable because their calls have no price.

use std::collections::BTreeSet;

use crate::config::{ServedModels, UpstreamConfig};
use crate::llm::Route;
use crate::pricing::PriceTable;
use crate::services::metering::{Candidate, Metering};

/// How many names a sentence has before it counts the rest.
const NAMED: usize = 5;
/// The most characters of a name. Names of a file may be of any length.
const NAME_CHARS: usize = 80;

/// A sentence for each problem of the prices.
pub(super) fn notes(metering: &Metering, upstream: Option<&UpstreamConfig>) -> Vec<String> {
    let unused = unused_rows(metering.prices());
    let refused = upstream.and_then(|upstream| refused_models(metering, upstream));
    unused.into_iter().chain(refused).collect()
}

/// The rows of `PRICES_FILE` that are not used. Not refused: LiteLLM's own list has such rows.
pub(super) fn unused_rows(table: &PriceTable) -> Option<String> {
    let names: Vec<&str> = table.unpriced().collect();
    let rows = match names.len() {
        0 => return None,
        1 => "1 row has".to_owned(),
        number => format!("{number} rows have"),
    };
    Some(format!(
        "PRICES_FILE: {rows} no price of tokens of a model for text, and changes nothing: {}",
        a_few(&names)
    ))
}

/// The default model, and models that the configuration names, whose calls are refused because of
/// `BUDGET`: nobody knows what they can cost.
fn refused_models(metering: &Metering, upstream: &UpstreamConfig) -> Option<String> {
    metering.service_budget()?;
    let default_model = upstream.default_model.as_str();
    let route = |model| Route::find(upstream, model);
    let mut refused = Vec::new();
    if let Some(route) = route(default_model) {
        let mut candidates = metering.candidates(&route);
        let problem = candidates.find_map(|candidate| match &candidate.row {
            None => Some((candidate, "has no price")),
            Some(row) if metering.bounds_answers(row) => None,
            Some(_) => Some((
                candidate,
                "has a price without max_output_tokens, and OPENAI_MAX_TOKENS is not set",
            )),
        });
        refused.extend(problem.map(|(candidate, problem)| {
            let model = label(default_model, &candidate);
            format!("every POST /api/prompts, because the default model {model} {problem}")
        }));
    }
    let named: BTreeSet<&str> = upstream
        .endpoints
        .iter()
        .flat_map(|endpoint| named(&endpoint.models))
        .filter(|name| *name != default_model)
        .collect();
    let unpriced: Vec<String> = named
        .into_iter()
        .filter_map(|name| {
            let route = route(name)?;
            let candidate = metering
                .candidates(&route)
                .find(|each| each.row.is_none())?;
            Some(label(name, &candidate))
        })
        .collect();
    if !unpriced.is_empty() {
        refused.push(format!("calls of /v1 for {}", a_few(&unpriced)));
    }
    if refused.is_empty() {
        return None;
    }
    Some(format!(
        "BUDGET is set, so calls without a known price are refused with 404 model_price_unknown: {}. Set PRICES_FILE to a file that has the prices; 0 is a price too",
        refused.join("; ")
    ))
}

/// The names under which callers can ask for single models.
fn named(models: &ServedModels) -> Vec<&str> {
    match models {
        ServedModels::Always(_) => Vec::new(),
        ServedModels::Matching { patterns, aliases } => patterns
            .iter()
            .filter_map(|pattern| pattern.exact())
            .chain(aliases.keys().map(String::as_str))
            .collect(),
    }
}

/// A model that is asked for, and the upstream that may be asked: `fast (gpt-6-luna of openai at
/// primary)`. The provider is why rows of others do not count.
pub(super) fn label(asked: &str, candidate: &Candidate<'_, '_>) -> String {
    let Candidate {
        upstream,
        model,
        provider,
        ..
    } = candidate;
    let provider = provider.map_or_else(String::new, |provider| format!(" of {provider}"));
    if asked == *model {
        format!("{model}{provider} at {upstream}")
    } else {
        format!("{asked} ({model}{provider} at {upstream})")
    }
}

/// The first names, and how many there are more.
fn a_few(names: &[impl AsRef<str>]) -> String {
    let shown = names.iter().take(NAMED);
    let shown: Vec<String> = shown.map(|name| printable(name.as_ref())).collect();
    let shown = shown.join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// A name on one line, of a length that a line has room for.
fn printable(name: &str) -> String {
    let start: String = name.chars().take(NAME_CHARS).collect();
    start.escape_debug().to_string()
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::config::{BaseUrl, Endpoint, ModelPattern};

    const PRICES: &str = r#"{
        "priced": {"litellm_provider": "groq", "input_cost_per_token": 1e-6,
                   "output_cost_per_token": 2e-6, "max_output_tokens": 100},
        "free": {"input_cost_per_token": 0, "output_cost_per_token": 0}}"#;

    pub(in crate::app) fn upstream(
        default_model: &str,
        endpoints: Vec<Endpoint>,
    ) -> UpstreamConfig {
        let time = Duration::from_secs(1);
        UpstreamConfig {
            is_list: true,
            endpoints,
            default_model: default_model.to_owned(),
            system_prompt: None,
            max_tokens: None,
            temperature: None,
            top_p: None,
            connect_timeout: time,
            first_token_timeout: time,
            token_timeout: time,
            total_timeout: time,
            max_retries: 0,
            max_in_flight: 1,
            max_response_bytes: 1,
        }
    }

    pub(in crate::app) fn endpoint(
        name: &str,
        url: &str,
        models: &[&str],
        aliases: &[(&str, &str)],
    ) -> Endpoint {
        let patterns = models.iter().map(|model| ModelPattern::parse(model));
        let alias = |(name, model): &(&str, &str)| ((*name).to_owned(), (*model).to_owned());
        Endpoint {
            name: name.to_owned(),
            base_url: BaseUrl::parse(url).unwrap(),
            api_key: None,
            models: ServedModels::Matching {
                patterns: patterns.map(Option::unwrap).collect(),
                aliases: aliases.iter().map(alias).collect::<BTreeMap<_, _>>(),
            },
            fallback: Vec::new(),
        }
    }

    fn metering(upstream: &UpstreamConfig, budget: Option<&str>) -> Metering {
        let prices = PriceTable::bundled().overlaid(PRICES, "test").unwrap();
        let budget = budget.map(|text| text.parse().unwrap());
        Metering::new(prices, Some(upstream), budget)
    }

    fn refused(upstream: &UpstreamConfig) -> Option<String> {
        assert_eq!(refused_models(&metering(upstream, None), upstream), None);
        refused_models(&metering(upstream, Some("5.00/month")), upstream)
    }

    #[test]
    fn a_default_model_that_a_budget_makes_unusable_is_named_with_the_repair() {
        let primary = || endpoint("primary", "http://127.0.0.1:1/v1", &["*"], &[]);
        assert_eq!(refused(&upstream("priced", vec![primary()])), None);
        let text = refused(&upstream("nobodys", vec![primary()])).unwrap();
        let part = "every POST /api/prompts, because the default model nobodys at primary has no price. Set PRICES_FILE";
        assert!(text.contains(part), "{text}");
        let text = refused(&upstream("free", vec![primary()])).unwrap();
        assert!(text.contains("OPENAI_MAX_TOKENS is not set"), "{text}");
        let bounded = UpstreamConfig {
            max_tokens: Some(10),
            ..upstream("free", vec![primary()])
        };
        assert_eq!(refused(&bounded), None);
        // The price of one provider is none of another.
        let other = endpoint("x", "https://api.mistral.ai/v1", &["*"], &[]);
        let text = refused(&upstream("priced", vec![other])).unwrap();
        assert!(text.contains("model priced of mistral at x has"), "{text}");
    }

    #[test]
    fn names_and_aliases_without_a_price_are_a_few_and_a_number() {
        let local = endpoint(
            "local",
            "http://127.0.0.1:1/v1",
            &["priced", "free", "any-*", "m1", "m2", "m3", "m4", "m5"],
            &[("fast", "llama9"), ("good", "priced")],
        );
        let text = refused(&upstream("priced", vec![local])).unwrap();
        let part = ": calls of /v1 for fast (llama9 at local), m1 at local, m2 at local, m3 at local, m4 at local and 1 more. Set";
        assert!(text.contains(part), "{text}");
        assert!(!text.contains("/api/prompts"), "{text}");
    }

    #[test]
    fn a_fallback_without_a_price_counts() {
        let mut first = endpoint("first", "http://127.0.0.1:1/v1", &["*"], &[]);
        first.fallback = vec![1];
        let second = Endpoint {
            models: ServedModels::Always("llama9".to_owned()),
            ..endpoint("second", "http://127.0.0.1:2/v1", &[], &[])
        };
        let text = refused(&upstream("priced", vec![first, second])).unwrap();
        let part = "the default model priced (llama9 at second) has no price";
        assert!(text.contains(part), "{text}");
    }

    #[test]
    fn rows_of_a_file_that_are_not_used_are_counted_and_named_on_one_line() {
        assert_eq!(unused_rows(&PriceTable::bundled()), None);
        let rows = (0..7).map(|n| format!(r#""m\n{n}": {{"mode": "chat"}}"#));
        let text = format!("{{{}}}", rows.collect::<Vec<_>>().join(","));
        let table = PriceTable::bundled().overlaid(&text, "test").unwrap();
        let sentence = unused_rows(&table).unwrap();
        assert!(sentence.starts_with("PRICES_FILE: 7 rows have no price"));
        assert!(sentence.ends_with(r"m\n3, m\n4 and 2 more"), "{sentence}");
    }
}
