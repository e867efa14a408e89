//! What the routes of API keys take, and how it is read.

use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::extract::{Fields, Scalar, form};
use crate::domain::account::{NOT_NULL, REQUIRED};
use crate::domain::api_key::{parse_models, parse_name};
use crate::domain::budget::parse_budget_amount;
use crate::domain::{ApiKeyChange, Budget, Period, Picodollars, Rates, Scopes, Timestamp};
use crate::error::Error;
use crate::services::api_keys::{DEFAULT_GRACE, NewApiKey, PERIOD_WITHOUT_BUDGET};

/// A field that may be left out, or be null.
type Nullable<T> = Option<Option<T>>;

/// An API key to be made.
#[derive(ToSchema)]
pub struct CreateKeyRequest {
    /// What you call it. Need not be unique. No control characters.
    #[schema(value_type = String, min_length = 1, max_length = 100, pattern = r"\S", example = "nightly report")]
    name: Nullable<String>,
    /// What it may be used for: `chat` asks models, `embeddings` computes embeddings, `read` lists
    /// and searches, `write` changes and deletes.
    #[schema(value_type = Option<Vec<ScopeName>>, min_items = 1, default = json!(["chat", "read"]))]
    scopes: Nullable<Vec<String>>,
    /// The models that it may use: names, or beginnings of names followed by `*`. Empty or null:
    /// all.
    #[schema(value_type = Option<Vec<ModelPattern>>, max_items = 100, example = json!(["gpt-*"]))]
    models: Nullable<Vec<String>>,
    /// How often it may be used, as in `PROMPT_THROTTLE`: `2/s,100/day`. Null or `off`: as often as
    /// you.
    #[schema(value_type = Option<String>, pattern = "^[1-9][0-9]{0,3}/(s|min|h|day)$", example = "100/day")]
    rates: Nullable<String>,
    /// How much it may spend in a period, in US dollars: a number, or a text such as `"20.00"`.
    /// What comes after 12 decimals is cut off. Null: as much as you.
    #[schema(value_type = Option<f64>, minimum = 0.01, maximum = 1_000_000, example = 20.0)]
    budget_usd: Nullable<Scalar>,
    /// The period of the budget, in UTC. Weeks begin on Monday.
    #[schema(value_type = Option<PeriodName>, default = "month")]
    budget_period: Nullable<String>,
    /// When it expires, as RFC 3339. Null: never.
    #[schema(value_type = Option<String>, format = "date-time", example = "2036-11-22T21:08:49Z")]
    expires_at: Nullable<String>,
}

form!(CreateKeyRequest {
    name: nullable_text,
    scopes: nullable_texts,
    models: nullable_texts,
    rates: nullable_text,
    budget_usd: nullable_scalar,
    budget_period: nullable_text,
    expires_at: nullable_text
}, json_only: true);

/// Changes of an API key. What is left out stays as it is; null sets what a new key has by default.
#[derive(ToSchema)]
pub struct ChangeKeyRequest {
    /// What you call it. No control characters.
    #[schema(value_type = String, required = false, min_length = 1, max_length = 100, pattern = r"\S", example = "nightly report")]
    name: Nullable<String>,
    /// What it may be used for.
    #[schema(value_type = Option<Vec<ScopeName>>, min_items = 1)]
    scopes: Nullable<Vec<String>>,
    /// The models that it may use. Empty or null: all.
    #[schema(value_type = Option<Vec<ModelPattern>>, max_items = 100, example = json!(["gpt-*"]))]
    models: Nullable<Vec<String>>,
    /// How often it may be used. Null or `off`: as often as you.
    #[schema(value_type = Option<String>, pattern = "^[1-9][0-9]{0,3}/(s|min|h|day)$", example = "100/day")]
    rates: Nullable<String>,
    /// How much it may spend in a period, in US dollars. Null: as much as you.
    #[schema(value_type = Option<f64>, minimum = 0.01, maximum = 1_000_000, example = 20.0)]
    budget_usd: Nullable<Scalar>,
    /// The period of the budget.
    #[schema(value_type = Option<PeriodName>)]
    budget_period: Nullable<String>,
    /// When it expires, as RFC 3339. Null: never.
    #[schema(value_type = Option<String>, format = "date-time", example = "2036-11-22T21:08:49Z")]
    expires_at: Nullable<String>,
}

form!(ChangeKeyRequest {
    name: nullable_text,
    scopes: nullable_texts,
    models: nullable_texts,
    rates: nullable_text,
    budget_usd: nullable_scalar,
    budget_period: nullable_text,
    expires_at: nullable_text
}, json_only: true);

/// How long the present secret stays valid.
#[derive(ToSchema)]
pub struct RotateKeyRequest {
    /// For how long the present secret may still be used: seconds, or a text such as `24h`; at most
    /// 30 days.
    #[schema(value_type = Option<Grace>, default = "24h", example = "1h")]
    grace: Nullable<Scalar>,
}

form!(RotateKeyRequest { grace: nullable_scalar }, json_only: true);

/// The name of a model, or the beginning of names followed by `*`.
#[derive(Serialize, ToSchema)]
#[schema(
    min_length = 1,
    max_length = 200,
    pattern = r"^[^\s,*\x00-\x1f\x7f-\x9f]*\*?$",
    example = "gpt-*"
)]
pub struct ModelPattern(String);

/// A length of time.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(
    dead_code,
    reason = "only the description needs it: `Fields` reads both forms"
)]
pub enum Grace {
    /// Seconds.
    Seconds(GraceSeconds),
    /// As in settings.
    Text(GraceText),
}

/// Seconds.
#[derive(Serialize, ToSchema)]
#[schema(maximum = 2_592_000)]
pub struct GraceSeconds(u32);

/// A number and its unit.
#[derive(Serialize, ToSchema)]
#[schema(pattern = "^[0-9]{1,2}(s|m|h)$", example = "24h")]
pub struct GraceText(String);

/// What an API key may be used for.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScopeName {
    /// Asking models.
    Chat,
    /// Computing embeddings.
    Embeddings,
    /// Lists and searches.
    Read,
    /// Changes and deletions.
    Write,
}

/// The period of a budget.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PeriodName {
    /// From midnight UTC.
    Day,
    /// From Monday.
    Week,
    /// From the first of the month.
    Month,
    /// For all time.
    Total,
}

impl CreateKeyRequest {
    /// The key that these fields ask for.
    ///
    /// # Errors
    /// `InvalidFields`.
    pub fn new_key(fields: &mut Fields) -> Result<NewApiKey, Error> {
        let request = Self::read(fields);
        if request.name.is_none() {
            fields.refuse("name", REQUIRED);
        }
        let change = ChangeKeyRequest {
            name: request.name,
            scopes: request.scopes,
            models: request.models,
            rates: request.rates,
            budget_usd: request.budget_usd,
            budget_period: request.budget_period,
            expires_at: request.expires_at,
        };
        let ApiKeyChange {
            name,
            scopes,
            models,
            rates,
            budget,
            budget_period,
            expires_at,
        } = change.parse(fields);
        let period = budget_period.flatten();
        let budget = budget.flatten().map(|amount| Budget {
            amount,
            period: period.unwrap_or(Budget::DEFAULT_PERIOD),
        });
        if period.is_some() && budget.is_none() {
            fields.refuse("budget_period", PERIOD_WITHOUT_BUDGET);
        }
        fields.check()?;
        Ok(NewApiKey {
            name: name.unwrap_or_default(),
            scopes: scopes.unwrap_or_default(),
            models: models.unwrap_or_default(),
            rates: rates.flatten(),
            budget,
            expires_at: expires_at.flatten(),
        })
    }
}

impl RotateKeyRequest {
    /// For how long the present secret may still be used.
    ///
    /// # Errors
    /// `InvalidFields`.
    pub fn grace(fields: &mut Fields) -> Result<Duration, Error> {
        let Self { grace } = Self::read(fields);
        let grace = grace.flatten().map(|grace| parse_grace(&grace));
        if grace == Some(None) {
            let message = "Write seconds, or a length of time such as 24h, 90m or 0s.";
            fields.refuse("grace", message);
        }
        fields.check()?;
        Ok(grace.flatten().unwrap_or(DEFAULT_GRACE))
    }
}

/// A length of time: a number of whole seconds, or a text as settings write it.
fn parse_grace(grace: &Scalar) -> Option<Duration> {
    match grace {
        // JSON has one type of number: some writers add a fraction of zero.
        Scalar::Number(seconds) => seconds
            .parse::<f64>()
            .ok()
            .filter(|seconds| seconds.fract() == 0.0)
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        // The parser takes a bare 0.
        Scalar::Text(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => None,
        Scalar::Text(text) => humantime::parse_duration(text).ok(),
    }
}

impl ChangeKeyRequest {
    /// The change that these fields ask for.
    ///
    /// # Errors
    /// `InvalidFields`.
    pub fn change(fields: &mut Fields) -> Result<ApiKeyChange, Error> {
        let change = Self::read(fields).parse(fields);
        fields.check()?;
        Ok(change)
    }

    /// Reads the fields' values. Those that break a rule are reported by [`Fields::check`].
    fn parse(self, fields: &mut Fields) -> ApiKeyChange {
        /// Notes the error of a value.
        fn noted<T>(
            fields: &mut Fields,
            name: &'static str,
            value: Result<T, impl Into<String>>,
        ) -> Option<T> {
            value.map_err(|message| fields.refuse(name, message)).ok()
        }
        let name = self.name.and_then(|name| {
            let name = name.ok_or(NOT_NULL).and_then(|name| parse_name(&name));
            noted(fields, "name", name)
        });
        let scopes = self.scopes.and_then(|words| match words {
            None => Some(Scopes::default()),
            Some(words) => {
                let scopes = Scopes::parse(words.iter().map(String::as_str));
                noted(fields, "scopes", scopes)
            }
        });
        let models = self.models.and_then(|patterns| {
            let patterns = patterns.unwrap_or_default();
            let models = parse_models(patterns.iter().map(String::as_str));
            noted(fields, "models", models)
        });
        let rates = nullable(self.rates, |text| {
            let rates: Result<Rates, String> = text.parse().map_err(|_| RATES_RULE.to_owned());
            noted(fields, "rates", rates)
        });
        let budget: Nullable<Picodollars> = nullable(self.budget_usd, |scalar| {
            let (Scalar::Number(text) | Scalar::Text(text)) = scalar;
            noted(fields, "budget_usd", parse_budget_amount(&text))
        });
        let budget_period = nullable(self.budget_period, |word| {
            let period = Period::parse(&word);
            let rule = "A period is day, week, month or total.";
            noted(fields, "budget_period", period.ok_or(rule))
        });
        let expires_at = nullable(self.expires_at, |text| {
            let time = Timestamp::parse_rfc3339(&text);
            let rule = "Write a time as in RFC 3339, such as 2036-11-22T21:08:49Z.";
            noted(fields, "expires_at", time.ok_or(rule))
        });
        ApiKeyChange {
            name,
            scopes,
            models,
            rates,
            budget,
            budget_period,
            expires_at,
        }
    }
}

/// The rule for rates, which does not quote the value.
const RATES_RULE: &str = "Write rates such as 2/s,100/day: up to 10000 in s, min, h or day.";

/// Reads a value that may be null. What breaks a rule counts as left out.
fn nullable<T, U>(value: Nullable<T>, read: impl FnOnce(T) -> Option<U>) -> Nullable<U> {
    match value? {
        None => Some(None),
        Some(value) => read(value).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::extract::{Field, Form};

    #[test]
    fn grace_is_seconds_or_a_length_of_time() {
        let number = |text: &str| parse_grace(&Scalar::Number(text.to_owned()));
        let text = |text: &str| parse_grace(&Scalar::Text(text.to_owned()));
        assert_eq!(number("0"), Some(Duration::ZERO));
        for ninety in ["90", "90.0", "9e1"] {
            assert_eq!(number(ninety), Some(Duration::from_secs(90)));
        }
        assert_eq!(text("0s"), Some(Duration::ZERO));
        assert_eq!(text("24h"), Some(Duration::from_secs(86_400)));
        assert_eq!(text("30d"), Some(Duration::from_secs(2_592_000)));
        for bad in ["-1", "1.5", "1e30", "1e999", "99999999999999999999"] {
            assert_eq!(number(bad), None, "{bad}");
        }
        for bad in ["", "0", "90", "-1s", "soon", "99999999999999999999d"] {
            assert_eq!(text(bad), None, "{bad}");
        }
    }
    #[test]
    fn null_changes_a_setting_and_what_is_left_out_does_not() {
        let change = |names: &[&str]| {
            let fields = names.iter().map(|name| ((*name).to_owned(), Field::Null));
            ChangeKeyRequest::change(&mut fields.collect()).unwrap()
        };
        assert_eq!(change(&[]), ApiKeyChange::default());
        let to_defaults = ApiKeyChange {
            name: None,
            scopes: Some(Scopes::default()),
            models: Some(Vec::new()),
            rates: Some(None),
            budget: Some(None),
            budget_period: Some(None),
            expires_at: Some(None),
        };
        let names = ChangeKeyRequest::FIELDS.iter().copied();
        let nullable: Vec<&str> = names.filter(|name| *name != "name").collect();
        assert_eq!(change(&nullable), to_defaults);
    }
}
