//! `/api/usage`: what the caller's calls used and cost.

use std::fmt::Write;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::authenticate::{Permitted, ReadScope};
use super::content_negotiation::wants_csv;
use super::dollars::dollars;
use super::error::ApiError;
use super::extract::{Query, RequestOwner};
use super::json_response::{json_response, reserved_bytes};
use super::state::AppState;
use crate::domain::usage::{day_text, parse_day};
use crate::domain::{Timestamp, UsageGroups, UsageSum, UsageTotals};
use crate::error::Error;
use crate::services::usage::{UsageAnswer, UsageQuestion};

/// The most bytes that a sum takes in a response: its numbers, and names of up to 200 bytes, each
/// escaped.
const SUM_BYTES: usize = 2_048;

const DAY_RULE: &str = "A day is written as 2026-11-30.";
const GROUPS_RULE: &str = "It is one or more of day, model and key, separated by commas.";

/// The routes of this resource; all need an access token or an API key.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(show_usage))
}

/// Which usage is summed up, and how.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "only the description is used")]
struct UsageParameters {
    /// The first day, in UTC. Without it, 30 days are summed up.
    #[param(format = "date", example = "2026-11-01")]
    from: Option<String>,
    /// The last day, in UTC; at most 400 days. Without it, today.
    #[param(format = "date", example = "2026-11-30")]
    to: Option<String>,
    /// By what sums are told apart: one or more of `day`, `model` and `key`, separated by commas.
    #[param(
        example = "day,model",
        default = "day",
        pattern = "^(day|model|key)(,(day|model|key))*$"
    )]
    group_by: Option<String>,
}

/// What calls used and cost, summed up.
#[derive(Serialize, ToSchema)]
pub struct UsageResponse {
    /// The first day.
    #[schema(format = "date", example = "2026-11-01")]
    from: String,
    /// The last day.
    #[schema(format = "date", example = "2026-11-30")]
    to: String,
    results: Vec<UsageGroupResponse>,
    /// Of all results.
    total: UsageTotalsResponse,
}

/// The sums of one group.
#[derive(Serialize, ToSchema)]
pub struct UsageGroupResponse {
    /// The day on which the calls began, in UTC; null if days are not told apart.
    #[schema(required = true, format = "date", example = "2026-11-30")]
    day: Option<String>,
    /// The model that answered; null if models are not told apart.
    #[schema(required = true, example = "gpt-6-luna")]
    model: Option<String>,
    /// The API key; null if keys are not told apart, or for calls without a key.
    #[schema(required = true, example = "4fR8sTq2")]
    api_key_id: Option<String>,
    #[serde(flatten)]
    totals: UsageTotalsResponse,
}

/// Sums over attempts at upstreams. Each token is in one kind.
#[derive(Serialize, ToSchema)]
pub struct UsageTotalsResponse {
    /// Attempts that may have cost something. A call has one, or more if an upstream failed.
    #[schema(example = 12)]
    attempts: u64,
    /// Tokens of requests outside the upstream's cache.
    #[schema(example = 1200)]
    input_tokens: u64,
    /// Tokens of requests read from the upstream's cache.
    #[schema(example = 0)]
    cache_read_tokens: u64,
    /// Tokens of requests written to the upstream's cache.
    #[schema(example = 0)]
    cache_write_tokens: u64,
    /// Tokens of answers, without reasoning.
    #[schema(example = 340)]
    output_tokens: u64,
    /// Tokens of reasoning.
    #[schema(example = 0)]
    reasoning_tokens: u64,
    /// The cost in US dollars, exactly, of the attempts with a known price.
    #[schema(value_type = f64, example = 0.00029)]
    cost_usd: Box<RawValue>,
    /// Attempts whose cost is not known, because their model has no price or nobody counted their
    /// tokens.
    #[schema(example = 0)]
    unpriced_attempts: u64,
}

/// Usage and cost
///
/// What the caller's calls used and cost, of all front doors, by day, model or API key. Sums are
/// exact, and stay when prompts are deleted. With `Accept: text/csv` the same as a table.
#[utoipa::path(
    get, path = "/api/usage", tag = "usage", operation_id = "show_usage", security(("bearer" = []), ("api_key" = [])),
    params(UsageParameters),
    responses(
        (
            status = 200, description = "The sums, by rising day, key and model.",
            content((UsageResponse = "application/json"), (String = "text/csv")),
        ),
    ),
)]
async fn show_usage(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    headers: HeaderMap,
    query: Query,
) -> Result<Response, ApiError> {
    let question = read(&query)?;
    let user_id = caller.user_id();
    let _turn = state.reads.acquire(user_id).await.map_err(Error::from)?;
    let usages = &state.usages;
    let answer = usages.of_user(user_id, question, Timestamp::now()).await?;
    let bytes = SUM_BYTES * (answer.sums.len() + 1);
    let memory = state.memory.reserve(owner, bytes).map_err(Error::from)?;
    if wants_csv(&headers) {
        let body = reserved_bytes(table(&answer).into_bytes(), memory);
        let kind = [(CONTENT_TYPE, "text/csv; charset=utf-8")];
        return Ok((StatusCode::OK, kind, axum::body::Body::from(body)).into_response());
    }
    let mut total = UsageTotals::default();
    for sum in &answer.sums {
        total += sum.totals;
    }
    let body = UsageResponse {
        from: day_text(answer.from),
        to: day_text(answer.to),
        results: answer.sums.into_iter().map(Into::into).collect(),
        total: total.into(),
    };
    Ok(json_response(StatusCode::OK, &body, memory))
}

fn read(query: &Query) -> Result<UsageQuestion, Error> {
    let mut wrong = Vec::new();
    let mut day = |name: &'static str| {
        let text = query.get(name)?;
        let day = parse_day(text);
        if day.is_none() {
            wrong.push((name, vec![DAY_RULE.to_owned()]));
        }
        day
    };
    let (from, to) = (day("from"), day("to"));
    let mut groups = UsageGroups::default();
    for word in query.get("group_by").unwrap_or("day").split(',') {
        match word {
            "day" => groups.by_day = true,
            "model" => groups.by_model = true,
            "key" => groups.by_key = true,
            _ => {
                wrong.push(("group_by", vec![GROUPS_RULE.to_owned()]));
                break;
            }
        }
    }
    if wrong.is_empty() {
        Ok(UsageQuestion { from, to, groups })
    } else {
        Err(Error::InvalidFields(wrong))
    }
}

impl From<UsageSum> for UsageGroupResponse {
    fn from(sum: UsageSum) -> Self {
        Self {
            day: sum.day.map(day_text),
            model: sum.model,
            api_key_id: sum.api_key_id.flatten().map(|id| id.to_string()),
            totals: sum.totals.into(),
        }
    }
}

impl From<UsageTotals> for UsageTotalsResponse {
    fn from(totals: UsageTotals) -> Self {
        let tokens = totals.tokens;
        Self {
            attempts: totals.attempts,
            input_tokens: tokens.input,
            cache_read_tokens: tokens.cache_read,
            cache_write_tokens: tokens.cache_write,
            output_tokens: tokens.output,
            reasoning_tokens: tokens.reasoning,
            cost_usd: dollars(totals.cost),
            unpriced_attempts: totals.unpriced,
        }
    }
}

/// The sums as comma-separated values (RFC 4180), under the names of the JSON members.
fn table(answer: &UsageAnswer) -> String {
    let mut text = String::from(
        "day,model,api_key_id,attempts,input_tokens,cache_read_tokens,cache_write_tokens,\
         output_tokens,reasoning_tokens,cost_usd,unpriced_attempts\r\n",
    );
    for sum in &answer.sums {
        let (totals, tokens) = (&sum.totals, &sum.totals.tokens);
        let key = sum.api_key_id.flatten();
        // Writing to a text does not fail.
        let _ = write!(
            text,
            "{},{},{},{},{},{},{},{},{},{},{}\r\n",
            sum.day.map(day_text).unwrap_or_default(),
            quoted(sum.model.as_deref().unwrap_or_default()),
            key.map(|id| id.to_string()).unwrap_or_default(),
            totals.attempts,
            tokens.input,
            tokens.cache_read,
            tokens.cache_write,
            tokens.output,
            tokens.reasoning,
            totals.cost,
            totals.unpriced,
        );
    }
    text
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\r', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_read_or_each_wrong_field_is_named() {
        let question = read(&Query::parse(
            "from=1970-01-02&to=1970-01-03&group_by=key,model",
        ));
        let question = question.unwrap();
        assert_eq!((question.from, question.to), (Some(1), Some(2)));
        assert!(question.groups.by_key && question.groups.by_model && !question.groups.by_day);
        let usual = read(&Query::parse("")).unwrap();
        assert!(usual.groups.by_day && usual.from.is_none());
        let wrong = read(&Query::parse("from=yesterday&to=2026-02-30&group_by=user"));
        let Err(Error::InvalidFields(fields)) = wrong else {
            panic!("{wrong:?}");
        };
        let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["from", "to", "group_by"]);
    }

    #[test]
    fn texts_with_commas_and_quotes_stay_one_field() {
        assert_eq!(quoted("gpt-6-luna"), "gpt-6-luna");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
