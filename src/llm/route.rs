//! Which upstreams a model's calls go to.

use std::iter;
use std::sync::Arc;

use super::mock;
use crate::config::{Endpoint, ServedModels, UpstreamConfig, is_model_name};

/// The upstreams that are asked for a model, in this order. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Route(Arc<Way>);

#[derive(Debug)]
enum Way {
    Mock,
    /// Never empty.
    Hops(Vec<Hop>),
}

/// One upstream of a route.
#[derive(Debug)]
pub struct Hop {
    /// Its index in the configuration.
    pub endpoint: usize,
    /// Its name.
    pub upstream: String,
    /// The model that it is asked for.
    pub model: String,
    /// What stands for the model in metrics: a word of the configuration, never of a caller.
    pub label: String,
}

impl Route {
    /// To the mock.
    pub(super) fn mock() -> Self {
        Self(Arc::new(Way::Mock))
    }

    /// To the upstreams that serve the model. `None` if there is none.
    pub fn find(config: &UpstreamConfig, model: &str) -> Option<Self> {
        if !is_model_name(model) {
            return None;
        }
        let mut endpoints = config.endpoints.iter().enumerate();
        let (at, (target, label)) =
            endpoints.find_map(|(at, endpoint)| Some((at, served(endpoint, model)?)))?;
        let first = &config.endpoints[at];
        // A pattern does not tell the default model from others, and it has a name of its own.
        let label = match target == config.default_model {
            true => &config.default_model,
            false => label,
        };
        let hop = |at: usize, model: &str, label: &str| Hop {
            endpoint: at,
            upstream: config.endpoints[at].name.clone(),
            model: model.to_owned(),
            label: label.to_owned(),
        };
        let others = first.fallback.iter().map(|at| {
            let (target, label) = elsewhere(&config.endpoints[*at], model, target, label);
            hop(*at, target, label)
        });
        let hops = iter::once(hop(at, target, label)).chain(others);
        Some(Self(Arc::new(Way::Hops(hops.collect()))))
    }

    /// The model that the first upstream is asked for: an alias is replaced.
    pub fn model(&self) -> &str {
        match &*self.0 {
            Way::Mock => mock::NAME,
            Way::Hops(hops) => &hops[0].model,
        }
    }

    /// The name of the first upstream.
    pub fn upstream(&self) -> &str {
        match &*self.0 {
            Way::Mock => mock::NAME,
            Way::Hops(hops) => &hops[0].upstream,
        }
    }

    /// Each upstream that may be asked, with the model that it is asked for.
    pub fn candidates(&self) -> impl Iterator<Item = (&str, &str)> {
        let mock = self.is_mock().then_some((mock::NAME, mock::NAME));
        let hops = self.hops().iter();
        mock.into_iter()
            .chain(hops.map(|hop| (hop.upstream.as_str(), hop.model.as_str())))
    }

    /// Whether the mock answers, which costs nothing.
    pub fn is_mock(&self) -> bool {
        matches!(*self.0, Way::Mock)
    }

    /// The upstreams; none for the mock.
    pub(super) fn hops(&self) -> &[Hop] {
        match &*self.0 {
            Way::Mock => &[],
            Way::Hops(hops) => hops,
        }
    }
}

/// What stands for the models of an upstream in metrics.
pub fn labels<'a>(endpoint: &'a Endpoint, default_model: &'a str) -> impl Iterator<Item = &'a str> {
    let (always, patterns, aliases) = match &endpoint.models {
        ServedModels::Always(model) => (Some(model.as_str()), &[][..], None),
        ServedModels::Matching { patterns, aliases } => (None, &patterns[..], Some(aliases)),
    };
    // Most calls are for the default model.
    let patterns = patterns.iter().map(move |pattern| {
        let is_default = pattern.matches(default_model);
        if is_default {
            default_model
        } else {
            pattern.as_str()
        }
    });
    let targets = aliases.into_iter().flat_map(|all| all.values());
    always
        .into_iter()
        .chain(patterns)
        .chain(targets.map(String::as_str))
}

/// The model that an upstream is asked for if a caller asks for `model`, and the word that stands
/// for it in metrics. `None` if the upstream does not serve it.
fn served<'a>(endpoint: &'a Endpoint, model: &'a str) -> Option<(&'a str, &'a str)> {
    match &endpoint.models {
        ServedModels::Always(_) => None,
        ServedModels::Matching { patterns, aliases } => match aliases.get(model) {
            Some(target) => Some((target, target)),
            None => {
                let pattern = patterns.iter().find(|pattern| pattern.matches(model))?;
                Some((model, pattern.as_str()))
            }
        },
    }
}

/// The same for a fallback, which is asked whether one of its patterns matches or not. `target` is
/// what the first upstream is asked for, and `label` stands for it in metrics.
fn elsewhere<'a>(
    endpoint: &'a Endpoint,
    model: &'a str,
    target: &'a str,
    label: &'a str,
) -> (&'a str, &'a str) {
    match &endpoint.models {
        ServedModels::Always(model) => (model, model),
        ServedModels::Matching { aliases, .. } => {
            let alias = aliases.get(model).or_else(|| aliases.get(target));
            alias.map_or((target, label), |target| (target, target))
        }
    }
}
