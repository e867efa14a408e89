//! From text to words: cleaning, accents, case, and where one word ends.

use std::ops::ControlFlow;

use super::characters::{combining_class, decompose, is_cjk, is_dropped, is_mark, is_punctuation};

/// What a text consists of, in its order.
#[derive(Debug, PartialEq)]
pub(super) enum Piece<'a> {
    /// A word, normalised, not empty.
    Word(&'a str),
    /// A word of more than `max_word_chars` characters; which ones does not matter.
    LongWord,
    /// A special token written out in the text.
    Special(u32),
}

/// Tokens recognised in a text as they are written, before anything is done to it.
pub(super) struct Specials {
    /// The longest first.
    tokens: Vec<(String, u32)>,
    /// Bit `n` is set if a token begins with ASCII character `n`.
    first: u128,
}

impl Specials {
    /// `None` if a token does not begin with a printable ASCII character: only there does the
    /// splitter look.
    pub(super) fn new(mut tokens: Vec<(String, u32)>) -> Option<Specials> {
        tokens.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        let mut first = 0;
        for (token, _) in &tokens {
            first |= match token.as_bytes().first() {
                Some(byte) if byte.is_ascii_graphic() => 1 << byte,
                _ => return None,
            };
        }
        Some(Specials { tokens, first })
    }

    /// The longest token that `text` begins with: its length in bytes and its id.
    fn at_start(&self, text: &str) -> Option<(usize, u32)> {
        let first = *text.as_bytes().first()?;
        if !first.is_ascii() || self.first >> first & 1 == 0 {
            return None;
        }
        self.tokens
            .iter()
            .find(|(token, _)| text.starts_with(token.as_str()))
            .map(|(token, id)| (token.len(), *id))
    }
}

/// How text becomes words. Flags are named as in `tokenizer.json`.
pub(super) struct WordRules {
    pub(super) lowercase: bool,
    pub(super) strip_accents: bool,
    pub(super) handle_chinese_chars: bool,
    /// Longest word, in characters, that is looked up.
    pub(super) max_word_chars: usize,
    pub(super) specials: Specials,
}

impl WordRules {
    /// Visits the pieces of `text` until the visitor breaks. Reads little further than the end of
    /// the last piece visited, so a long text costs only what is used of it.
    pub(super) fn for_each_piece<V>(&self, text: &str, visit: V) -> ControlFlow<()>
    where
        V: FnMut(Piece<'_>) -> ControlFlow<()>,
    {
        let mut splitter = Splitter {
            rules: self,
            visit,
            word: String::new(),
            word_chars: 0,
            unordered: Vec::new(),
        };
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if let Some((length, id)) = self.specials.at_start(rest) {
                splitter.end_word()?;
                (splitter.visit)(Piece::Special(id))?;
                rest = &rest[length..];
            } else {
                splitter.clean(c)?;
                rest = &rest[c.len_utf8()..];
            }
        }
        splitter.end_word()
    }
}

/// A character passes the stages `clean`, `decompose`, `lower` and `split`, in this order.
struct Splitter<'r, V> {
    rules: &'r WordRules,
    visit: V,
    /// The word so far; not extended further once it is too long.
    word: String,
    word_chars: usize,
    /// Characters with a combining class, waiting for canonical reordering: it ends at the next one
    /// without.
    unordered: Vec<(u8, char)>,
}

impl<V: FnMut(Piece<'_>) -> ControlFlow<()>> Splitter<'_, V> {
    fn clean(&mut self, c: char) -> ControlFlow<()> {
        if is_dropped(c) {
            ControlFlow::Continue(())
        } else if c.is_whitespace() {
            self.end_word()
        } else if self.rules.handle_chinese_chars && is_cjk(c) {
            self.end_word()?;
            self.decompose(c)?;
            self.end_word()
        } else {
            self.decompose(c)
        }
    }

    fn decompose(&mut self, c: char) -> ControlFlow<()> {
        if !self.rules.strip_accents {
            return self.lower(c);
        }
        if c.is_ascii() {
            self.reorder()?;
            return self.lower(c);
        }
        let mut flow = ControlFlow::Continue(());
        decompose(c, |part| {
            if flow.is_continue() {
                flow = self.arrange(part);
            }
        });
        flow
    }

    fn arrange(&mut self, c: char) -> ControlFlow<()> {
        // Marks are stripped before the sorting, not after: removing some leaves the order of the
        // others as it is.
        if is_mark(c) {
            return ControlFlow::Continue(());
        }
        let class = combining_class(c);
        if class != 0 {
            self.unordered.push((class, c));
            return ControlFlow::Continue(());
        }
        self.reorder()?;
        self.lower(c)
    }

    fn reorder(&mut self) -> ControlFlow<()> {
        if self.unordered.is_empty() {
            return ControlFlow::Continue(());
        }
        let mut sorted = std::mem::take(&mut self.unordered);
        sorted.sort_by_key(|&(class, _)| class);
        sorted.into_iter().try_for_each(|(_, c)| self.lower(c))
    }

    fn lower(&mut self, c: char) -> ControlFlow<()> {
        if !self.rules.lowercase {
            self.split(c)
        } else if c.is_ascii() {
            self.split(c.to_ascii_lowercase())
        } else {
            c.to_lowercase().try_for_each(|lower| self.split(lower))
        }
    }

    fn split(&mut self, c: char) -> ControlFlow<()> {
        if is_punctuation(c) {
            self.emit_word()?;
            return (self.visit)(Piece::Word(c.encode_utf8(&mut [0; 4])));
        }
        if self.word_chars < self.rules.max_word_chars {
            self.word.push(c);
        }
        self.word_chars += 1;
        ControlFlow::Continue(())
    }

    fn end_word(&mut self) -> ControlFlow<()> {
        self.reorder()?;
        self.emit_word()
    }

    fn emit_word(&mut self) -> ControlFlow<()> {
        if self.word_chars == 0 {
            return ControlFlow::Continue(());
        }
        let piece = if self.word_chars > self.rules.max_word_chars {
            Piece::LongWord
        } else {
            Piece::Word(&self.word)
        };
        let flow = (self.visit)(piece);
        self.word.clear();
        self.word_chars = 0;
        flow
    }
}
