//! The operator's command that prints prices, and the table that a start loads.

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::check_prices;
use crate::cli::PricesArgs;
use crate::config::{Config, UpstreamConfig};
use crate::domain::TokenUsage;
use crate::llm::Route;
use crate::pricing::{Band, Found, PriceTable, ServiceTier};
use crate::services::metering::Metering;

const TIERS: [(ServiceTier, &str); 3] = [
    (ServiceTier::Standard, "standard"),
    (ServiceTier::Flex, "flex"),
    (ServiceTier::Priority, "priority"),
];

/// The bundled prices, with those of `PRICES_FILE` over them.
///
/// # Errors
/// One line that names the setting, the place and the repair.
pub fn load(file: Option<&Path>) -> anyhow::Result<PriceTable> {
    let bundled = PriceTable::bundled();
    let Some(path) = file else {
        return Ok(bundled);
    };
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("PRICES_FILE: {shown} cannot be read"))?;
    // The rows of usage name the prices by this: other prices have another name.
    let digest: String = Sha256::digest(&text)[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    bundled
        .overlaid(&text, &format!("PRICES_FILE {digest}"))
        .with_context(|| {
            format!("PRICES_FILE: {shown} is no list of prices in the form of LiteLLM's")
        })
}

/// Prints prices, or computes costs. Warnings about the table go to `notes`.
///
/// # Errors
/// One line, if the table cannot be read, a named model has no price, or a usage is malformed.
pub fn run(
    arguments: &PricesArgs,
    config: &Config,
    input: &mut impl BufRead,
    out: &mut impl Write,
    notes: &mut impl Write,
) -> anyhow::Result<()> {
    let table = load(config.prices_file.as_deref())?;
    if let Some(sentence) = check_prices::unused_rows(&table) {
        // If standard error is closed, the warning is lost, which is no reason to fail.
        let _ = writeln!(notes, "warning: {sentence}");
    }
    if arguments.compute {
        return compute(&table, input, out);
    }
    let upstream = config.upstream.as_ref();
    let metering = Metering::new(table, upstream, None);
    let mut unknown = Vec::new();
    let mut rows = Vec::new();
    for model in &arguments.models {
        for (name, row) in look_up(&metering, upstream, model) {
            match row {
                // Several upstreams may have the same price.
                Some(row) if rows.iter().any(|other| is_same(other, &row)) => {}
                Some(row) => rows.push(row),
                None => unknown.push(name),
            }
        }
    }
    if arguments.models.is_empty() {
        rows = metering.prices().rows();
    }
    if arguments.json {
        for row in &rows {
            writeln!(out, "{}", as_json(row))?;
        }
    } else {
        print(&rows, out)?;
    }
    out.flush()?;
    if unknown.is_empty() {
        return Ok(());
    }
    bail!(
        "no price for {}: set PRICES_FILE to a file that has it",
        unknown.join(", ")
    );
}

/// The price of a model at each upstream that the service may ask for it, which is what the service
/// charges, and a name for each. Where no upstream serves the model, the price at any provider.
fn look_up<'a>(
    metering: &'a Metering,
    upstream: Option<&UpstreamConfig>,
    model: &str,
) -> Vec<(String, Option<Found<'a>>)> {
    let Some(route) = upstream.and_then(|upstream| Route::find(upstream, model)) else {
        return vec![(model.to_owned(), metering.prices().find(None, model))];
    };
    metering
        .candidates(&route)
        .map(|candidate| (check_prices::label(model, &candidate), candidate.row))
        .collect()
}

fn is_same(one: &Found<'_>, other: &Found<'_>) -> bool {
    one.name == other.name && one.version == other.version
}

/// A table in dollars for a million tokens, as providers print their prices.
fn print(rows: &[Found<'_>], out: &mut impl Write) -> anyhow::Result<()> {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let width = width.clamp(5, 60);
    writeln!(
        out,
        "{:width$}  {:>9}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  from",
        "model", "input >", "input", "cache read", "cache wr.", "output", "reasoning", "shutdown"
    )?;
    for row in rows {
        for band in row.prices.bands(ServiceTier::Standard) {
            let rates = &band.rates;
            writeln!(
                out,
                "{:width$}  {:>9}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {}",
                row.name,
                band.above,
                for_a_million(rates.input),
                for_a_million(rates.cache_read),
                for_a_million(rates.cache_write),
                for_a_million(rates.output),
                for_a_million(rates.reasoning),
                row.prices.shutdown_date.as_deref().unwrap_or("-"),
                row.version,
            )?;
        }
    }
    writeln!(out, "US dollars for a million tokens")?;
    Ok(())
}

/// A price of a token in femtodollars, as dollars for a million tokens, exactly.
fn for_a_million(femto: u64) -> String {
    const FEMTO_IN_DOLLAR_A_MILLION: u64 = 1_000_000_000;
    let (whole, rest) = (
        femto / FEMTO_IN_DOLLAR_A_MILLION,
        femto % FEMTO_IN_DOLLAR_A_MILLION,
    );
    let decimals = format!("{rest:09}");
    let (cents, finer) = decimals.split_at(2);
    format!("{whole}.{cents}{}", finer.trim_end_matches('0'))
}

fn as_json(row: &Found<'_>) -> Value {
    let band = |band: &Band| {
        json!({
            "above": band.above,
            "input": band.rates.input,
            "cache_read": band.rates.cache_read,
            "cache_write": band.rates.cache_write,
            "output": band.rates.output,
            "reasoning": band.rates.reasoning,
        })
    };
    let prices = row.prices;
    let mut object = json!({
        "model": row.name,
        "provider": prices.provider,
        "max_input_tokens": prices.max_input_tokens,
        "max_output_tokens": prices.max_output_tokens,
        "shutdown_date": prices.shutdown_date,
        "version": &**row.version,
    });
    for (tier, name) in TIERS {
        if tier == ServiceTier::Standard
            || prices.bands(tier) != prices.bands(ServiceTier::Standard)
        {
            object[name] = prices.bands(tier).iter().map(band).collect();
        }
    }
    object
}

/// A usage whose cost is asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Usage {
    model: String,
    provider: Option<String>,
    service_tier: Option<String>,
    #[serde(default)]
    input: u64,
    #[serde(default)]
    cache_read: u64,
    #[serde(default)]
    cache_write: u64,
    #[serde(default)]
    output: u64,
    #[serde(default)]
    reasoning: u64,
}

/// Prints a line for each line of `input`: the row that has the price, and the cost.
fn compute(
    table: &PriceTable,
    input: &mut impl BufRead,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for (number, line) in (1_u64..).zip(input.lines()) {
        let line = line.context("standard input")?;
        let usage: Usage = serde_json::from_str(&line)
            .with_context(|| format!("standard input, line {number}: no usage"))?;
        let found = table.find(usage.provider.as_deref(), &usage.model);
        let tokens = TokenUsage {
            input: usage.input,
            cache_read: usage.cache_read,
            cache_write: usage.cache_write,
            output: usage.output,
            reasoning: usage.reasoning,
        };
        let tier = ServiceTier::of(usage.service_tier.as_deref());
        let answer = json!({
            "model": found.map(|row| row.name),
            "cost": found.map(|row| row.prices.cost(&tokens, tier).0),
            "version": found.map(|row| &**row.version),
        });
        writeln!(out, "{answer}")?;
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::check_prices::tests::{endpoint, upstream};

    #[test]
    fn prices_are_shown_exactly() {
        assert_eq!(for_a_million(2_500_000_000), "2.50");
        assert_eq!(for_a_million(141_953_125), "0.141953125");
        assert_eq!(for_a_million(0), "0.00");
    }

    #[test]
    fn a_file_of_prices_is_laid_over_the_bundled_ones_and_named_by_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prices.json");
        let version = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let table = load(Some(&path)).unwrap();
            table.versions().next().unwrap().to_owned()
        };
        let row = r#"{"own": {"input_cost_per_token": 0, "output_cost_per_token": 0}}"#;
        let first = version(row);
        assert!(first.starts_with("PRICES_FILE "));
        assert_eq!(version(row), first);
        assert_ne!(version("{}"), first);
    }

    #[test]
    fn a_model_is_looked_up_at_the_upstreams_that_serve_it() {
        let groq = endpoint(
            "groq",
            "https://api.groq.com/openai/v1",
            &["gpt-6-luna", "nobodys"],
            &[("fast", "openai/gpt-oss-20b")],
        );
        let mut openai = endpoint("openai", "https://api.openai.com/v1", &["gpt-*"], &[]);
        openai.fallback = vec![0];
        let upstream = upstream("gpt-6-luna", vec![groq, openai]);
        let metering = Metering::new(PriceTable::bundled(), Some(&upstream), None);
        let found = |upstream, model| -> Vec<(String, Option<String>)> {
            look_up(&metering, upstream, model)
                .into_iter()
                .map(|(name, row)| (name, row.map(|row| row.name.to_owned())))
                .collect()
        };
        let row = |name: &str, row: Option<&str>| (name.to_owned(), row.map(str::to_owned));
        // OpenAI's price is none of Groq's.
        let luna = found(Some(&upstream), "gpt-6-luna");
        assert_eq!(luna, [row("gpt-6-luna of groq at groq", None)]);
        let fast = found(Some(&upstream), "fast");
        let name = "fast (openai/gpt-oss-20b of groq at groq)";
        assert_eq!(fast, [row(name, Some("groq/openai/gpt-oss-20b"))]);
        let with_fallback = found(Some(&upstream), "gpt-4o");
        let at_openai = row("gpt-4o of openai at openai", Some("gpt-4o"));
        assert_eq!(
            with_fallback,
            [at_openai, row("gpt-4o of groq at groq", None)]
        );
        // No upstream serves it, or none is configured: any provider.
        let anywhere = [row(
            "groq/openai/gpt-oss-20b",
            Some("groq/openai/gpt-oss-20b"),
        )];
        assert_eq!(found(Some(&upstream), "groq/openai/gpt-oss-20b"), anywhere);
        assert_eq!(found(None, "groq/openai/gpt-oss-20b"), anywhere);
    }

    #[test]
    fn a_file_that_cannot_be_used_is_one_line_that_names_the_setting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prices.json");
        let problem = || format!("{:#}", load(Some(&path)).unwrap_err());
        assert!(problem().contains("PRICES_FILE") && problem().contains("cannot be read"));
        std::fs::write(&path, r#"{"own": {"input_cost_per_token": 1}}"#).unwrap();
        let text = problem();
        assert!(
            text.starts_with("PRICES_FILE: ") && text.contains("line 1"),
            "{text}"
        );
        assert!(!text.contains('\n'));
    }
}
