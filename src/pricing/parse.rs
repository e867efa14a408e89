//! Reads a table in LiteLLM's form: an object of models, each an object whose members are prices in
//! dollars a token.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{Band, Error, ModelPrices, Rates, ServiceTier};

const FEMTO_IN_DOLLAR: f64 = 1e15;
/// A dollar a token: no model is a thousandth as dear, and above it a number is a mistake of unit,
/// such as a price for a million tokens.
const DEAREST: f64 = 1.0;
/// LiteLLM's list begins with a description of itself under this name.
const DESCRIPTION: &str = "sample_spec";

/// What a price is for. The order is that of [`Rates`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Input,
    CacheRead,
    CacheWrite,
    Output,
    Reasoning,
}

/// One price of a row: for inputs of more than `above` tokens, at a service tier.
struct Price {
    kind: Kind,
    above: u64,
    tier: ServiceTier,
    femto: u64,
}

/// The rows of a text.
pub(super) fn rows(text: &str) -> Result<Rows, Error> {
    serde_json::from_str(text).map_err(|error| Error(error.to_string()))
}

/// The rows of a table.
#[derive(Default)]
pub(super) struct Rows {
    /// Those with prices of tokens.
    pub priced: HashMap<Box<str>, ModelPrices>,
    /// The names of the others, in the order of the text.
    pub unpriced: Vec<Box<str>>,
}

impl<'de> Deserialize<'de> for Rows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RowsVisitor)
    }
}

struct RowsVisitor;

impl<'de> Visitor<'de> for RowsVisitor {
    type Value = Rows;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of models, as in LiteLLM's list")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Rows, A::Error> {
        let mut rows = Rows::default();
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            if name == DESCRIPTION {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let row: Row = map.next_value()?;
            let prices = row.prices().map_err(|problem| {
                de::Error::custom(format!("the model {} {problem}", quoted(&name)))
            })?;
            match prices {
                Some(prices) => _ = rows.priced.insert(name.into(), prices),
                None => rows.unpriced.push(name.into()),
            }
        }
        Ok(rows)
    }
}

/// A name for a message: no longer than a line has room for.
fn quoted(name: &str) -> String {
    let short: String = name.chars().take(100).collect();
    format!("{short:?}")
}

#[derive(Default)]
struct Row {
    /// Whether a member belongs to LiteLLM's form for certain.
    is_of_form: bool,
    provider: Option<Box<str>>,
    mode: Option<Box<str>>,
    prices: Vec<Price>,
    max_input_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    max_tokens: Option<u64>,
    shutdown_date: Option<Box<str>>,
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RowVisitor)
    }
}

struct RowVisitor;

impl<'de> Visitor<'de> for RowVisitor {
    type Value = Row;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of a model's prices")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
        let mut row = Row::default();
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            row.is_of_form |= matches!(&*name, "litellm_provider" | "mode")
                || name.contains("cost")
                || name.contains("pricing");
            match &*name {
                "litellm_provider" => row.provider = map.next_value()?,
                "mode" => row.mode = map.next_value()?,
                "deprecation_date" => row.shutdown_date = map.next_value()?,
                // Some lists have these numbers as text or as a fraction; a limit that is no whole
                // number is none.
                "max_input_tokens" => row.max_input_tokens = map.next_value::<Limit>()?.0,
                "max_output_tokens" => row.max_output_tokens = map.next_value::<Limit>()?.0,
                "max_tokens" => row.max_tokens = map.next_value::<Limit>()?.0,
                "tiered_pricing" => {
                    for Tier(prices) in map.next_value::<Option<Vec<Tier>>>()?.unwrap_or_default() {
                        row.prices.extend(prices);
                    }
                }
                name => match price_name(name) {
                    None => _ = map.next_value::<IgnoredAny>()?,
                    Some((kind, above, tier)) => {
                        let dollars: Option<f64> = map.next_value()?;
                        let femto = dollars.map(femto).transpose().map_err(de::Error::custom)?;
                        row.prices.extend(femto.map(|femto| Price {
                            kind,
                            above,
                            tier,
                            femto,
                        }));
                    }
                },
            }
        }
        Ok(row)
    }
}

/// A number of tokens, if it is one.
struct Limit(Option<u64>);

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        Ok(Self(value.as_u64().filter(|limit| *limit > 0)))
    }
}

/// One element of `tiered_pricing`: prices, and the lengths of input for which they hold.
struct Tier(Vec<Price>);

impl<'de> Deserialize<'de> for Tier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TierVisitor)
    }
}

struct TierVisitor;

impl<'de> Visitor<'de> for TierVisitor {
    type Value = Tier;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a range and prices")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tier, A::Error> {
        let (mut start, mut prices) = (None, Vec::new());
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            match (&*name, price_name(&name)) {
                ("range", _) => start = map.next_value::<Vec<f64>>()?.first().copied(),
                (_, Some((kind, 0, tier))) => {
                    if let Some(dollars) = map.next_value()? {
                        prices.push((kind, tier, femto(dollars).map_err(de::Error::custom)?));
                    }
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        let Some(start) = start.filter(|start| *start >= 0.0 && start.fract() == 0.0) else {
            // Tiers of searches and pages have other ranges.
            return Ok(Tier(Vec::new()));
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a whole number that is not negative; one that is too large saturates"
        )]
        let above = start as u64;
        let priced = prices.into_iter().map(|(kind, tier, femto)| Price {
            kind,
            above,
            tier,
            femto,
        });
        Ok(Tier(priced.collect()))
    }
}

/// A price in dollars as femtodollars. Exact for every decimal with up to 15 places: a binary
/// fraction differs from it by less than half a femtodollar.
fn femto(dollars: f64) -> Result<u64, &'static str> {
    if !(0.0..=DEAREST).contains(&dollars) {
        return Err("a price is in dollars for one token, such as 2.5e-6, and not negative");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 1e15"
    )]
    Ok((dollars * FEMTO_IN_DOLLAR).round() as u64)
}

/// What the member of that name is the price of; `None` if it is no price of tokens that this
/// program counts.
fn price_name(name: &str) -> Option<(Kind, u64, ServiceTier)> {
    let kinds = [
        ("input_cost_per_token", Kind::Input),
        ("cache_read_input_token_cost", Kind::CacheRead),
        ("cache_creation_input_token_cost", Kind::CacheWrite),
        ("output_cost_per_token", Kind::Output),
        ("output_cost_per_reasoning_token", Kind::Reasoning),
    ];
    let (rest, kind) = kinds
        .into_iter()
        .find_map(|(word, kind)| Some((name.strip_prefix(word)?, kind)))?;
    let tiers = [
        ("_flex", ServiceTier::Flex),
        ("_priority", ServiceTier::Priority),
    ];
    let (rest, tier) = tiers
        .into_iter()
        .find_map(|(word, tier)| Some((rest.strip_suffix(word)?, tier)))
        .unwrap_or((rest, ServiceTier::Standard));
    if rest.is_empty() {
        return Some((kind, 0, tier));
    }
    let thousands = rest.strip_prefix("_above_")?.strip_suffix("k_tokens")?;
    let thousands: u64 = thousands.parse().ok()?;
    Some((kind, thousands.checked_mul(1_000)?, tier))
}

impl Row {
    /// The prices in full; `None` for a row that has none, or is of a model that does not respond
    /// to text by text or by vectors. LiteLLM's list has both, and each of its rows says what it
    /// is: a row of other members only is a mistake, which would leave the bundled price in force.
    fn prices(self) -> Result<Option<ModelPrices>, &'static str> {
        if !self.is_of_form {
            return Err(
                "has no member of LiteLLM's form: write input_cost_per_token and output_cost_per_token",
            );
        }
        let is_for_text = matches!(
            self.mode.as_deref(),
            None | Some("chat" | "completion" | "embedding" | "responses")
        );
        let has = |kind| self.prices.iter().any(|price| price.kind == kind);
        if !is_for_text || self.prices.is_empty() {
            return Ok(None);
        }
        if !has(Kind::Input) {
            return Err("has no price of input tokens (input_cost_per_token)");
        }
        if !has(Kind::Output) && self.mode.as_deref() != Some("embedding") {
            return Err("has no price of output tokens (output_cost_per_token)");
        }
        Ok(Some(ModelPrices {
            standard: self.bands(ServiceTier::Standard),
            flex: self.bands(ServiceTier::Flex),
            priority: self.bands(ServiceTier::Priority),
            provider: self.provider,
            max_input_tokens: self.max_input_tokens,
            max_output_tokens: self.max_output_tokens.or(self.max_tokens),
            shutdown_date: self.shutdown_date,
        }))
    }

    fn bands(&self, tier: ServiceTier) -> Box<[Band]> {
        if !self.prices.iter().any(|price| price.tier == tier) {
            return Box::default();
        }
        let lengths: BTreeSet<u64> = self
            .prices
            .iter()
            .map(|price| price.above)
            .chain([0])
            .collect();
        let bands = lengths.into_iter().map(|above| Band {
            above,
            rates: self.rates(above, tier),
        });
        bands.collect()
    }

    /// A kind that has no price for such an input at this tier has its price at the standard tier,
    /// else that of shorter inputs. If the row has no price of the kind at all, cached input is
    /// input, and reasoning is output.
    fn rates(&self, above: u64, tier: ServiceTier) -> Rates {
        let price = |kind| {
            let own = |tier| {
                let prices = self.prices.iter();
                prices.filter(move |price| {
                    price.kind == kind && price.tier == tier && price.above <= above
                })
            };
            let exactly = |tier| own(tier).find(|price| price.above == above);
            let shorter = |tier| own(tier).max_by_key(|price| price.above);
            exactly(tier)
                .or_else(|| exactly(ServiceTier::Standard))
                .or_else(|| shorter(tier))
                .or_else(|| shorter(ServiceTier::Standard))
                .map(|price| price.femto)
        };
        let input = price(Kind::Input).unwrap_or(0);
        let output = price(Kind::Output).unwrap_or(0);
        Rates {
            input,
            cache_read: price(Kind::CacheRead).unwrap_or(input),
            cache_write: price(Kind::CacheWrite).unwrap_or(input),
            output,
            reasoning: price(Kind::Reasoning).unwrap_or(output),
        }
    }
}
