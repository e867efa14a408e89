//! The store's contract, sentence by sentence, for any backend; and what only SQLite promises.

/// Runs every case on a backend. `$open` is an `async fn() -> (Arc<dyn TestableStore>, impl Any)`.
/// It returns an empty store, and a value that must live as long as the store.
macro_rules! conformance_suite {
    ($open:path) => {
        conformance_suite! { @cases $open;
            accounts:
                an_account_is_made_active_and_read_back,
                a_taken_username_is_refused_and_changes_nothing,
                usernames_are_compared_byte_by_byte,
                an_absent_account_is_none,
                several_accounts_are_read_at_once,
                accounts_are_listed_by_rising_id_in_pages,
                disabling_moves_tokens_valid_from_and_deletes_sessions,
                enabling_keeps_tokens_valid_from_and_sessions,
                tokens_valid_from_never_goes_back,
                a_new_password_ends_sessions_and_tokens,
                changing_an_absent_account_returns_false,
                a_hash_upgrade_keeps_sessions_and_tokens,
                a_hash_upgrade_of_a_changed_hash_does_nothing,
                a_session_is_read_back_even_when_expired,
                a_session_of_an_unknown_account_is_refused,
                stored_sessions_are_distinguished_from_others,
                a_session_beyond_the_limit_ends_the_oldest,
                logging_out_deletes_the_session_and_remembers_the_token,
                logging_out_twice_or_of_nothing_is_no_error,
                purging_forgets_what_expired_at_or_before_the_horizon,
                the_horizon_of_the_purge_goes_forward_by_steps_and_back_at_once,
                odd_texts_come_back_as_they_were;
            api_keys:
                a_key_is_read_back_whole,
                a_key_of_an_unknown_account_or_a_taken_id_is_refused,
                keys_are_listed_newest_first_and_only_the_users,
                a_revoked_key_keeps_its_row_and_is_absent_otherwise,
                a_change_replaces_what_it_names,
                a_rotation_keeps_the_last_secret_alone_for_its_grace,
                a_user_has_no_more_live_keys_than_allowed,
                expired_keys_beyond_the_limit_are_revoked,
                a_use_is_noted_once_a_minute,
                racing_creators_stop_at_the_limit_of_keys,
                racing_uses_of_a_key_are_noted_once,
                keys_are_put_and_listed_whole_by_rising_bytes_of_the_id;
            prompts:
                a_completed_prompt_is_read_back,
                a_failed_prompt_is_read_back_and_has_no_vector,
                a_prompt_of_an_unknown_user_stores_nothing,
                another_users_prompt_is_absent,
                prompts_are_listed_newest_first_in_pages,
                a_page_ends_before_its_texts_are_too_long,
                of_several_prompts_the_first_come_whole_and_of_the_rest_the_size,
                several_prompts_are_read_at_once_and_only_the_owners,
                deleting_removes_the_prompt_and_its_vector,
                ids_are_not_reused_after_deletion,
                vectors_come_in_order_and_in_pages,
                vectors_of_one_owner_ignore_a_cursor_in_anothers_rows,
                vectors_of_other_models_are_left_out,
                vectors_come_back_in_their_stored_form,
                a_vector_of_another_length_is_refused_and_changes_nothing,
                coverage_follows_inserts_deletes_and_replacements,
                unembedded_prompts_come_by_rising_id_in_pages,
                late_vectors_replace_and_pass_over_the_gone_and_the_failed,
                a_user_keeps_no_more_prompts_than_allowed,
                a_ping_is_answered;
            calls:
                a_begun_call_is_a_running_prompt,
                a_call_of_an_unknown_user_stores_nothing,
                a_call_is_settled_once_and_only_by_its_holder,
                a_failed_call_has_no_vector_and_releases_its_key,
                a_known_key_is_returned_and_nothing_changes,
                keys_of_different_users_are_independent,
                an_expired_call_fails_once_and_is_returned_with_its_announcement,
                a_renewed_lease_does_not_expire,
                a_spared_call_does_not_expire_and_others_do,
                leases_of_others_are_not_renewed,
                a_key_takes_over_its_expired_row,
                a_key_takes_over_an_expired_row_before_it_is_ended,
                an_expired_row_is_not_taken_over_by_another_request,
                a_known_key_needs_no_quota,
                a_deleted_prompt_keeps_its_key_and_cannot_be_settled,
                purged_keys_are_free_and_their_prompts_stay,
                a_key_of_yesterday_is_free_before_it_is_purged,
                a_vector_of_another_length_leaves_the_call_running,
                settled_calls_are_counted_as_covered,
                upstream_calls_are_counted_by_day_up_to_the_limit,
                only_calls_that_are_begun_are_counted;
            usage:
                what_a_call_used_is_stored_with_its_outcome,
                the_cost_of_a_prompt_is_read_back,
                usage_is_summed_by_any_groups,
                sums_of_costs_stay_at_their_bound,
                a_users_budget_is_set_changed_and_taken_away,
                a_call_that_may_pass_a_budget_is_refused_and_stores_nothing,
                every_budget_in_force_has_to_have_room,
                with_a_budget_in_force_the_most_has_to_be_known,
                an_expired_call_frees_its_reservation_and_has_a_row,
                a_call_whose_prompt_was_deleted_is_metered_all_the_same,
                a_call_that_is_not_kept_is_metered_all_the_same,
                a_call_that_takes_a_row_over_reserves_anew,
                the_service_is_tracked_from_what_its_users_have_spent,
                usage_and_budgets_are_put_once_with_what_budgets_are_checked_against,
                racing_calls_never_pass_a_budget,
                random_calls_keep_rows_sums_and_counters_equal;
            chats:
                an_answered_chat_call_is_read_back_as_it_came,
                a_chat_call_that_is_not_answered_is_none,
                another_users_chat_call_is_none,
                a_chat_call_larger_than_allowed_is_only_measured,
                chat_calls_are_listed_in_both_orders_and_in_pages,
                a_list_of_chat_calls_is_filtered_before_it_is_cut,
                a_page_of_chat_calls_ends_before_its_texts_are_too_long,
                labels_are_replaced_for_their_owner_alone,
                a_call_that_is_not_kept_is_never_listed_and_leaves_no_row,
                an_expired_call_that_is_not_kept_leaves_no_row,
                a_call_that_is_not_kept_and_has_no_answer_leaves_its_key_to_the_next,
                a_taken_over_chat_call_keeps_its_texts;
            bulk:
                rows_put_with_their_ids_are_read_back_whole,
                vector_of_a_prompt_that_is_not_completed_is_not_put,
                ids_given_out_after_a_put_are_above_it,
                rows_of_several_kinds_are_put_together_or_not_at_all,
                the_ids_of_deleted_rows_count_as_given_out,
                raised_ids_are_not_given_out_and_never_fall,
                putting_again_leaves_stored_rows,
                rows_of_another_id_or_name_are_left_out,
                prompts_without_an_owner_put_nothing,
                vector_of_another_length_puts_nothing,
                prompts_are_listed_by_rising_id_in_pages_with_vectors_of_any_model,
                sessions_are_put_and_listed_by_rising_hash_in_pages,
                revoked_tokens_are_put_and_listed_by_rising_bytes_in_pages,
                keys_are_put_and_listed_by_rising_user_and_hash_in_pages,
                key_that_was_put_is_known_with_its_prompt,
                counts_of_days_are_put_and_the_higher_one_is_kept;
            concurrency:
                racing_claims_of_one_key_have_one_winner,
                racing_ends_of_one_call_have_one_winner,
                racing_upstream_calls_stop_at_the_limit,
                racing_posts_of_one_user_stop_at_the_quota,
                racing_inserts_are_all_there_with_rising_ids,
                racing_registrations_of_one_name_have_one_winner,
                racing_sessions_stop_at_the_limit,
                a_failed_operation_leaves_its_neighbours_alone,
                a_write_is_seen_by_the_next_read;
        }
    };
    (@cases $open:path; $($area:ident: $($case:ident),+;)+) => {
        $(mod $area {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let (store, _alive) = $open().await;
                crate::store::$area::$case(store).await;
            })+
        })+
    };
}

mod accounts;
mod api_keys;
pub mod bulk;
mod calls;
mod chats;
mod concurrency;
mod model;
mod postgres;
mod postgres_calls;
mod postgres_roles;
mod postgres_tls;
mod prompts;
mod sqlite;
mod sqlite_files;
mod sqlite_processes;
mod usage;

use std::sync::Arc;

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use prompt_service::domain::{
    CallDetails, Embedding, FailureCode, ModelId, Prompt, PromptId, PromptSource, PromptStatus,
    Record, RecordCursor, Timestamp, User, UserId,
};
use prompt_service::store::{
    AccountStore, ApiKeyStore, Begun, BulkStore, CallBudgets, CallOutcome, CallStore, ChatStore,
    Error, Holder, NewCall, NewUser, PromptStore, UsageStore,
};

/// All parts of the contract over the same data.
pub trait TestableStore:
    AccountStore + ApiKeyStore + PromptStore + CallStore + ChatStore + UsageStore + BulkStore
{
}

impl<T> TestableStore for T where
    T: AccountStore + ApiKeyStore + PromptStore + CallStore + ChatStore + UsageStore + BulkStore
{
}

/// A model that makes vectors of 4 numbers.
pub fn model(name: &str) -> ModelId {
    ModelId(Arc::from(name))
}

/// A vector that differs from others in its first number, which is exact in half precision up to
/// 2,048.
pub fn vector(mark: u16) -> Embedding {
    Embedding(Arc::from([f32::from(mark), 0.5, 0.0, -0.5].as_slice()))
}

/// An account to be made; its address and its first hash follow from nothing but the name.
pub fn new_user(username: &str) -> NewUser {
    NewUser {
        username: username.to_owned(),
        email: format!("{username}@example.org"),
        password_hash: "$argon2id$first".to_owned(),
        created_at: Timestamp(1_000),
    }
}

/// Makes that account.
pub async fn user(store: &dyn TestableStore, username: &str) -> User {
    store.create_user(new_user(username)).await.unwrap()
}

/// Up to `limit` accounts after that one, by rising id.
pub async fn list_users(
    store: &(impl BulkStore + ?Sized),
    after: Option<UserId>,
    limit: usize,
) -> Vec<User> {
    let users = store.records(RecordCursor::Users(after), limit).await;
    let user = |record| {
        let Record::User(user) = record else {
            panic!("an account, not {record:?}");
        };
        user
    };
    users.unwrap().into_iter().map(user).collect()
}

/// A prompt and its outcome.
#[derive(Clone, Debug)]
pub struct NewPrompt {
    pub user_id: UserId,
    pub prompt: String,
    pub response: Option<String>,
    pub model: String,
    /// `Completed` or `Failed`.
    pub status: PromptStatus,
    pub error: Option<FailureCode>,
    pub finish_reason: Option<String>,
    pub created_at: Timestamp,
    pub llm_duration_ms: Option<u32>,
    pub prompt_tokens: Option<u32>,
    pub completion_tokens: Option<u32>,
    pub embedding: Option<(ModelId, Embedding)>,
    pub max_prompts: Option<u32>,
}

/// Stores a prompt with its outcome, as a call does: begun, then settled.
pub trait InsertPrompt {
    fn insert_prompt(&self, new: NewPrompt) -> impl Future<Output = Result<Prompt, Error>> + Send;
}

impl<T: CallStore + ?Sized> InsertPrompt for T {
    async fn insert_prompt(&self, new: NewPrompt) -> Result<Prompt, Error> {
        static CALLS: AtomicI64 = AtomicI64::new(1 << 40);
        let holder = Holder {
            replica: [200; 16],
            call: CALLS.fetch_add(1, Ordering::Relaxed),
        };
        let call = NewCall {
            user_id: new.user_id,
            source: PromptSource::Api,
            chat: None,
            is_kept: true,
            prompt: new.prompt,
            model: new.model.clone(),
            created_at: new.created_at,
            announce: false,
            key: None,
            holder,
            lease: Duration::from_secs(3600),
            max_prompts: new.max_prompts,
            api_key_id: None,
            budgets: CallBudgets::default(),
            daily: None,
        };
        let Begun::Started(prompt) = self.begin_call(call).await? else {
            panic!("a call without a key is always new");
        };
        let outcome = CallOutcome {
            error: new.error,
            response: new.response.map(Into::into),
            model: Some(new.model),
            details: CallDetails {
                cost: None,
                finish_reason: new.finish_reason,
                prompt_tokens: new.prompt_tokens,
                completion_tokens: new.completion_tokens,
                duration_ms: new.llm_duration_ms,
            },
            embedding: new
                .embedding
                .filter(|_| new.status == PromptStatus::Completed),
            ..CallOutcome::default()
        };
        let settled = self.settle_call(prompt.id, holder, outcome).await?;
        Ok(settled.expect("nobody else settles it"))
    }
}

/// A completed prompt without a vector.
pub fn completed(user_id: UserId, prompt: &str) -> NewPrompt {
    NewPrompt {
        user_id,
        prompt: prompt.to_owned(),
        response: Some(format!("[mock] You said: {prompt}")),
        model: "mock".to_owned(),
        status: PromptStatus::Completed,
        error: None,
        finish_reason: None,
        created_at: Timestamp(2_000),
        llm_duration_ms: Some(12),
        prompt_tokens: Some(3),
        completion_tokens: None,
        embedding: None,
        max_prompts: None,
    }
}

/// A completed prompt with a vector of the model `a`.
pub fn embedded(user_id: UserId, prompt: &str, mark: u16) -> NewPrompt {
    NewPrompt {
        embedding: Some((model("a"), vector(mark))),
        ..completed(user_id, prompt)
    }
}

/// Up to `limit` of the user's prompts, newest first, whatever their length.
pub async fn newest(store: &dyn PromptStore, user_id: UserId, limit: usize) -> Vec<Prompt> {
    let page = store.list_prompts(user_id, None, limit, usize::MAX);
    page.await.unwrap().prompts
}

/// The ids of prompts, in their order.
pub fn ids(prompts: &[Prompt]) -> Vec<PromptId> {
    prompts.iter().map(|prompt| prompt.id).collect()
}
