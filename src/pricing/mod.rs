//! What tokens cost: the bundled table of prices, the operator's own over it, and the arithmetic.
//!
//! A price is an exact number of femtodollars a token (1e-15 USD); the table has no finer one. A
//! cost is the sum over the kinds of tokens, rounded once, half up, to whole picodollars (1e-12
//! USD).

mod parse;
mod provider;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

pub use self::provider::provider_of_host;
use crate::domain::{Picodollars, TokenUsage};

/// The reduced form of LiteLLM's list; `assets/prices/README.md` describes it.
const BUNDLED: &str = include_str!("../../assets/prices/prices.json");
/// The list's version and the day on which it was fetched.
const BUNDLED_VERSION: &str = include_str!("../../assets/prices/version");

const FEMTO_IN_PICO: i128 = 1_000;

/// A table that cannot be read. The text has the position and what is wrong there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// How soon an upstream responds, which it may sell at prices of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceTier {
    /// The usual one.
    Standard,
    /// Slower and cheaper.
    Flex,
    /// Faster and dearer.
    Priority,
}

impl ServiceTier {
    /// The tier behind the word of a request or of an answer. Words that name no tier with a price
    /// of its own, such as `auto` and `default`, are the standard one.
    pub fn of(word: Option<&str>) -> Self {
        match word {
            Some("flex") => Self::Flex,
            Some("priority") => Self::Priority,
            Some(_) | None => Self::Standard,
        }
    }
}

/// The prices of each kind of tokens, in femtodollars a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Of input tokens outside the cache.
    pub input: u64,
    /// Of input tokens read from the cache.
    pub cache_read: u64,
    /// Of input tokens written to the cache.
    pub cache_write: u64,
    /// Of output tokens that the answer shows.
    pub output: u64,
    /// Of output tokens of the reasoning.
    pub reasoning: u64,
}

impl Rates {
    fn cost(&self, usage: &TokenUsage) -> i128 {
        let kinds = [
            (usage.input, self.input),
            (usage.cache_read, self.cache_read),
            (usage.cache_write, self.cache_write),
            (usage.output, self.output),
            (usage.reasoning, self.reasoning),
        ];
        kinds
            .iter()
            .map(|(tokens, price)| i128::from(*tokens).saturating_mul(i128::from(*price)))
            .fold(0, i128::saturating_add)
    }

    /// The cost of tokens that are each of the dearest kind.
    fn most_cost(&self, input: u64, output: u64) -> i128 {
        let dearest = Self {
            input: self.input.max(self.cache_read).max(self.cache_write),
            output: self.output.max(self.reasoning),
            ..*self
        };
        dearest.cost(&TokenUsage {
            input,
            output,
            ..TokenUsage::default()
        })
    }
}

/// The prices from a length of the input on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// They hold for all tokens of a call whose input has more tokens than this.
    pub above: u64,
    /// Themselves.
    pub rates: Rates,
}

/// What the tokens of one model cost, and how many it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPrices {
    /// Who sells the model, in LiteLLM's word; `None` if the row does not say.
    pub provider: Option<Box<str>>,
    /// By length of the input, rising; the first is for all lengths.
    standard: Box<[Band]>,
    /// Empty if the model has no such prices.
    flex: Box<[Band]>,
    /// Empty if the model has no such prices.
    priority: Box<[Band]>,
    /// The longest input, in tokens.
    pub max_input_tokens: Option<u64>,
    /// The longest output, in tokens, reasoning included.
    pub max_output_tokens: Option<u64>,
    /// The day on which the model is shut down, `YYYY-MM-DD`.
    pub shutdown_date: Option<Box<str>>,
}

impl ModelPrices {
    /// The prices at a service tier by length of the input, rising; the first is for all lengths.
    pub fn bands(&self, tier: ServiceTier) -> &[Band] {
        let own = match tier {
            ServiceTier::Standard => &self.standard,
            ServiceTier::Flex => &self.flex,
            ServiceTier::Priority => &self.priority,
        };
        if own.is_empty() { &self.standard } else { own }
    }

    /// What these tokens cost. As at the providers, the length of the whole input decides about the
    /// price of every token of the call.
    pub fn cost(&self, usage: &TokenUsage, tier: ServiceTier) -> Picodollars {
        let bands = self.reached(usage.total_input(), tier);
        let femto = bands.last().map_or(0, |band| band.rates.cost(usage));
        picodollars(femto)
    }

    /// The most that a call can cost whose input and output have at most so many tokens, of
    /// whatever kinds.
    pub fn most_cost(&self, input: u64, output: u64, tier: ServiceTier) -> Picodollars {
        let bands = self.reached(input, tier).iter();
        let femto = bands.map(|band| band.rates.most_cost(input, output)).max();
        picodollars(femto.unwrap_or(0))
    }

    /// The bands of inputs up to this length.
    fn reached(&self, total_input: u64, tier: ServiceTier) -> &[Band] {
        let bands = self.bands(tier);
        let later = bands.iter().skip(1);
        let reached = later.take_while(|band| total_input > band.above).count();
        &bands[..bands.len().min(1 + reached)]
    }
}

fn picodollars(femto: i128) -> Picodollars {
    let rounded = femto.saturating_add(FEMTO_IN_PICO / 2) / FEMTO_IN_PICO;
    Picodollars(i64::try_from(rounded).unwrap_or(i64::MAX))
}

/// A model's row in a table.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The row's name.
    pub name: &'a str,
    /// The version of the table that has it.
    pub version: &'a Arc<str>,
    /// The row.
    pub prices: &'a ModelPrices,
}

struct Layer {
    version: Arc<str>,
    rows: HashMap<Box<str>, ModelPrices>,
    /// The names of rows that are not used.
    unpriced: Vec<Box<str>>,
}

impl Layer {
    fn read(text: &str, version: &str) -> Result<Self, Error> {
        let parse::Rows { priced, unpriced } = parse::rows(text)?;
        Ok(Self {
            version: version.into(),
            rows: priced,
            unpriced,
        })
    }
}

/// The prices that are in force.
pub struct PriceTable {
    /// The first that knows a model decides.
    layers: Vec<Layer>,
}

impl fmt::Debug for PriceTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.layers.iter().map(|layer| &layer.version))
            .finish()
    }
}

impl Default for PriceTable {
    fn default() -> Self {
        Self::bundled()
    }
}

impl PriceTable {
    /// The table of this program.
    ///
    /// # Panics
    /// Never: a test reads the same text.
    pub fn bundled() -> Self {
        let layer = Layer::read(BUNDLED, BUNDLED_VERSION.trim_end());
        Self {
            layers: vec![layer.expect("a test reads the bundled table")],
        }
    }

    /// Lays the operator's prices over this table: LiteLLM's form, as JSON. A model with a row in
    /// both has all of its prices from there. `version` names the operator's table in the rows of
    /// usage.
    ///
    /// # Errors
    /// The position in the text, and what is wrong there.
    pub fn overlaid(mut self, text: &str, version: &str) -> Result<Self, Error> {
        self.layers.insert(0, Layer::read(text, version)?);
        Ok(self)
    }

    /// The row of a model. `provider`: who sells it, where the upstream's address says that (see
    /// [`provider_of_host`]). These names are tried, in each table:
    ///
    /// 1. `provider/model`,
    /// 2. `model`,
    /// 3. `model` without `provider/` at its beginning, if that row is of this provider,
    /// 4. the same three without the date at the end of the model's name, such as `-2026-01-31` or
    ///    `-20260131`: the price of a snapshot without a row is that of its model.
    ///
    /// If the provider is known, a row of another provider does not count: the same model has
    /// different prices in different places.
    pub fn find(&self, provider: Option<&str>, model: &str) -> Option<Found<'_>> {
        self.layers.iter().find_map(|layer| {
            let dateless = without_date(model);
            layer
                .find(provider, model)
                .or_else(|| layer.find(provider, dateless?))
        })
    }

    /// All rows, by name; of models with a row in several tables the one that decides.
    pub fn rows(&self) -> Vec<Found<'_>> {
        let mut rows: Vec<Found<'_>> = Vec::new();
        for (depth, layer) in self.layers.iter().enumerate() {
            let is_covered = |name: &str| {
                let above = &self.layers[..depth];
                above.iter().any(|layer| layer.rows.contains_key(name))
            };
            let own = layer.rows.iter().filter(|(name, _)| !is_covered(name));
            rows.extend(own.map(|(name, prices)| layer.found(name, prices)));
        }
        rows.sort_unstable_by_key(|row| row.name);
        rows
    }

    /// The names of rows that are not used, because they have no price of tokens or are of a model
    /// that does not respond to text: the operator's first, in the order of their file.
    pub fn unpriced(&self) -> impl Iterator<Item = &str> {
        let layers = self.layers.iter();
        layers.flat_map(|layer| layer.unpriced.iter().map(|name| &**name))
    }

    /// The versions of the tables, the operator's first.
    pub fn versions(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().map(|layer| &*layer.version)
    }
}

impl Layer {
    fn found<'a>(&'a self, name: &'a str, prices: &'a ModelPrices) -> Found<'a> {
        Found {
            name,
            version: &self.version,
            prices,
        }
    }

    fn find(&self, provider: Option<&str>, model: &str) -> Option<Found<'_>> {
        let is_of = |row: &Found<'_>, provider: Option<&str>| match (provider, &row.prices.provider)
        {
            (Some(provider), Some(rows)) => provider == &**rows,
            (None, _) | (_, None) => true,
        };
        let qualified = provider.map(|provider| format!("{provider}/{model}"));
        let names = qualified.as_deref().into_iter().chain([model]);
        let own = names
            .filter_map(|name| self.row(name))
            .find(|row| is_of(row, provider));
        own.or_else(|| {
            let (prefix, rest) = model.split_once('/')?;
            let row = self.row(rest)?;
            let is_named = row.prices.provider.as_deref() == Some(prefix);
            (is_named && is_of(&row, provider)).then_some(row)
        })
    }

    fn row(&self, name: &str) -> Option<Found<'_>> {
        let (name, prices) = self.rows.get_key_value(name)?;
        Some(self.found(name, prices))
    }
}

/// The name without the date of a snapshot at its end, if it has one.
fn without_date(model: &str) -> Option<&str> {
    let is_number = |text: &str, range: std::ops::RangeInclusive<u32>| {
        text.bytes().all(|byte| byte.is_ascii_digit())
            && text.parse().is_ok_and(|number| range.contains(&number))
    };
    for (length, parts) in [(11, [1..5, 6..8, 9..11]), (9, [1..5, 5..7, 7..9])] {
        let Some((name, date)) = model.len().checked_sub(length).and_then(|at| {
            (at > 0).then_some(())?;
            model.split_at_checked(at)
        }) else {
            continue;
        };
        let [year, month, day] = parts.map(|part| date.get(part).unwrap_or_default());
        let has_dashes = date
            .char_indices()
            .all(|(at, c)| (c == '-') == (at == 0 || (length == 11 && matches!(at, 5 | 8))));
        if has_dashes
            && is_number(year, 2000..=2099)
            && is_number(month, 1..=12)
            && is_number(day, 1..=31)
        {
            return Some(name);
        }
    }
    None
}
