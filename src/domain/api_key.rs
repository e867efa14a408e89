//! API keys: what a program may do in the name of its user, and for how long.

use std::fmt;

use super::account::trimmed;
use super::{Budget, Period, Picodollars, Rates, Timestamp, UserId};

/// The most live keys of a user.
pub const MAX_LIVE_KEYS: usize = 100;
/// What the name of a key has to be.
const NAME_RULE: &str = "A name has 1 to 100 characters, and no control characters.";
/// The most characters of a name.
const MAX_NAME_CHARS: usize = 100;
/// The most patterns of models.
const MAX_MODELS: usize = 100;
/// The most characters of a pattern.
const MAX_MODEL_CHARS: usize = 200;
/// The digits of base 62.
const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Identifies an API key: 8 base62 characters, chosen at random, never reused. Not secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiKeyId([u8; Self::LENGTH]);

impl ApiKeyId {
    /// Characters of an id.
    pub const LENGTH: usize = 8;

    /// The id of that text; `None` if it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; Self::LENGTH] = text.as_bytes().try_into().ok()?;
        bytes
            .iter()
            .all(u8::is_ascii_alphanumeric)
            .then_some(Self(bytes))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("base62 is ASCII")
    }
}

impl fmt::Display for ApiKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for ApiKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeyId({})", self.as_str())
    }
}

/// The character for a number below 62.
pub fn base62_digit(number: usize) -> Option<u8> {
    BASE62.get(number).copied()
}

/// What an API key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Asking models: posting prompts.
    Chat,
    /// Computing embeddings.
    Embeddings,
    /// Reading what is stored: lists, searches, usage.
    Read,
    /// Changing and deleting what is stored.
    Write,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 4] = [Self::Chat, Self::Embeddings, Self::Read, Self::Write];

    /// The word that stands for it in requests and stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Embeddings => "embeddings",
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    /// The scope behind a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word)
    }

    fn bit(self) -> u8 {
        match self {
            Self::Chat => 1,
            Self::Embeddings => 2,
            Self::Read => 4,
            Self::Write => 8,
        }
    }
}

/// A set of scopes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scopes(u8);

impl Scopes {
    /// Whether the scope is in the set.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }

    /// The scopes of the set, always in the same order.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL
            .into_iter()
            .filter(move |scope| self.contains(*scope))
    }

    /// The set of the scopes behind these words; a word given twice counts once.
    ///
    /// # Errors
    /// One sentence for the user: a word is no scope, or there is none. Quotes nothing.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, &'static str> {
        let mut scopes = Self(0);
        for word in words {
            let scope = Scope::parse(word.trim());
            scopes.0 |= scope
                .ok_or("A scope is chat, embeddings, read or write.")?
                .bit();
        }
        if scopes.0 == 0 {
            return Err("A key needs one scope at least: chat, embeddings, read or write.");
        }
        Ok(scopes)
    }
}

impl Default for Scopes {
    /// `chat` and `read`.
    fn default() -> Self {
        [Scope::Chat, Scope::Read].into_iter().collect()
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | scope.bit()))
    }
}

impl fmt::Display for Scopes {
    /// The words with commas between, such as `chat,read`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<&str> = self.iter().map(Scope::as_str).collect();
        f.write_str(&words.join(","))
    }
}

impl fmt::Debug for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scopes({self})")
    }
}

/// An API key as its user sees it. It has no secret, and no hash of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    /// Identifies the key.
    pub id: ApiKeyId,
    /// The user in whose name the key acts.
    pub user_id: UserId,
    /// What the user calls it; need not be unique.
    pub name: String,
    /// What it may be used for.
    pub scopes: Scopes,
    /// The models that it may use: names, or beginnings of names followed by `*`. Empty: all.
    pub models: Vec<String>,
    /// How often it may be used; `None`: as often as its user.
    pub rates: Option<Rates>,
    /// How much it may spend; `None`: as much as its user.
    pub budget: Option<Budget>,
    /// From this instant on it is refused; `None`: never.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last used, to the minute; `None`: not yet.
    pub last_used_at: Option<Timestamp>,
    /// The last four characters of its text.
    pub last_four: String,
}

impl ApiKey {
    /// Whether the key may use the model of that name.
    pub fn allows_model(&self, name: &str) -> bool {
        self.models.is_empty()
            || self
                .models
                .iter()
                .any(|pattern| match pattern.strip_suffix('*') {
                    Some(beginning) => name.starts_with(beginning),
                    None => name == pattern,
                })
    }

    /// Whether the key has expired at `now`.
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// What is shown of the key's text when the text itself is not known any more.
    pub fn hint(&self) -> String {
        format!("ps_{}…{}", self.id, self.last_four)
    }
}

/// A change of a key. `None` leaves a setting as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiKeyChange {
    /// Another name.
    pub name: Option<String>,
    /// Other scopes.
    pub scopes: Option<Scopes>,
    /// Other models.
    pub models: Option<Vec<String>>,
    /// Other rates, or none.
    pub rates: Option<Option<Rates>>,
    /// Another amount of the budget, or no budget.
    pub budget: Option<Option<Picodollars>>,
    /// Another period of the budget, or the default one. Without a budget it changes nothing.
    pub budget_period: Option<Option<Period>>,
    /// Another end, or none.
    pub expires_at: Option<Option<Timestamp>>,
}

impl ApiKeyChange {
    /// The key after this change.
    pub fn apply(self, key: ApiKey) -> ApiKey {
        let amount = self
            .budget
            .unwrap_or_else(|| key.budget.map(|budget| budget.amount));
        let period = self
            .budget_period
            .unwrap_or_else(|| key.budget.map(|budget| budget.period))
            .unwrap_or(Budget::DEFAULT_PERIOD);
        ApiKey {
            name: self.name.unwrap_or(key.name),
            scopes: self.scopes.unwrap_or(key.scopes),
            models: self.models.unwrap_or(key.models),
            rates: self.rates.unwrap_or(key.rates),
            budget: amount.map(|amount| Budget { amount, period }),
            expires_at: self.expires_at.unwrap_or(key.expires_at),
            ..key
        }
    }
}

/// A name of a key, without the white space around it.
///
/// # Errors
/// One sentence for the user.
pub fn parse_name(text: &str) -> Result<String, &'static str> {
    let name = trimmed(text);
    let is_short = name.len() <= 4 * MAX_NAME_CHARS && name.chars().count() <= MAX_NAME_CHARS;
    if name.is_empty() || !is_short || name.chars().any(char::is_control) {
        return Err(NAME_RULE);
    }
    Ok(name.to_owned())
}

/// The models that a key may use; a pattern given twice counts once.
///
/// # Errors
/// One sentence for the user. Quotes nothing.
pub fn parse_models<'a>(
    patterns: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<String>, &'static str> {
    let mut models: Vec<String> = Vec::new();
    for pattern in patterns {
        let pattern = trimmed(pattern);
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let is_odd = |c: char| c.is_control() || c.is_whitespace() || c == '*' || c == ',';
        if pattern.is_empty() || pattern.chars().count() > MAX_MODEL_CHARS || name.contains(is_odd)
        {
            return Err(
                "A model is a name of up to 200 characters without blanks and commas, or the \
                 beginning of names with * after it.",
            );
        }
        if !models.iter().any(|known| known == pattern) {
            models.push(pattern.to_owned());
        }
        if models.len() > MAX_MODELS {
            return Err("A key has at most 100 models.");
        }
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(models: &[&str]) -> ApiKey {
        ApiKey {
            id: ApiKeyId::parse("abcd1234").unwrap(),
            user_id: UserId(1),
            name: "a key".to_owned(),
            scopes: Scopes::default(),
            models: parse_models(models.iter().copied()).unwrap(),
            rates: None,
            budget: None,
            expires_at: None,
            created_at: Timestamp(0),
            last_used_at: None,
            last_four: "wxyz".to_owned(),
        }
    }

    #[test]
    fn ids_are_eight_letters_and_digits() {
        assert_eq!(ApiKeyId::parse("aZ09bcde").unwrap().to_string(), "aZ09bcde");
        for bad in [
            "",
            "aZ09bcd",
            "aZ09bcdef",
            "aZ09bcd-",
            "aZ09bcé",
            "aZ09bc d",
        ] {
            assert_eq!(ApiKeyId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn digits_of_base_62_are_distinct_and_in_the_order_of_their_bytes() {
        assert!(BASE62.is_sorted_by(|a, b| a < b));
        assert!(BASE62.iter().all(u8::is_ascii_alphanumeric));
        assert_eq!((base62_digit(61), base62_digit(62)), (Some(b'z'), None));
    }

    #[test]
    fn scopes_are_read_in_any_order_and_shown_in_one() {
        let scopes = Scopes::parse(["write", " chat", "write"]).unwrap();
        assert_eq!(scopes.to_string(), "chat,write");
        assert_eq!(Scopes::parse(scopes.to_string().split(',')), Ok(scopes));
        assert_eq!(Scopes::default().to_string(), "chat,read");
        for bad in [&[][..], &["admin"], &["chat", ""], &["Chat"]] {
            assert!(Scopes::parse(bad.iter().copied()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn models_are_names_or_beginnings_of_names() {
        let all = key(&[]);
        assert!(all.allows_model("anything"));
        let some = key(&["gpt-*", "llama3.2", "gpt-*"]);
        assert_eq!(some.models, ["gpt-*", "llama3.2"]);
        for allowed in ["gpt-6-luna", "gpt-", "llama3.2"] {
            assert!(some.allows_model(allowed), "{allowed}");
        }
        for refused in ["gpt", "llama3.2:1b", "xgpt-6", "", "GPT-6"] {
            assert!(!some.allows_model(refused), "{refused}");
        }
        assert!(key(&["*"]).allows_model(""));
        let long = "x".repeat(201);
        for bad in [
            "",
            " ",
            "*x",
            "a*b",
            "a**",
            "a b",
            "a,b",
            "a\0",
            long.as_str(),
        ] {
            assert!(parse_models([bad]).is_err(), "{bad:?}");
        }
        let many: Vec<String> = (0..101).map(|n| n.to_string()).collect();
        assert!(parse_models(many.iter().map(String::as_str)).is_err());
    }

    #[test]
    fn names_are_trimmed_and_bounded() {
        assert_eq!(parse_name(" ci ").as_deref(), Ok("ci"));
        assert!(parse_name(&"é".repeat(100)).is_ok());
        for bad in ["", " ", "a\nb", "\0", &"é".repeat(101)] {
            assert!(parse_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_change_replaces_what_it_names_and_keeps_the_rest() {
        let before = key(&["a"]);
        assert_eq!(ApiKeyChange::default().apply(before.clone()), before);
        let period = ApiKeyChange {
            budget_period: Some(Some(Period::Day)),
            ..ApiKeyChange::default()
        };
        assert_eq!(period.clone().apply(before.clone()).budget, None);
        let budget = |change: ApiKeyChange, key: ApiKey| {
            let key = change.apply(key);
            (key.budget.map(|budget| budget.to_string()), key)
        };
        let amount = ApiKeyChange {
            budget: Some(Some("5".parse().unwrap())),
            ..ApiKeyChange::default()
        };
        let (shown, key) = budget(amount.clone(), before);
        assert_eq!(shown.as_deref(), Some("5.00/month"));
        let (shown, key) = budget(period, key);
        assert_eq!(shown.as_deref(), Some("5.00/day"));
        let (shown, key) = budget(amount, key);
        assert_eq!(shown.as_deref(), Some("5.00/day"), "the period stays");
        let default_period = ApiKeyChange {
            budget_period: Some(None),
            ..ApiKeyChange::default()
        };
        let (shown, key) = budget(default_period, key);
        assert_eq!(shown.as_deref(), Some("5.00/month"));
        let none = ApiKeyChange {
            budget: Some(None),
            ..ApiKeyChange::default()
        };
        assert_eq!(none.apply(key).budget, None);
    }

    #[test]
    fn a_key_expires_at_its_end() {
        let mut key = key(&[]);
        assert!(!key.has_expired(Timestamp(i64::MAX)));
        key.expires_at = Some(Timestamp(10));
        assert!(!key.has_expired(Timestamp(9)) && key.has_expired(Timestamp(10)));
    }
}
