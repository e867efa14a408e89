//! Recent queries of each user and their vectors.

use std::collections::VecDeque;
use std::sync::Arc;

use hashlink::LinkedHashMap;

use crate::domain::{Embedding, UserId};

/// Queries kept per user. People repeat the last few (paging, retyping, polling), and the search
/// through them is linear.
const QUERIES_PER_USER: usize = 16;

/// Longer queries, in bytes, are not kept: they are seldom repeated, and one would displace many.
const LONGEST_QUERY: usize = 2048;

/// What an entry occupies beside text and numbers, in bytes: two reference-counted headers, its
/// place in the deque, and a share of the user's entry in the map.
const ENTRY_OVERHEAD: usize = 256;

/// Drops the oldest query of the least recently active user first. Keyed by user, so that no user
/// can find out another user's queries by timing. Its byte budget bounds the number of users as
/// well, because each has at least one entry.
pub(super) struct QueryCache {
    budget: usize,
    bytes: usize,
    /// The users' queries, never none, the most recent ones last; the most recently active user is
    /// last.
    users: LinkedHashMap<UserId, VecDeque<(Arc<str>, Embedding)>>,
}

fn size(text: &str, embedding: &Embedding) -> usize {
    text.len() + embedding.0.len() * size_of::<f32>() + ENTRY_OVERHEAD
}

impl QueryCache {
    /// A cache of at most `budget` bytes; 0 keeps nothing.
    pub(super) fn new(budget: usize) -> Self {
        Self {
            budget,
            bytes: 0,
            users: LinkedHashMap::new(),
        }
    }

    /// The vector of exactly this text, if the user asked for it recently.
    pub(super) fn get(&mut self, user: UserId, text: &str) -> Option<Embedding> {
        let queries = self.users.get_mut(&user)?;
        let at = queries.iter().position(|(query, _)| **query == *text)?;
        let entry = queries.remove(at)?;
        let embedding = entry.1.clone();
        queries.push_back(entry);
        self.users.to_back(&user);
        Some(embedding)
    }

    /// Remembers a query. May drop older ones.
    pub(super) fn put(&mut self, user: UserId, text: Arc<str>, embedding: Embedding) {
        let added = size(&text, &embedding);
        if text.len() > LONGEST_QUERY || added > self.budget || self.get(user, &text).is_some() {
            return;
        }
        let queries = self.users.entry(user).or_insert_with(VecDeque::new);
        queries.push_back((text, embedding));
        self.bytes += added;
        let is_too_many = queries.len() > QUERIES_PER_USER;
        self.users.to_back(&user);
        if is_too_many {
            self.drop_oldest(user);
        }
        while self.bytes > self.budget
            && let Some((&user, _)) = self.users.front()
        {
            self.drop_oldest(user);
        }
    }

    /// Drops the user's oldest query, and the user with its last one.
    fn drop_oldest(&mut self, user: UserId) {
        let Some(queries) = self.users.get_mut(&user) else {
            return;
        };
        if let Some((text, embedding)) = queries.pop_front() {
            self.bytes -= size(&text, &embedding);
        }
        if queries.is_empty() {
            self.users.remove(&user);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vector(number: f32) -> Embedding {
        Embedding(Arc::from([number].as_slice()))
    }

    fn put(cache: &mut QueryCache, user: i64, text: &str) {
        cache.put(UserId(user), text.into(), vector(1.0));
    }

    fn has(cache: &mut QueryCache, user: i64, text: &str) -> bool {
        cache.get(UserId(user), text).is_some()
    }

    #[test]
    fn a_user_finds_only_its_own_exact_text() {
        let mut cache = QueryCache::new(10_000);
        cache.put(UserId(1), "cats".into(), vector(0.5));
        assert_eq!(cache.get(UserId(1), "cats"), Some(vector(0.5)));
        assert!(!has(&mut cache, 1, "Cats"));
        assert!(!has(&mut cache, 2, "cats"));
    }

    #[test]
    fn a_users_least_recent_query_is_dropped_first() {
        let mut cache = QueryCache::new(1 << 20);
        for number in 0..QUERIES_PER_USER {
            put(&mut cache, 1, &number.to_string());
        }
        assert!(has(&mut cache, 1, "0"));
        put(&mut cache, 1, "one more");
        assert!(has(&mut cache, 1, "0"));
        assert!(!has(&mut cache, 1, "1"));
        assert!(has(&mut cache, 1, "2"));
    }

    #[test]
    fn queries_of_the_least_recently_active_user_are_dropped_first() {
        let entry = size("x", &vector(1.0));
        let mut cache = QueryCache::new(3 * entry);
        put(&mut cache, 1, "a");
        put(&mut cache, 2, "b");
        put(&mut cache, 3, "c");
        assert!(has(&mut cache, 1, "a"));
        put(&mut cache, 4, "d");
        assert!(!has(&mut cache, 2, "b"));
        assert!(has(&mut cache, 1, "a") && has(&mut cache, 3, "c") && has(&mut cache, 4, "d"));
    }

    #[test]
    fn long_queries_are_not_kept() {
        let mut cache = QueryCache::new(1 << 20);
        let long = "x".repeat(LONGEST_QUERY + 1);
        put(&mut cache, 1, &long);
        assert!(!has(&mut cache, 1, &long));
        assert_eq!(cache.bytes, 0);
    }

    proptest! {
        #[test]
        fn the_cache_keeps_its_budget_and_counts_right(
            budget in 0_usize..3000,
            steps in proptest::collection::vec((0_i64..6, 0_usize..40, any::<bool>()), 0..200),
        ) {
            let mut cache = QueryCache::new(budget);
            for (user, length, is_put) in steps {
                let text = "x".repeat(length);
                if is_put { put(&mut cache, user, &text); } else { has(&mut cache, user, &text); }
                let entries = cache.users.values().flatten();
                let counted: usize = entries.map(|(text, embedding)| size(text, embedding)).sum();
                prop_assert_eq!(cache.bytes, counted);
                prop_assert!(counted <= budget);
                prop_assert!(cache.users.values().all(|queries| !queries.is_empty()));
            }
        }
    }
}
