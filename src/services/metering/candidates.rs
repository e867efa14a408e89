//! The prices of a model at each of the upstreams that its calls may go to, for operators.

use super::Metering;
use crate::llm::Route;
use crate::pricing::{Found, PriceTable};

/// An upstream that a call may go to, and the price that holds there.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a, 'm> {
    /// The upstream's name.
    pub upstream: &'a str,
    /// The model that it is asked for.
    pub model: &'a str,
    /// Who sells the models of the upstream, where its address says that. Only this provider's
    /// prices count then.
    pub provider: Option<&'static str>,
    /// The price; `None` if the table has none.
    pub row: Option<Found<'m>>,
}

impl Metering {
    /// The prices in force.
    pub fn prices(&self) -> &PriceTable {
        &self.prices
    }

    /// The upstreams that calls of this route may go to, in the order in which they are asked. With
    /// a budget in force a call is refused if one of them has no price. None for the mock, which
    /// costs nothing.
    pub fn candidates<'a, 'm>(
        &'m self,
        route: &'a Route,
    ) -> impl Iterator<Item = Candidate<'a, 'm>> {
        let candidates = route.candidates().filter(|_| !self.is_mock);
        candidates.map(|(upstream, model)| Candidate {
            upstream,
            model,
            provider: self.providers.get(upstream).copied().flatten(),
            row: self.find(upstream, model),
        })
    }

    /// Whether the answer to a prompt has a bound, by setting or by the row. Without one the most
    /// that a call can cost is not known.
    pub fn bounds_answers(&self, row: &Found<'_>) -> bool {
        self.max_tokens.is_some() || row.prices.max_output_tokens.is_some()
    }
}
