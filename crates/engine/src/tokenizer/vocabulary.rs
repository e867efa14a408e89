//! The vocabulary: which piece of a word has which id.

use std::borrow::Cow;

/// Ids share their slot with eight bits of the hash, which spares most comparisons of text.
const ID_BITS: u32 = 24;
const EMPTY: u32 = u32::MAX;

/// Tokens and their ids. One text with all tokens and an open-addressing table over it: no
/// allocation per token, so that building takes about a millisecond for 30,000 tokens.
pub(super) struct Vocabulary {
    /// Every token followed by a line feed, in the order of ids.
    text: Cow<'static, str>,
    /// Where token `id` begins in `text`; one entry more than tokens.
    starts: Vec<u32>,
    /// `id | hash bits << ID_BITS` or `EMPTY`. A power of two, at most half full.
    slots: Vec<u32>,
    /// Length in bytes of the longest token.
    longest: usize,
    /// What a token that continues a word begins with.
    prefix: String,
    prefix_hash: u32,
}

/// FNV-1a: byte by byte, so one pass over a word hashes all its beginnings.
fn extend(hash: u32, byte: u8) -> u32 {
    (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
}

fn hash_of(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, extend)
}

impl Vocabulary {
    /// Reads a text of one token a line, the line's number being its id. `prefix` marks tokens that
    /// continue a word. Errors (what is wrong, for a person): no tokens, a token twice, too much of
    /// anything.
    pub(super) fn from_lines(
        text: Cow<'static, str>,
        prefix: &str,
    ) -> Result<Vocabulary, &'static str> {
        if u32::try_from(text.len()).is_err() {
            return Err("the vocabulary is larger than 4 GiB");
        }
        let ends = text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
        let starts: Vec<u32> = std::iter::once(0)
            .chain(ends.map(|(at, _)| u32::try_from(at + 1).expect("the length was checked")))
            .collect();
        let tokens = starts.len() - 1;
        if tokens == 0 || !text.ends_with('\n') {
            return Err("the vocabulary is empty or its last line has no end");
        }
        if tokens >= (1 << ID_BITS) - 1 {
            return Err("the vocabulary has more than 16 million tokens");
        }
        let mut vocabulary = Vocabulary {
            text,
            starts,
            slots: vec![EMPTY; (tokens * 2).next_power_of_two()],
            longest: 0,
            prefix: prefix.to_owned(),
            prefix_hash: hash_of(prefix),
        };
        for id in 0..u32::try_from(tokens).expect("the number was checked") {
            let token = vocabulary.token(id);
            let (hash, length) = (hash_of(token), token.len());
            if vocabulary.find(hash, "", token).is_some() {
                return Err("the vocabulary has a token twice");
            }
            vocabulary.longest = vocabulary.longest.max(length);
            let mut slot = vocabulary.first_slot(hash);
            while vocabulary.slots[slot] != EMPTY {
                slot = (slot + 1) % vocabulary.slots.len();
            }
            vocabulary.slots[slot] = id | hash << ID_BITS;
        }
        Ok(vocabulary)
    }

    /// How many tokens there are; ids are below it.
    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The id of exactly this token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.find(hash_of(token), "", token)
    }

    /// The longest token that `word` begins with: its id and how many bytes of `word` it covers.
    /// With `continuing`, among the tokens that continue a word. `hashes` is scratch space.
    pub(super) fn longest_match(
        &self,
        word: &str,
        continuing: bool,
        hashes: &mut Vec<u32>,
    ) -> Option<(u32, usize)> {
        let (prefix, mut hash) = if continuing {
            (self.prefix.as_str(), self.prefix_hash)
        } else {
            ("", hash_of(""))
        };
        let reach = word.len().min(self.longest.saturating_sub(prefix.len()));
        hashes.clear();
        hashes.extend(word.as_bytes()[..reach].iter().map(|&byte| {
            hash = extend(hash, byte);
            hash
        }));
        (1..=reach)
            .rev()
            .filter(|&length| word.is_char_boundary(length))
            .find_map(|length| {
                let id = self.find(hashes[length - 1], prefix, &word[..length])?;
                Some((id, length))
            })
    }

    fn token(&self, id: u32) -> &str {
        let id = id as usize;
        &self.text[self.starts[id] as usize..self.starts[id + 1] as usize - 1]
    }

    /// The id of the token `prefix` + `rest`, whose hash is `hash`.
    fn find(&self, hash: u32, prefix: &str, rest: &str) -> Option<u32> {
        let mut slot = self.first_slot(hash);
        while self.slots[slot] != EMPTY {
            let entry = self.slots[slot];
            let id = entry & ((1 << ID_BITS) - 1);
            if entry >> ID_BITS == hash & 0xff && self.token(id).strip_prefix(prefix) == Some(rest)
            {
                return Some(id);
            }
            slot = (slot + 1) % self.slots.len();
        }
        None
    }

    fn first_slot(&self, hash: u32) -> usize {
        // The upper bits of FNV are the better mixed ones, the lower eight are in the slot already.
        (hash ^ hash >> 15).wrapping_mul(0x9e37_79b1) as usize >> 8 & (self.slots.len() - 1)
    }
}
