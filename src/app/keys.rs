//! The operator's commands on API keys. They work on the store directly, also while a server runs.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use tokio_util::task::TaskTracker;

use super::store::Store;
use super::users::{find, on_store};
use crate::cli::{CreateKeyArgs, KeyCommand};
use crate::config::Config;
use crate::domain::api_key::{parse_models, parse_name};
use crate::domain::{
    ApiKey, ApiKeyId, Budget, Rates, Record, RecordCursor, Scopes, Timestamp, User, UserId,
};
use crate::error::Error;
use crate::services::api_keys::{ApiKeys, DEFAULT_GRACE, IssuedApiKey, NewApiKey};

/// Keys read at once for a listing.
const LIST_PAGE: usize = 500;

/// Carries out one command. `out` gets a new key alone, so that it can be captured, or the table of
/// keys; `notes` gets what else there is to say.
///
/// # Errors
/// One line that names the problem.
pub async fn run(
    command: KeyCommand,
    config: &Config,
    out: &mut impl Write,
    notes: &mut impl Write,
) -> anyhow::Result<()> {
    match command {
        KeyCommand::Create(arguments) => {
            let now = Timestamp::now();
            let new = new_key(&arguments, now)?;
            let issued = on_store(config, async |store| {
                let user = find(&*store.accounts, &arguments.username).await?;
                let created = keys(store).create(user.id, new, now).await;
                created.map_err(|error| plain(&error))
            })
            .await?;
            issue(&issued, "made", out, notes)?;
        }
        KeyCommand::List { username } => {
            on_store(config, async |store| {
                let user = match &username {
                    Some(name) => Some(find(&*store.accounts, name).await?),
                    None => None,
                };
                list(store, user.as_ref(), out).await
            })
            .await?;
        }
        KeyCommand::Rotate { id, grace } => {
            let grace = grace.map(|text| {
                let length = humantime::parse_duration(&text);
                length.map_err(|_| anyhow!("--grace: write a length of time such as 24h or 0s"))
            });
            let grace = grace.transpose()?.unwrap_or(DEFAULT_GRACE);
            let issued = on_store(config, async |store| {
                let (keys, now) = (keys(store), Timestamp::now());
                let (user_id, id) = key_named(&keys, &id).await?;
                let rotated = keys.rotate(user_id, id, grace, now).await;
                rotated.map_err(|error| plain(&error))
            })
            .await?;
            issue(&issued, "rotated", out, notes)?;
        }
        KeyCommand::Revoke { id } => {
            on_store(config, async |store| {
                let (keys, now) = (keys(store), Timestamp::now());
                let (user_id, id) = key_named(&keys, &id).await?;
                let revoked = keys.revoke(user_id, id, now).await;
                revoked.map_err(|error| plain(&error))
            })
            .await?;
            writeln!(notes, "revoked; every server refuses it within 2 seconds")?;
        }
    }
    Ok(())
}

fn keys(store: &Store) -> ApiKeys {
    ApiKeys::new(Arc::clone(&store.api_keys), TaskTracker::new())
}

/// Writes a new key, and says of it what is not secret.
fn issue(
    issued: &IssuedApiKey,
    done: &str,
    out: &mut impl Write,
    notes: &mut impl Write,
) -> anyhow::Result<()> {
    writeln!(out, "{}", issued.text.expose())?;
    out.flush()?;
    write!(notes, "{done} key {}; it is not shown again", issued.key.id)?;
    if let Some(until) = issued.previous_until {
        write!(notes, "; the one before works until {until}")?;
    }
    writeln!(notes)?;
    Ok(())
}

/// The owner and the id of the key that the operator names.
async fn key_named(keys: &ApiKeys, id: &str) -> anyhow::Result<(UserId, ApiKeyId)> {
    // Who copies a whole hint or key names it well enough.
    let id = id.strip_prefix("ps_").unwrap_or(id);
    let id = id.get(..ApiKeyId::LENGTH).and_then(ApiKeyId::parse);
    let id = id.context("there is no such key")?;
    match keys.owner(id).await {
        Ok(user_id) => Ok((user_id, id)),
        Err(error) => Err(plain(&error)),
    }
}

/// What went wrong, in words for the operator.
fn plain(error: &Error) -> anyhow::Error {
    match error {
        Error::NotFound => anyhow!("there is no such key"),
        Error::TooManyApiKeys => anyhow!("the user has 100 live keys; revoke one first"),
        Error::InvalidFields(fields) => {
            let lines = fields
                .iter()
                .map(|(name, messages)| format!("{name}: {}", messages.join(" ")));
            anyhow!("{}", lines.collect::<Vec<_>>().join("; "))
        }
        Error::Unavailable(source) | Error::Internal(source) => anyhow!("{error}: {source}"),
        Error::InvalidRequest(_)
        | Error::Unauthenticated(_)
        | Error::Forbidden(_)
        | Error::RateLimited(_)
        | Error::Overloaded(_)
        | Error::Failed(_)
        | Error::IdempotencyKey(_)
        | Error::QuotaExceeded
        | Error::Refused(_)
        | Error::ModelNotFound
        | Error::BudgetExceeded
        | Error::PriceUnknown
        | Error::Scope(_)
        | Error::Deleted => anyhow!("{error}"),
    }
}

fn new_key(arguments: &CreateKeyArgs, now: Timestamp) -> anyhow::Result<NewApiKey> {
    let words = |text: &str| -> Vec<String> { text.split(',').map(str::to_owned).collect() };
    let named = |flag: &'static str| move |problem: &str| anyhow!("{flag}: {problem}");
    let scopes = match &arguments.scopes {
        None => Scopes::default(),
        Some(text) => {
            let words = words(text);
            let scopes = Scopes::parse(words.iter().map(String::as_str));
            scopes.map_err(named("--scopes"))?
        }
    };
    let models = arguments.models.as_deref().map(words).unwrap_or_default();
    let models = parse_models(models.iter().map(String::as_str)).map_err(named("--models"))?;
    let rates: Option<Result<Rates, _>> = arguments.rates.as_ref().map(|text| text.parse());
    let rates = rates.transpose();
    let budget: Option<Result<Budget, String>> =
        arguments.budget_usd.as_ref().map(|text| text.parse());
    let budget = budget.transpose();
    Ok(NewApiKey {
        name: parse_name(&arguments.name).map_err(named("--name"))?,
        scopes,
        models,
        rates: rates.map_err(|error| anyhow!("--rates: {error}"))?,
        budget: budget.map_err(|error| anyhow!("--budget-usd: {error}"))?,
        expires_at: arguments
            .expires
            .as_deref()
            .map(|text| expiry(text, now))
            .transpose()?,
    })
}

/// A time, or a length of time from now on.
fn expiry(text: &str, now: Timestamp) -> anyhow::Result<Timestamp> {
    if let Some(time) = Timestamp::parse_rfc3339(text) {
        return Ok(time);
    }
    match humantime::parse_duration(text) {
        Ok(length) => Ok(now.plus(length)),
        Err(_) => bail!("--expires: write 90d, 12h or 2036-11-22T21:08:49Z"),
    }
}

/// Writes all keys that were not revoked, or those of one user.
async fn list(store: &Store, user: Option<&User>, out: &mut impl Write) -> anyhow::Result<()> {
    if let Some(user) = user {
        for key in store.api_keys.api_keys(user.id).await? {
            line(&key, &user.username, out)?;
        }
        return Ok(());
    }
    let mut after = RecordCursor::ApiKeys(None);
    loop {
        let page = store.bulk.records(after, LIST_PAGE).await?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = last.cursor();
        let live = page.into_iter().filter_map(|record| match record {
            Record::ApiKey(record) => record.revoked_at.is_none().then_some(record.key),
            Record::User(_)
            | Record::Prompt(_)
            | Record::Key(_)
            | Record::UpstreamDay(_)
            | Record::Session(_)
            | Record::RevokedToken(_)
            | Record::Usage(_)
            | Record::UsageDay(_)
            | Record::UserBudget(_) => None,
        });
        let live: Vec<ApiKey> = live.collect();
        let owners: Vec<UserId> = live.iter().map(|key| key.user_id).collect();
        let owners = store.accounts.users(&owners).await?;
        for key in live {
            let owner = owners.iter().find(|user| user.id == key.user_id);
            line(&key, owner.map_or("", |user| &user.username), out)?;
        }
    }
}

/// Id, owner, name, scopes, models, rates, budget, end, last use; `-` where there is none.
fn line(key: &ApiKey, owner: &str, out: &mut impl Write) -> std::io::Result<()> {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let models = (!key.models.is_empty()).then(|| key.models.join(","));
    let columns = [
        key.id.to_string(),
        owner.to_owned(),
        key.name.clone(),
        key.scopes.to_string(),
        or_none(models),
        or_none(key.rates.as_ref().map(ToString::to_string)),
        or_none(key.budget.map(|budget| budget.to_string())),
        or_none(key.expires_at.map(|at| at.to_string())),
        or_none(key.last_used_at.map(|at| at.to_string())),
    ];
    writeln!(out, "{}", columns.join("\t"))
}
