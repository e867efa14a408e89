//! One upstream: its address, its key and its models, and the checks of them.

use std::collections::BTreeMap;

use super::{BaseUrl, Error, Secret};

/// Longest name of a model, in bytes.
const MODEL_BYTES: usize = 200;

/// One upstream: an address, and the models that are asked there.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name in metrics and in the log: `primary`, `fallback-1`, or its `name` in `UPSTREAMS`.
    pub name: String,
    /// The address.
    pub base_url: BaseUrl,
    /// The key, which is sent to this address only.
    pub api_key: Option<Secret>,
    /// Its models.
    pub models: ServedModels,
    /// The indexes of the upstreams that are asked, in this order, when this one fails.
    pub fallback: Vec<usize>,
}

/// The models of an upstream.
#[derive(Clone, Debug)]
pub enum ServedModels {
    /// This one is asked, whatever name the caller has asked for. No call goes to such an upstream
    /// first.
    Always(String),
    /// Those that the patterns match, and those behind the aliases.
    Matching {
        /// Names, and beginnings of names.
        patterns: Vec<ModelPattern>,
        /// The model that is asked in place of each name.
        aliases: BTreeMap<String, String>,
    },
}

impl ServedModels {
    /// Whether calls for the model go to the upstream first.
    pub fn serves(&self, model: &str) -> bool {
        match self {
            Self::Always(_) => false,
            Self::Matching { patterns, aliases } => {
                aliases.contains_key(model) || patterns.iter().any(|each| each.matches(model))
            }
        }
    }

    /// Every name.
    pub fn any() -> Self {
        Self::Matching {
            patterns: vec![ModelPattern("*".to_owned())],
            aliases: BTreeMap::new(),
        }
    }
}

/// The name of a model, or the beginning of names with a `*` after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPattern(String);

impl ModelPattern {
    /// Reads a pattern. `None` if it is not a model's name with at most one `*`, at its end.
    pub fn parse(text: &str) -> Option<Self> {
        let start = text.strip_suffix('*').unwrap_or(text);
        let is_good = is_model_name(text) && !start.contains('*');
        is_good.then(|| Self(text.to_owned()))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, if the pattern is the name of a single model.
    pub fn exact(&self) -> Option<&str> {
        (!self.0.ends_with('*')).then_some(&self.0)
    }

    /// Whether the name of a model matches.
    pub fn matches(&self, model: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(start) => model.starts_with(start),
            None => model == self.0,
        }
    }
}

/// Whether a text can be the name of a model: it is sent in JSON, logged, and written into rows.
pub fn is_model_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MODEL_BYTES && !name.chars().any(char::is_control)
}

/// Checks a model's name, which is written into metrics and into each row.
pub(super) fn checked_model(setting: &'static str, name: &str) -> Result<String, Error> {
    if !is_model_name(name) {
        return Err(Error::new(
            setting,
            "a model's name has 1 to 200 bytes, without control characters",
        ));
    }
    Ok(name.to_owned())
}

/// Checks a key: it is sent in a header, so it must have characters that a header may have.
pub(super) fn checked_key(
    setting: &'static str,
    key: Option<Secret>,
) -> Result<Option<Secret>, Error> {
    match &key {
        Some(key) if !key.expose().bytes().all(|byte| byte.is_ascii_graphic()) => Err(Error::new(
            setting,
            "a key has visible ASCII characters only: is there a blank or a line break in it?",
        )),
        Some(_) | None => Ok(key),
    }
}
