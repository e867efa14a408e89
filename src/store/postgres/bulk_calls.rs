//! What is kept of calls, in bulk: idempotency keys and the days' counts.

use super::error::Cause;
use super::pool::{LONG_PATIENCE, Pool};
use super::{get, sql_limit};
use crate::domain::{PromptId, Timestamp, UserId};
use crate::store::{Error, KeyRecord, UpstreamDay};

pub(super) async fn list_keys(
    pool: &Pool,
    after: Option<(UserId, [u8; 32])>,
    limit: usize,
) -> Result<Vec<KeyRecord>, Error> {
    // No bytes at all sort before any hash.
    let (user, hash) = after.as_ref().map_or((i64::MIN, &[][..]), |(user, hash)| {
        (user.0, hash.as_slice())
    });
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    let rows = connection
        .query(
            "SELECT user_id, key_hash, fingerprint, prompt_id, claimed_at FROM idempotency_key
             WHERE (user_id, key_hash) > ($1, $2) ORDER BY user_id, key_hash LIMIT $3",
            &[&user, &hash, &sql_limit(limit)],
        )
        .await?;
    rows.iter()
        .map(|row| {
            let (hash, fingerprint): (&[u8], &[u8]) = (get(row, 1)?, get(row, 2)?);
            Ok(KeyRecord {
                user_id: UserId(get(row, 0)?),
                key_hash: hash.try_into().map_err(|_| Cause::UnknownValue)?,
                fingerprint: fingerprint.try_into().map_err(|_| Cause::UnknownValue)?,
                prompt_id: PromptId(get(row, 3)?),
                claimed_at: Timestamp(get(row, 4)?),
            })
        })
        .collect()
}

pub(super) async fn put_keys(pool: &Pool, keys: Vec<KeyRecord>) -> Result<(), Error> {
    let users: Vec<i64> = keys.iter().map(|key| key.user_id.0).collect();
    let hashes: Vec<&[u8]> = keys.iter().map(|key| key.key_hash.as_slice()).collect();
    let meant: Vec<&[u8]> = keys.iter().map(|key| key.fingerprint.as_slice()).collect();
    let prompts: Vec<i64> = keys.iter().map(|key| key.prompt_id.0).collect();
    let claimed: Vec<i64> = keys.iter().map(|key| key.claimed_at.0).collect();
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    connection
        .write(
            "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at)
             SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[], $4::bigint[], $5::bigint[])
             ON CONFLICT DO NOTHING",
            &[&users, &hashes, &meant, &prompts, &claimed],
        )
        .await?;
    Ok(())
}

pub(super) async fn list_upstream_days(
    pool: &Pool,
    after: Option<i64>,
    limit: usize,
) -> Result<Vec<UpstreamDay>, Error> {
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    let rows = connection
        .query(
            "SELECT day, calls FROM upstream_day WHERE $1::bigint IS NULL OR day > $1 ORDER BY day LIMIT $2",
            &[&after, &sql_limit(limit)],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(UpstreamDay {
                day: get(row, 0)?,
                calls: get(row, 1)?,
            })
        })
        .collect()
}

pub(super) async fn put_upstream_days(pool: &Pool, days: Vec<UpstreamDay>) -> Result<(), Error> {
    let numbers: Vec<i64> = days.iter().map(|day| day.day).collect();
    let calls: Vec<i64> = days.iter().map(|day| day.calls).collect();
    let mut connection = pool.connection(LONG_PATIENCE).await?;
    connection
        .write(
            "INSERT INTO upstream_day (day, calls)
             SELECT day, max(calls) FROM unnest($1::bigint[], $2::bigint[]) AS row (day, calls) GROUP BY day
             ON CONFLICT (day) DO UPDATE SET calls = greatest(upstream_day.calls, excluded.calls)",
            &[&numbers, &calls],
        )
        .await?;
    Ok(())
}
