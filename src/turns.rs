//! A bounded queue in which keys take turns, so that one key with many items cannot keep the others
//! waiting.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Items that wait, each under a key: a client's network, or a user.
///
/// [`pop`](Self::pop) serves the keys in turn, and the items of one key in the order of their
/// arrival. An item therefore waits for the items of its key, and for one item of each other
/// key between two of them, however many items the others have. When the queue is full, the key
/// with the most items is the one that loses an item.
///
/// Memory is bounded by the capacity: a key without items is not kept.
#[derive(Debug)]
pub struct Turns<K, T> {
    waiting: HashMap<K, VecDeque<T>>,
    /// Every key of `waiting` once, the next one to be served first.
    order: VecDeque<K>,
    len: usize,
    capacity: usize,
}

impl<K: Eq + Hash + Clone, T> Turns<K, T> {
    /// An empty queue for at most `capacity` items of all keys together.
    pub fn new(capacity: usize) -> Self {
        Self {
            waiting: HashMap::new(),
            order: VecDeque::new(),
            len: 0,
            capacity,
        }
    }

    /// How many items wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the next [`push`](Self::push) will find no room.
    pub fn is_full(&self) -> bool {
        self.len >= self.capacity
    }

    /// How many items of `key` wait.
    pub fn len_of(&self, key: &K) -> usize {
        self.waiting.get(key).map_or(0, VecDeque::len)
    }

    /// Adds an item behind the others of its key. Returns the item for which there is no room, if
    /// the queue is full: the newest one of the key with the most items. That is `item` itself if
    /// no other key has more items than `key` would then have.
    #[must_use = "the returned item is not in the queue; whoever waits for it must be told"]
    pub fn push(&mut self, key: K, item: T) -> Option<T> {
        let removed = if self.is_full() {
            let longest = self.order.iter().max_by_key(|other| self.len_of(other));
            match longest.cloned() {
                Some(longest) if self.len_of(&longest) > self.len_of(&key) + 1 => {
                    self.take(&longest, VecDeque::pop_back)
                }
                _ => return Some(item),
            }
        } else {
            None
        };
        let items = self.waiting.entry(key.clone()).or_default();
        if items.is_empty() {
            self.order.push_back(key);
        }
        items.push_back(item);
        self.len += 1;
        removed
    }

    /// Takes the next item: the oldest one of the key whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        self.pop_if(|_| true)
    }

    /// Takes the next item if `is_fit` accepts it. Otherwise no key loses its turn.
    pub fn pop_if(&mut self, is_fit: impl FnOnce(&T) -> bool) -> Option<T> {
        let key = self.order.front()?.clone();
        let item = self.take(&key, |items| items.pop_front_if(|item| is_fit(item)))?;
        if self.waiting.contains_key(&key) {
            self.order.rotate_left(1);
        }
        Some(item)
    }

    /// Removes the items that are no longer worth their turn, such as those whose callers have
    /// left. Takes time for every item.
    pub fn retain(&mut self, mut is_kept: impl FnMut(&T) -> bool) {
        self.waiting.retain(|_, items| {
            items.retain(&mut is_kept);
            !items.is_empty()
        });
        self.order.retain(|key| self.waiting.contains_key(key));
        self.len = self.waiting.values().map(VecDeque::len).sum();
    }

    /// Takes one item of `key` from the end that `end` names, and forgets the key with its last.
    fn take(&mut self, key: &K, end: impl FnOnce(&mut VecDeque<T>) -> Option<T>) -> Option<T> {
        let items = self.waiting.get_mut(key)?;
        let item = end(items)?;
        self.len -= 1;
        if items.is_empty() {
            self.waiting.remove(key);
            self.order.retain(|other| other != key);
        }
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filled(capacity: usize, items: &[(char, u32)]) -> Turns<char, (char, u32)> {
        let mut turns = Turns::new(capacity);
        for &(key, n) in items {
            assert_eq!(turns.push(key, (key, n)), None);
        }
        turns
    }

    fn drained(mut turns: Turns<char, (char, u32)>) -> String {
        std::iter::from_fn(|| turns.pop())
            .map(|(key, n)| format!("{key}{n} "))
            .collect()
    }

    #[test]
    fn keys_take_turns_and_the_items_of_a_key_keep_their_order() {
        let turns = filled(
            9,
            &[
                ('a', 1),
                ('a', 2),
                ('a', 3),
                ('b', 1),
                ('c', 1),
                ('c', 2),
                ('a', 4),
            ],
        );
        assert_eq!(drained(turns), "a1 b1 c1 a2 c2 a3 a4 ");
    }

    #[test]
    fn a_key_that_comes_again_waits_for_the_other_keys() {
        let mut turns = filled(9, &[('a', 1), ('b', 1), ('b', 2)]);
        assert_eq!(turns.pop(), Some(('a', 1)));
        assert_eq!(turns.push('a', ('a', 2)), None);
        assert_eq!(drained(turns), "b1 a2 b2 ");
    }

    #[test]
    fn item_that_does_not_fit_keeps_its_turn() {
        let mut turns = filled(9, &[('a', 1), ('a', 2), ('b', 3)]);
        assert_eq!(turns.pop_if(|(_, n)| *n > 1), None);
        assert_eq!(turns.pop_if(|(_, n)| *n == 1), Some(('a', 1)));
        assert_eq!(drained(turns), "b3 a2 ");
    }

    #[test]
    fn full_queue_refuses_the_key_with_the_most_items() {
        let mut turns = filled(4, &[('a', 1), ('a', 2), ('a', 3), ('b', 1)]);
        assert!(turns.is_full());
        assert_eq!(turns.push('a', ('a', 4)), Some(('a', 4)));
        assert_eq!(turns.push('c', ('c', 1)), Some(('a', 3)));
        // Everybody would have as much as anybody: the one that comes last is refused.
        assert_eq!(turns.push('c', ('c', 2)), Some(('c', 2)));
        assert_eq!(turns.len(), 4);
        assert_eq!(drained(turns), "a1 b1 c1 a2 ");
    }

    #[test]
    fn queue_without_room_for_anything_returns_every_item() {
        let mut turns = Turns::new(0);
        assert_eq!(turns.push('a', 1), Some(1));
        assert_eq!(turns.pop(), None);
    }

    #[test]
    fn removed_items_take_no_turn_and_no_room() {
        let mut turns = filled(4, &[('a', 1), ('b', 1), ('b', 2), ('c', 1)]);
        turns.retain(|(key, n)| *key != 'a' && *n != 2);
        assert_eq!((turns.len(), turns.is_full()), (2, false));
        assert_eq!((turns.len_of(&'a'), turns.len_of(&'b')), (0, 1));
        assert_eq!(drained(turns), "b1 c1 ");
    }

    proptest! {
        /// Any sequence of operations, against the plain rule: with K keys waiting, an item is
        /// served after at most K turns for each item of its own key before it.
        #[test]
        fn no_item_waits_for_more_than_one_turn_of_each_other_key(
            keys in prop::collection::vec(0_u8..5, 1..60),
            pops in prop::collection::vec(prop::bool::ANY, 60),
            capacity in 1_usize..40,
        ) {
            let mut turns = Turns::new(capacity);
            let mut inside: Vec<(u8, usize)> = Vec::new();
            let mut served: Vec<u8> = Vec::new();
            for (n, key) in keys.iter().copied().enumerate() {
                let refused = turns.push(key, (key, n));
                inside.push((key, n));
                if let Some(refused) = refused {
                    let of = |key| inside.iter().filter(|item| item.0 == key).count();
                    prop_assert!((0..5).all(|other| of(other) <= of(refused.0)));
                    prop_assert_eq!(inside.iter().rfind(|item| item.0 == refused.0), Some(&refused));
                    inside.retain(|item| *item != refused);
                }
                prop_assert_eq!(turns.len(), inside.len());
                prop_assert!(turns.len() <= capacity);
                if pops[n] {
                    let item = turns.pop();
                    prop_assert_eq!(item.is_some(), !inside.is_empty());
                    if let Some(item) = item {
                        prop_assert_eq!(inside.iter().find(|other| other.0 == item.0), Some(&item));
                        inside.retain(|other| *other != item);
                    }
                }
            }
            let waiting: std::collections::BTreeSet<u8> = inside.iter().map(|item| item.0).collect();
            while let Some((key, _)) = turns.pop() {
                served.push(key);
            }
            prop_assert_eq!(served.len(), inside.len());
            let first: std::collections::BTreeSet<u8> = served[..waiting.len()].iter().copied().collect();
            prop_assert_eq!(first, waiting, "one item of each key comes before a second of any");
        }
    }
}
