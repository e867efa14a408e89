//! The operator's command that prints what calls used and cost.

use std::collections::HashMap;
use std::io::Write;

use anyhow::bail;

use super::store::Store;
use super::users::on_store;
use crate::cli::UsageArgs;
use crate::config::Config;
use crate::domain::usage::{day_text, parse_day};
use crate::domain::{Timestamp, UsageGroups, UsageSum, UserId};
use crate::store::UsageFilter;

/// The days that are summed up if nothing else is asked for.
const USUAL_DAYS: i64 = 30;

/// Prints the sums, a line for each group, separated by tabs.
///
/// # Errors
/// One line that names the problem.
pub async fn run(
    arguments: UsageArgs,
    config: &Config,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let today = Timestamp::now().unix_day();
    let to = day("--to", arguments.to.as_deref())?.unwrap_or(today);
    let usual = to.saturating_sub(USUAL_DAYS - 1).max(0);
    let from = day("--from", arguments.from.as_deref())?.unwrap_or(usual);
    let groups = groups(&arguments.by)?;
    on_store(config, async |store| {
        let filter = UsageFilter {
            user_id: None,
            from,
            to,
        };
        let sums = store.usage.usage(filter, groups, usize::MAX).await?;
        let names = names(store, &sums).await?;
        writeln!(
            out,
            "day\tuser\tkey\tmodel\tattempts\tinput\tcache_read\tcache_write\toutput\treasoning\tcost_usd\tunpriced"
        )?;
        for sum in &sums {
            let (totals, tokens) = (&sum.totals, &sum.totals.tokens);
            let user = sum.user_id.map(|id| names.get(&id).cloned().unwrap_or_else(|| id.to_string()));
            let key = match sum.api_key_id {
                Some(Some(id)) => id.to_string(),
                Some(None) => "none".to_owned(),
                None => "-".to_owned(),
            };
            writeln!(
                out,
                "{}\t{}\t{key}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
                sum.day.map_or_else(|| "-".to_owned(), day_text),
                user.as_deref().unwrap_or("-"),
                sum.model.as_deref().unwrap_or("-"),
                totals.attempts,
                tokens.input,
                tokens.cache_read,
                tokens.cache_write,
                tokens.output,
                tokens.reasoning,
                totals.cost,
                totals.unpriced,
            )?;
        }
        Ok(out.flush()?)
    })
    .await
}

fn day(flag: &str, text: Option<&str>) -> anyhow::Result<Option<i64>> {
    let Some(text) = text else {
        return Ok(None);
    };
    match parse_day(text) {
        Some(day) => Ok(Some(day)),
        None => bail!("{flag}: a day is written as 2026-11-30"),
    }
}

fn groups(words: &[String]) -> anyhow::Result<UsageGroups> {
    let mut groups = UsageGroups::default();
    for word in words {
        match word.as_str() {
            "day" => groups.by_day = true,
            "user" => groups.by_user = true,
            "key" => groups.by_key = true,
            "model" => groups.by_model = true,
            _ => bail!("--by: one or more of day, user, key and model, separated by commas"),
        }
    }
    Ok(groups)
}

/// The names of the users in the sums.
async fn names(store: &Store, sums: &[UsageSum]) -> anyhow::Result<HashMap<UserId, String>> {
    let mut ids: Vec<UserId> = sums.iter().filter_map(|sum| sum.user_id).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut names = HashMap::new();
    for page in ids.chunks(500) {
        let users = store.accounts.users(page).await?;
        names.extend(users.into_iter().map(|user| (user.id, user.username)));
    }
    Ok(names)
}
