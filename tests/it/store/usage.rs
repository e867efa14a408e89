//! Usage, sums and budgets: rows, sums of days and what budgets are checked against are never
//! apart. Prices are small whole numbers of picodollars, so that a case can be read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use prompt_service::domain::{
    ApiKeyId, Budget, FailureCode, Period, Picodollars, PromptId, PromptSource, Record,
    RecordCursor, Spend, Subject, Timestamp, TokenUsage, UsageDay, UsageEntry, UsageGroups,
    UsageOutcome, UsageRecord, UsageSum, UsageTotals, UserBudget, UserId,
};
use prompt_service::store::{Begun, CallBudgets, CallOutcome, Error, Holder, NewCall, UsageFilter};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio::task::JoinSet;

use crate::store::calls::{answered, call, claim, holder, started};
use crate::store::{TestableStore, user};

type Store = Arc<dyn TestableStore>;

const DAY: i64 = 86_400_000_000;
const HELD: Duration = Duration::from_secs(3600);
const OVER: Duration = Duration::ZERO;
/// Of all time.
const ALL: i64 = i64::MIN;

fn key(name: &str) -> ApiKeyId {
    ApiKeyId::parse(name).unwrap()
}

fn a_key() -> ApiKeyId {
    key("AAAAAAAA")
}

/// 1, 10, 100, 1,000 and 10,000 tokens of each kind, for that cost.
fn entry(model: &str, cost: Option<i64>) -> UsageEntry {
    UsageEntry {
        upstream: "primary".to_owned(),
        model_asked: "asked".to_owned(),
        model: model.to_owned(),
        tokens: Some(TokenUsage {
            input: 1,
            cache_read: 10,
            cache_write: 100,
            output: 1_000,
            reasoning: 10_000,
        }),
        cost: cost.map(Picodollars),
        price_version: cost.map(|_| "list 1".into()),
        outcome: UsageOutcome::Answered,
        is_estimated: false,
    }
}

fn used(entries: impl IntoIterator<Item = UsageEntry>) -> CallOutcome {
    CallOutcome {
        usage: entries.into_iter().collect(),
        ..answered()
    }
}

fn budget(amount: i64, period: Period) -> Budget {
    Budget {
        amount: Picodollars(amount),
        period,
    }
}

/// A call that may cost so much, made with a key of that budget.
fn costly(user_id: UserId, most: i64, of_key: Option<Budget>, number: i64) -> NewCall {
    NewCall {
        holder: holder(1, number),
        api_key_id: Some(a_key()),
        budgets: CallBudgets {
            most_cost: Some(Picodollars(most)),
            key: of_key,
            service: None,
        },
        ..call(user_id)
    }
}

async fn spend(store: &dyn TestableStore, subject: Subject, first_day: i64) -> (i64, i64) {
    let Spend { settled, reserved } = store.spend(subject, first_day).await.unwrap();
    (settled.0, reserved.0)
}

async fn records(store: &dyn TestableStore, start: RecordCursor) -> Vec<Record> {
    store.records(start, 1_000_000).await.unwrap()
}

async fn usage_rows(store: &dyn TestableStore) -> Vec<UsageRecord> {
    let rows = records(store, RecordCursor::Usage(None)).await;
    let usage = |record| {
        let Record::Usage(usage) = record else {
            panic!("{record:?}");
        };
        usage
    };
    rows.into_iter().map(usage).collect()
}

async fn usage_days(store: &dyn TestableStore) -> Vec<UsageDay> {
    let rows = records(store, RecordCursor::UsageDays(None)).await;
    let day = |record| {
        let Record::UsageDay(day) = record else {
            panic!("{record:?}");
        };
        day
    };
    rows.into_iter().map(day).collect()
}

/// Rows, sums and counters say the same. `reserved`: what the calls that run have reserved.
async fn assert_balanced(store: &dyn TestableStore, reserved: i64) {
    let rows = usage_rows(store).await;
    let mut sums: BTreeMap<_, UsageTotals> = BTreeMap::new();
    let mut spent: BTreeMap<(&str, String, i64), i64> = BTreeMap::new();
    for row in &rows {
        let day = row.begun_at.unix_day();
        let group = (row.user_id, day, row.api_key_id, row.entry.model.clone());
        sums.entry(group).or_default().add(&row.entry);
        let cost = row.entry.cost.unwrap_or_default().0;
        let subjects = [Subject::Service, Subject::User(row.user_id)];
        for subject in subjects.into_iter().chain(row.api_key_id.map(Subject::Key)) {
            for day in [day, ALL] {
                *spent
                    .entry((subject.kind(), subject.id(), day))
                    .or_default() += cost;
            }
        }
    }
    let days = usage_days(store).await;
    let stored: BTreeMap<_, UsageTotals> = days
        .into_iter()
        .map(|day| {
            (
                (day.user_id, day.day, day.api_key_id, day.model),
                day.totals,
            )
        })
        .collect();
    assert_eq!(stored, sums);
    for ((kind, id, day), cost) in spent {
        let subject = match kind {
            "service" => Subject::Service,
            "user" => Subject::User(UserId(id.parse().unwrap())),
            _ => Subject::Key(key(&id)),
        };
        let first = store.spend(subject, day).await.unwrap().settled;
        let after = if day == ALL {
            Picodollars(0)
        } else {
            store.spend(subject, day + 1).await.unwrap().settled
        };
        assert_eq!(first.0 - after.0, cost, "{kind} {id} on {day}");
    }
    assert_eq!(spend(store, Subject::Service, ALL).await.1, reserved);
}

pub async fn what_a_call_used_is_stored_with_its_outcome(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let new = NewCall {
        api_key_id: Some(a_key()),
        source: PromptSource::V1,
        created_at: Timestamp(3 * DAY + 7),
        ..call(alice)
    };
    let id = started(&*store, new).await.id;
    let unknown = UsageEntry {
        tokens: None,
        outcome: UsageOutcome::Failed,
        is_estimated: true,
        ..entry("b", None)
    };
    let entries = [entry("a", Some(5)), unknown];
    let outcome = used(entries.clone());
    store
        .settle_call(id, holder(1, 1), outcome.clone())
        .await
        .unwrap()
        .unwrap();
    // Of all attempts to settle only one counts.
    let again = store.settle_call(id, holder(1, 1), outcome).await;
    assert_eq!(again.unwrap(), None);
    let rows = usage_rows(&*store).await;
    assert_eq!(rows.len(), 2);
    for (row, entry) in rows.iter().zip(entries) {
        let expected = UsageRecord {
            id: row.id,
            user_id: alice,
            api_key_id: Some(a_key()),
            prompt_id: id,
            source: PromptSource::V1,
            begun_at: Timestamp(3 * DAY + 7),
            entry,
        };
        assert_eq!(*row, expected);
    }
    assert!(rows[0].id < rows[1].id);
    assert_eq!(spend(&*store, Subject::User(alice), 3).await, (5, 0));
    assert_eq!(spend(&*store, Subject::User(alice), 4).await, (0, 0));
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (5, 0));
    assert_eq!(spend(&*store, Subject::Key(a_key()), ALL).await, (5, 0));
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (0, 0));
}

pub async fn the_cost_of_a_prompt_is_read_back(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let id = started(&*store, call(alice)).await.id;
    let mut outcome = used([entry("a", Some(5))]);
    outcome.details.cost = Some(Picodollars(5));
    let settled = store.settle_call(id, holder(1, 1), outcome).await.unwrap();
    assert_eq!(settled.unwrap().call.cost, Some(Picodollars(5)));
    let read = store.prompt(alice, id).await.unwrap().unwrap();
    assert_eq!(read.call.cost, Some(Picodollars(5)));
    let listed = store.list_prompts(alice, None, 9, usize::MAX).await;
    assert_eq!(listed.unwrap().prompts, [read]);
}

pub async fn usage_is_summed_by_any_groups(store: Store) {
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    let calls = [
        (alice, Some(a_key()), 0, "a", Some(1)),
        (alice, Some(a_key()), 0, "a", Some(2)),
        (alice, None, 0, "b", None),
        (alice, None, 1, "a", Some(4)),
        (bob, None, 1, "a", Some(8)),
    ];
    for (user_id, api_key_id, day, model, cost) in calls {
        let new = NewCall {
            api_key_id,
            created_at: Timestamp(day * DAY),
            ..call(user_id)
        };
        let id = started(&*store, new).await.id;
        let outcome = used([entry(model, cost)]);
        store
            .settle_call(id, holder(1, 1), outcome)
            .await
            .unwrap()
            .unwrap();
    }
    let all = UsageFilter {
        user_id: None,
        from: 0,
        to: 9,
    };
    let sums = async |filter, groups| store.usage(filter, groups, 99).await.unwrap();
    let costs =
        |sums: &[UsageSum]| -> Vec<i64> { sums.iter().map(|sum| sum.totals.cost.0).collect() };
    let nothing = UsageGroups::default();
    let whole = sums(all, nothing).await;
    assert_eq!(whole.len(), 1);
    assert_eq!(whole[0].totals.attempts, 5);
    assert_eq!(whole[0].totals.unpriced, 1);
    assert_eq!(whole[0].totals.cost, Picodollars(15));
    assert_eq!(whole[0].totals.tokens.reasoning, 50_000);
    assert_eq!((whole[0].day, whole[0].user_id), (None, None));
    let by_day = UsageGroups {
        by_day: true,
        ..nothing
    };
    let days = sums(all, by_day).await;
    assert_eq!(
        days.iter().map(|sum| sum.day).collect::<Vec<_>>(),
        [Some(0), Some(1)]
    );
    assert_eq!(costs(&days), [3, 12]);
    let by_key = UsageGroups {
        by_key: true,
        by_model: true,
        ..nothing
    };
    let of_alice = UsageFilter {
        user_id: Some(alice),
        ..all
    };
    let keys = sums(of_alice, by_key).await;
    let shown: Vec<_> = keys
        .iter()
        .map(|sum| (sum.api_key_id, sum.model.as_deref(), sum.totals.cost.0))
        .collect();
    assert_eq!(
        shown,
        [
            (Some(None), Some("a"), 4),
            (Some(None), Some("b"), 0),
            (Some(Some(a_key())), Some("a"), 3),
        ]
    );
    let by_user = UsageGroups {
        by_user: true,
        ..nothing
    };
    assert_eq!(costs(&sums(all, by_user).await), [7, 8]);
    assert_eq!(store.usage(all, by_user, 1).await.unwrap().len(), 1);
    let later = UsageFilter { from: 1, ..all };
    assert_eq!(costs(&sums(later, by_user).await), [4, 8]);
    let none = UsageFilter { from: 5, ..all };
    assert_eq!(sums(none, nothing).await, []);
}

pub async fn sums_of_costs_stay_at_their_bound(store: Store) {
    const BOUND: i64 = 9_000_000_000_000_000_000;
    let (alice, bob) = (
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    );
    let all = UsageFilter {
        user_id: None,
        from: 0,
        to: 9,
    };
    let sums = async |user_id| {
        let filter = UsageFilter { user_id, ..all };
        let sums = store.usage(filter, UsageGroups::default(), 9).await;
        sums.unwrap()[0].totals.cost.0
    };
    let paid = async |user_id, day, costs: &[i64]| {
        let new = NewCall {
            api_key_id: Some(a_key()),
            created_at: Timestamp(day * DAY),
            ..call(user_id)
        };
        let id = started(&*store, new).await.id;
        let outcome = used(costs.iter().map(|cost| entry("a", Some(*cost))));
        let settled = store.settle_call(id, holder(1, 1), outcome).await;
        assert!(settled.unwrap().is_some());
    };
    // Exact below the bound, where a floating number would not be.
    paid(alice, 0, &[BOUND - 1_000_000_007]).await;
    paid(alice, 1, &[1_000_000_006]).await;
    assert_eq!(sums(Some(alice)).await, BOUND - 1);
    for first_day in [0, ALL] {
        let spent = spend(&*store, Subject::User(alice), first_day).await;
        assert_eq!(spent, (BOUND - 1, 0));
    }
    store.track_service(true).await.unwrap();
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (BOUND - 1, 0));

    for user_id in [alice, bob] {
        paid(user_id, 0, &[i64::MAX, i64::MAX]).await;
        paid(user_id, 1, &[i64::MAX]).await;
        // What comes later is stored as well.
        paid(user_id, 1, &[5]).await;
        assert_eq!(sums(Some(user_id)).await, BOUND);
    }
    assert_eq!(sums(None).await, BOUND);
    for is_tracked in [false, true] {
        // First as it was kept, then as it is made anew.
        if is_tracked {
            store.track_service(true).await.unwrap();
        }
        for subject in [
            Subject::User(alice),
            Subject::User(bob),
            Subject::Key(a_key()),
            Subject::Service,
        ] {
            for first_day in [0, 1, ALL] {
                let spent = spend(&*store, subject, first_day).await;
                assert_eq!(spent, (BOUND, 0), "{subject:?} from {first_day}");
            }
        }
    }
    // The rows keep what each attempt cost.
    let rows = usage_rows(&*store).await;
    let highest = rows.iter().filter_map(|row| row.entry.cost).max();
    assert_eq!(highest, Some(Picodollars(i64::MAX)));
    // A budget is used up, and nothing fails.
    let refused = store.begin_call(NewCall {
        created_at: Timestamp(DAY),
        ..costly(alice, 1, Some(budget(1, Period::Total)), 2)
    });
    let refused = refused.await;
    assert!(matches!(refused, Err(Error::BudgetExceeded)), "{refused:?}");
}

pub async fn a_users_budget_is_set_changed_and_taken_away(store: Store) {
    let alice = user(&*store, "alice").await.id;
    assert_eq!(store.user_budget(alice).await.unwrap(), None);
    for next in [
        Some(budget(5, Period::Month)),
        Some(budget(7, Period::Total)),
        None,
        None,
    ] {
        assert!(store.set_user_budget(alice, next).await.unwrap());
        assert_eq!(store.user_budget(alice).await.unwrap(), next);
    }
    let nobody = UserId(alice.0 + 1);
    let given = store.set_user_budget(nobody, Some(budget(5, Period::Day)));
    assert!(!given.await.unwrap());
    assert!(!store.set_user_budget(nobody, None).await.unwrap());
}

pub async fn a_call_that_may_pass_a_budget_is_refused_and_stores_nothing(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let of_key = Some(budget(10, Period::Day));
    let first = started(&*store, costly(alice, 6, of_key, 1)).await.id;
    assert_eq!(spend(&*store, Subject::Key(a_key()), 0).await, (0, 6));
    let refused = store.begin_call(costly(alice, 5, of_key, 2)).await;
    assert!(matches!(refused, Err(Error::BudgetExceeded)), "{refused:?}");
    let second = started(&*store, costly(alice, 4, of_key, 3)).await.id;
    assert_eq!(spend(&*store, Subject::Key(a_key()), 0).await, (0, 10));
    assert_eq!(crate::store::newest(&*store, alice, 9).await.len(), 2);
    // What was not used is free again.
    let cheap = used([entry("a", Some(1))]);
    store
        .settle_call(first, holder(1, 1), cheap)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(spend(&*store, Subject::Key(a_key()), 0).await, (1, 4));
    started(&*store, costly(alice, 5, of_key, 4)).await;
    let refused = store.begin_call(costly(alice, 1, of_key, 5)).await;
    assert!(matches!(refused, Err(Error::BudgetExceeded)), "{refused:?}");
    // A call of another day has another period, and a free one fits always.
    let tomorrow = NewCall {
        created_at: Timestamp(DAY),
        ..costly(alice, 10, of_key, 6)
    };
    started(&*store, tomorrow).await;
    started(&*store, costly(alice, 0, of_key, 7)).await;
    let failed = CallOutcome::failed(FailureCode::UpstreamFailed);
    store
        .settle_call(second, holder(1, 3), failed)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(spend(&*store, Subject::Key(a_key()), 0).await, (1, 15));
}

pub async fn every_budget_in_force_has_to_have_room(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let wide = Some(budget(100, Period::Total));
    let narrow = Some(budget(5, Period::Total));
    let new = |of_key, service, number| NewCall {
        budgets: CallBudgets {
            most_cost: Some(Picodollars(6)),
            key: of_key,
            service,
        },
        ..costly(alice, 6, None, number)
    };
    let is_refused = async |call| {
        let begun = store.begin_call(call).await;
        match begun {
            Ok(Begun::Started(_)) => false,
            Err(Error::BudgetExceeded) => true,
            other => panic!("{other:?}"),
        }
    };
    assert!(is_refused(new(narrow, None, 1)).await);
    assert!(is_refused(new(wide, narrow, 2)).await);
    store.set_user_budget(alice, narrow).await.unwrap();
    assert!(is_refused(new(None, None, 3)).await);
    assert!(is_refused(new(wide, wide, 4)).await);
    store.set_user_budget(alice, wide).await.unwrap();
    assert!(!is_refused(new(wide, wide, 5)).await);
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (0, 6));
    // A key's budget is nothing for calls without the key.
    let without = NewCall {
        api_key_id: None,
        ..new(narrow, None, 6)
    };
    assert!(!is_refused(without).await);
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (0, 12));
    assert_eq!(spend(&*store, Subject::Key(a_key()), ALL).await, (0, 6));
}

pub async fn with_a_budget_in_force_the_most_has_to_be_known(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let unknown = |of_key, number| NewCall {
        budgets: CallBudgets {
            most_cost: None,
            key: of_key,
            service: None,
        },
        ..costly(alice, 0, None, number)
    };
    started(&*store, unknown(None, 1)).await;
    let refused = store
        .begin_call(unknown(Some(budget(9, Period::Day)), 2))
        .await;
    assert!(matches!(refused, Err(Error::PriceUnknown)), "{refused:?}");
    let of_user = Some(budget(9, Period::Day));
    store.set_user_budget(alice, of_user).await.unwrap();
    let refused = store.begin_call(unknown(None, 3)).await;
    assert!(matches!(refused, Err(Error::PriceUnknown)), "{refused:?}");
}

pub async fn an_expired_call_frees_its_reservation_and_has_a_row(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let of_key = Some(budget(10, Period::Month));
    let new = NewCall {
        lease: OVER,
        ..costly(alice, 10, of_key, 1)
    };
    let id = started(&*store, new).await.id;
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (0, 10));
    assert_eq!(store.expire_calls(9, &[]).await.unwrap().len(), 1);
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (0, 0));
    let rows = usage_rows(&*store).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].entry, UsageEntry::interrupted("asked"));
    assert_eq!((rows[0].prompt_id, rows[0].api_key_id), (id, Some(a_key())));
    // Its holder comes too late.
    let late = used([entry("a", Some(3))]);
    let settled = store.settle_call(id, holder(1, 1), late).await;
    assert_eq!(settled.unwrap(), None);
    assert_eq!(usage_rows(&*store).await.len(), 1);
    started(&*store, costly(alice, 10, of_key, 2)).await;
}

pub async fn a_call_whose_prompt_was_deleted_is_metered_all_the_same(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let of_key = Some(budget(10, Period::Month));
    for (number, lease) in [(1, HELD), (2, OVER)] {
        let new = NewCall {
            lease,
            ..costly(alice, 5, of_key, number)
        };
        let id = started(&*store, new).await.id;
        assert!(store.delete_prompt(alice, id).await.unwrap().is_some());
        if lease == HELD {
            let outcome = used([entry("a", Some(3))]);
            let settled = store.settle_call(id, holder(1, number), outcome).await;
            assert_eq!(settled.unwrap(), None);
        } else {
            // Nobody is told of it, but its reservation ends.
            assert_eq!(store.expire_calls(9, &[]).await.unwrap(), []);
        }
    }
    let costs: Vec<_> = usage_rows(&*store)
        .await
        .into_iter()
        .map(|row| (row.entry.cost, row.entry.outcome))
        .collect();
    assert_eq!(
        costs,
        [
            (Some(Picodollars(3)), UsageOutcome::Answered),
            (None, UsageOutcome::Interrupted),
        ]
    );
    assert_eq!(spend(&*store, Subject::Key(a_key()), ALL).await, (3, 0));
}

pub async fn a_call_that_is_not_kept_is_metered_all_the_same(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let of_key = Some(budget(10, Period::Month));
    for (number, lease) in [(1, HELD), (2, OVER)] {
        let new = NewCall {
            lease,
            is_kept: false,
            ..costly(alice, 5, of_key, number)
        };
        let id = started(&*store, new).await.id;
        if lease == HELD {
            let outcome = CallOutcome {
                is_kept: false,
                ..used([entry("a", Some(3))])
            };
            let settled = store.settle_call(id, holder(1, number), outcome).await;
            assert!(settled.unwrap().is_some());
        } else {
            assert_eq!(store.expire_calls(9, &[]).await.unwrap(), []);
        }
    }
    assert_eq!(usage_rows(&*store).await.len(), 2);
    assert_eq!(spend(&*store, Subject::Key(a_key()), ALL).await, (3, 0));
    assert_eq!(crate::store::newest(&*store, alice, 9).await, []);
}

pub async fn a_call_that_takes_a_row_over_reserves_anew(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let of_key = Some(budget(10, Period::Month));
    let new = |lease, number| NewCall {
        lease,
        key: Some(claim(1, 1)),
        ..costly(alice, 10, of_key, number)
    };
    let first = started(&*store, new(OVER, 1)).await.id;
    let second = started(&*store, new(HELD, 2)).await.id;
    assert_eq!(first, second);
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (0, 10));
    assert_eq!(usage_rows(&*store).await.len(), 1);
    let outcome = used([entry("a", Some(4))]);
    store
        .settle_call(second, holder(1, 2), outcome)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (4, 0));
    // A known key reserves nothing.
    let known = store.begin_call(new(HELD, 3)).await.unwrap();
    assert!(matches!(known, Begun::Known(_)));
    assert_eq!(spend(&*store, Subject::User(alice), ALL).await, (4, 0));
}

pub async fn the_service_is_tracked_from_what_its_users_have_spent(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let of_key = Some(budget(100, Period::Month));
    let first = started(&*store, costly(alice, 9, of_key, 1)).await.id;
    let outcome = used([entry("a", Some(4))]);
    store
        .settle_call(first, holder(1, 1), outcome.clone())
        .await
        .unwrap()
        .unwrap();
    let second = started(&*store, costly(alice, 7, of_key, 2)).await.id;
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (0, 0));
    store.track_service(true).await.unwrap();
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (4, 7));
    assert_eq!(spend(&*store, Subject::Service, 0).await, (4, 7));
    store
        .settle_call(second, holder(1, 2), outcome)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (8, 0));
    store.track_service(true).await.unwrap();
    assert_eq!(spend(&*store, Subject::Service, 0).await, (8, 0));
    store.track_service(false).await.unwrap();
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (0, 0));
    // A budget of the service that nobody has begun to track is tracked from then on.
    let new = NewCall {
        budgets: CallBudgets {
            most_cost: Some(Picodollars(2)),
            key: None,
            service: Some(budget(10, Period::Total)),
        },
        ..costly(alice, 2, None, 3)
    };
    started(&*store, new.clone()).await;
    assert_eq!(spend(&*store, Subject::Service, ALL).await, (8, 2));
    let refused = store.begin_call(new).await;
    assert!(matches!(refused, Err(Error::BudgetExceeded)), "{refused:?}");
}

pub async fn usage_and_budgets_are_put_once_with_what_budgets_are_checked_against(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let usage = UsageRecord {
        id: 70,
        user_id: alice,
        api_key_id: Some(a_key()),
        prompt_id: PromptId(3),
        source: PromptSource::V1,
        begun_at: Timestamp(2 * DAY),
        entry: entry("a", Some(5)),
    };
    let interrupted = UsageRecord {
        id: 71,
        api_key_id: None,
        entry: UsageEntry::interrupted("a"),
        ..usage.clone()
    };
    let mut totals = UsageTotals::default();
    totals.add(&usage.entry);
    let day = UsageDay {
        user_id: alice,
        day: 2,
        api_key_id: Some(a_key()),
        model: "a".to_owned(),
        totals,
    };
    let mut nothing = UsageTotals::default();
    nothing.add(&interrupted.entry);
    let other_day = UsageDay {
        api_key_id: None,
        totals: nothing,
        ..day.clone()
    };
    let of_alice = UserBudget {
        user_id: alice,
        budget: budget(9, Period::Week),
    };
    let all = vec![
        Record::Usage(usage),
        Record::Usage(interrupted),
        Record::UsageDay(other_day),
        Record::UsageDay(day),
        Record::UserBudget(of_alice),
    ];
    for _ in 0..2 {
        store.put(all.clone()).await.unwrap();
        let mut stored = records(&*store, RecordCursor::Usage(None)).await;
        stored.extend(records(&*store, RecordCursor::UsageDays(None)).await);
        stored.extend(records(&*store, RecordCursor::UserBudgets(None)).await);
        assert_eq!(stored, all);
        assert_eq!(spend(&*store, Subject::User(alice), 2).await, (5, 0));
        assert_eq!(spend(&*store, Subject::Key(a_key()), ALL).await, (5, 0));
    }
    // Pages go on where they ended.
    for record in &all {
        let rest = store.records(record.cursor(), 9).await.unwrap();
        assert!(!rest.contains(record), "{record:?}");
    }
    // Ids given out later are above those that were put.
    let id = started(&*store, costly(alice, 1, None, 1)).await.id;
    store
        .settle_call(id, holder(1, 1), used([entry("a", Some(1))]))
        .await
        .unwrap()
        .unwrap();
    let newest = usage_rows(&*store).await.pop().unwrap();
    assert!(newest.id > 71);
    assert_balanced_without_service(&*store).await;
}

async fn assert_balanced_without_service(store: &dyn TestableStore) {
    store.track_service(true).await.unwrap();
    assert_balanced(store, 0).await;
}

pub async fn racing_calls_never_pass_a_budget(store: Store) {
    const CALLS: i64 = 64;
    const SERVED: usize = 9;
    let alice = user(&*store, "alice").await.id;
    // Room for nine calls and a rest that is no room for another.
    let limit = budget(9 * 10 + 9, Period::Month);
    store.track_service(true).await.unwrap();
    for round in 0..3 {
        let (of_key, of_user, service) = match round {
            0 => (Some(limit), None, None),
            1 => (None, Some(limit), None),
            _ => (None, None, Some(limit)),
        };
        let id = key(["KKKKKKK1", "KKKKKKK2", "KKKKKKK3"][round]);
        let user_id = match round {
            0 => alice,
            1 => user(&*store, "bob").await.id,
            _ => user(&*store, "carol").await.id,
        };
        store.set_user_budget(user_id, of_user).await.unwrap();
        // A month of its own, so that the service has spent nothing in it.
        let created_at = Timestamp(40 * DAY * round as i64);
        let mut tasks = JoinSet::new();
        for number in 0..CALLS {
            let new = NewCall {
                created_at,
                api_key_id: Some(id),
                budgets: CallBudgets {
                    most_cost: Some(Picodollars(10)),
                    key: of_key,
                    service,
                },
                ..costly(user_id, 10, None, number)
            };
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                match store.begin_call(new).await {
                    Ok(Begun::Started(prompt)) => Some((prompt.id, holder(1, number))),
                    Err(Error::BudgetExceeded) => None,
                    other => panic!("{other:?}"),
                }
            });
        }
        let served: Vec<(PromptId, Holder)> =
            tasks.join_all().await.into_iter().flatten().collect();
        assert_eq!(served.len(), SERVED, "round {round}");
        assert_eq!(spend(&*store, Subject::User(user_id), ALL).await, (0, 90));
        let mut tasks = JoinSet::new();
        for (prompt, holder) in served {
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                let outcome = used([entry("a", Some(10))]);
                let settled = store.settle_call(prompt, holder, outcome).await;
                assert!(settled.unwrap().is_some());
            });
        }
        tasks.join_all().await;
        assert_eq!(spend(&*store, Subject::User(user_id), ALL).await, (90, 0));
    }
    assert_balanced(&*store, 0).await;
}

/// What is done to the calls of a few users.
#[derive(Clone, Debug)]
enum Step {
    Begin {
        user: usize,
        key: Option<usize>,
        day: i64,
        most: i64,
        is_over: bool,
        retried: Option<u8>,
    },
    Settle {
        which: usize,
        costs: Vec<Option<i64>>,
    },
    Delete {
        which: usize,
    },
    Expire,
}

fn step() -> impl Strategy<Value = Step> {
    let begin = (
        0..2_usize,
        proptest::option::of(0..2_usize),
        0..40_i64,
        0..30_i64,
        any::<bool>(),
        proptest::option::of(0..3_u8),
    );
    let begin = begin.prop_map(|(user, key, day, most, is_over, retried)| Step::Begin {
        user,
        key,
        day,
        most,
        is_over,
        retried,
    });
    let costs = proptest::collection::vec(proptest::option::of(0..20_i64), 0..3);
    prop_oneof![
        4 => begin,
        4 => (any::<usize>(), costs).prop_map(|(which, costs)| Step::Settle { which, costs }),
        1 => any::<usize>().prop_map(|which| Step::Delete { which }),
        1 => Just(Step::Expire),
    ]
}

/// Numbers of calls, for all tasks of a case.
struct Steps {
    store: Store,
    users: [UserId; 2],
    numbers: AtomicI64,
}

impl Steps {
    /// Takes the steps one after another. Returns the calls that may still run.
    async fn take(&self, steps: Vec<Step>) {
        let keys = [key("KKKKKKK1"), key("KKKKKKK2")];
        let mut calls: Vec<(UserId, PromptId, Holder)> = Vec::new();
        for step in steps {
            match step {
                Step::Begin {
                    user,
                    key,
                    day,
                    most,
                    is_over,
                    retried,
                } => {
                    let holder = holder(7, self.numbers.fetch_add(1, Ordering::Relaxed));
                    let limit = Some(budget(60, Period::Month));
                    let new = NewCall {
                        holder,
                        lease: if is_over { OVER } else { HELD },
                        created_at: Timestamp(day * DAY),
                        key: retried.map(|number| claim(number, number)),
                        api_key_id: key.map(|key| keys[key]),
                        budgets: CallBudgets {
                            most_cost: Some(Picodollars(most)),
                            key: limit,
                            service: (most % 2 == 0).then_some(budget(150, Period::Month)),
                        },
                        ..call(self.users[user])
                    };
                    match self.store.begin_call(new).await {
                        Ok(Begun::Started(prompt)) => {
                            calls.push((self.users[user], prompt.id, holder))
                        }
                        Ok(Begun::Known(_)) | Err(Error::BudgetExceeded) => {}
                        other => panic!("{other:?}"),
                    }
                }
                Step::Settle { which, costs } => {
                    let Some((_, id, holder)) = pick(&calls, which) else {
                        continue;
                    };
                    let entries = costs.iter().map(|cost| entry("a", *cost));
                    self.store
                        .settle_call(id, holder, used(entries))
                        .await
                        .unwrap();
                }
                Step::Delete { which } => {
                    if let Some((user, id, _)) = pick(&calls, which) {
                        self.store.delete_prompt(user, id).await.unwrap();
                    }
                }
                Step::Expire => {
                    self.store.expire_calls(3, &[]).await.unwrap();
                }
            }
        }
        // Nothing runs any more: each call is over, one way or another.
        for (_, id, holder) in calls {
            let end = used([entry("b", Some(1))]);
            self.store.settle_call(id, holder, end).await.unwrap();
        }
    }
}

fn pick<T: Copy>(list: &[T], which: usize) -> Option<T> {
    (!list.is_empty()).then(|| list[which % list.len()])
}

/// Lists of steps; a failure prints them.
fn random_steps(runner: &mut TestRunner, length: usize) -> Vec<Step> {
    let steps = proptest::collection::vec(step(), length);
    steps.new_tree(runner).unwrap().current()
}

pub async fn random_calls_keep_rows_sums_and_counters_equal(store: Store) {
    const ROUNDS: usize = 6;
    const TASKS: usize = 4;
    let users = [
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    ];
    store.track_service(true).await.unwrap();
    let limit = Some(budget(100, Period::Week));
    store.set_user_budget(users[0], limit).await.unwrap();
    let steps = Arc::new(Steps {
        store: Arc::clone(&store),
        users,
        numbers: AtomicI64::new(1),
    });
    let mut runner = TestRunner::default();
    for round in 0..ROUNDS {
        // First alone, then against each other.
        let tasks = if round % 2 == 0 { 1 } else { TASKS };
        let lists: Vec<Vec<Step>> = (0..tasks).map(|_| random_steps(&mut runner, 25)).collect();
        let shown = format!("{lists:?}");
        let mut running = JoinSet::new();
        for list in lists {
            let steps = Arc::clone(&steps);
            running.spawn(async move { steps.take(list).await });
        }
        while let Some(done) = running.join_next().await {
            done.unwrap_or_else(|error| panic!("{error}: {shown}"));
        }
        while !store.expire_calls(99, &[]).await.unwrap().is_empty() {}
        assert_balanced(&*store, 0).await;
        for subject in [Subject::User(users[0]), Subject::User(users[1])] {
            assert_eq!(spend(&*store, subject, ALL).await.1, 0, "{shown}");
        }
    }
}
