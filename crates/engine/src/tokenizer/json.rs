//! The parts of a `tokenizer.json` that a BERT tokenizer uses.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::vocabulary::Vocabulary;
use super::words::{Specials, WordRules};
use super::{Error, Tokenizer};

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<Named>,
    post_processor: Option<PostProcessor>,
    model: ModelJson,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
}

#[derive(Deserialize)]
struct Named {
    r#type: String,
}

#[derive(Deserialize)]
struct Normalizer {
    r#type: String,
    clean_text: Option<bool>,
    handle_chinese_chars: Option<bool>,
    strip_accents: Option<bool>,
    lowercase: Option<bool>,
}

#[derive(Deserialize)]
struct PostProcessor {
    r#type: String,
    /// Of `BertProcessing`.
    cls: Option<(String, u32)>,
    sep: Option<(String, u32)>,
    /// Of `TemplateProcessing`.
    single: Option<Vec<TemplatePart>>,
}

#[derive(Deserialize)]
enum TemplatePart {
    SpecialToken { id: String },
    Sequence {},
}

#[derive(Deserialize)]
struct ModelJson {
    r#type: Option<String>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    max_input_chars_per_word: Option<usize>,
    vocab: Entries,
}

/// The vocabulary as it is written: a map would hide a duplicate token.
struct Entries(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from token to id")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// Reads the bytes of a `tokenizer.json`. Its `truncation` and `padding` are ignored: the caller
/// decides about both, and files made for training have values that do not suit a service.
pub(super) fn read(bytes: &[u8]) -> Result<Tokenizer, Error> {
    let file: File = serde_json::from_slice(bytes).map_err(Error::Malformed)?;
    let vocabulary = vocabulary(&file.model)?;
    let (cls, sep) = frame(file.post_processor)?;
    let unk = file.model.unk_token.as_deref().unwrap_or("[UNK]");
    let specials = specials(file.added_tokens, &vocabulary)?;
    let id = |token: &str| {
        vocabulary
            .id(token)
            .ok_or(Error::Unsupported("a special token is not in `vocab`"))
    };
    let (cls, sep, unk) = (id(&cls)?, id(&sep)?, id(unk)?);
    let rules = rules(file.normalizer, file.pre_tokenizer, &file.model, specials)?;
    Ok(Tokenizer {
        vocabulary,
        rules,
        cls,
        sep,
        unk,
    })
}

fn vocabulary(model: &ModelJson) -> Result<Vocabulary, Error> {
    if model
        .r#type
        .as_deref()
        .is_some_and(|name| name != "WordPiece")
    {
        return Err(Error::Unsupported("`model.type` is not WordPiece"));
    }
    let mut by_id = vec![None; model.vocab.0.len()];
    for (token, id) in &model.vocab.0 {
        // The table keeps tokens line by line; none of the models in use has a token with a line
        // feed.
        if token.contains('\n') {
            return Err(Error::Unsupported("`vocab` has a token with a line feed"));
        }
        match by_id.get_mut(*id as usize) {
            Some(place @ None) => *place = Some(token.as_str()),
            Some(Some(_)) => return Err(Error::Unsupported("`vocab` has an id twice")),
            None => return Err(Error::Unsupported("the ids of `vocab` have gaps")),
        }
    }
    let mut lines = String::new();
    for token in by_id.into_iter().flatten() {
        lines.push_str(token);
        lines.push('\n');
    }
    let prefix = model.continuing_subword_prefix.as_deref().unwrap_or("##");
    Vocabulary::from_lines(lines.into(), prefix).map_err(Error::Unsupported)
}

/// The tokens that stand before and after the text.
fn frame(post_processor: Option<PostProcessor>) -> Result<(String, String), Error> {
    let unsupported =
        Error::Unsupported("`post_processor` does not put one token before and one after the text");
    let Some(post_processor) = post_processor else {
        return Err(unsupported);
    };
    match (
        post_processor.r#type.as_str(),
        post_processor.cls,
        post_processor.sep,
        post_processor.single.as_deref(),
    ) {
        ("BertProcessing", Some((cls, _)), Some((sep, _)), _) => Ok((cls, sep)),
        (
            "TemplateProcessing",
            _,
            _,
            Some(
                [
                    TemplatePart::SpecialToken { id: cls },
                    TemplatePart::Sequence {},
                    TemplatePart::SpecialToken { id: sep },
                ],
            ),
        ) => Ok((cls.clone(), sep.clone())),
        _ => Err(unsupported),
    }
}

fn specials(added: Vec<AddedToken>, vocabulary: &Vocabulary) -> Result<Specials, Error> {
    let mut tokens = Vec::new();
    for token in added {
        if token.single_word || token.lstrip || token.rstrip || token.normalized {
            return Err(Error::Unsupported(
                "`added_tokens` has one that is not matched as it is written",
            ));
        }
        if vocabulary.id(&token.content) != Some(token.id) {
            return Err(Error::Unsupported(
                "`added_tokens` has one that is not in `vocab`, or with another id",
            ));
        }
        tokens.push((token.content, token.id));
    }
    Specials::new(tokens).ok_or(Error::Unsupported(
        "`added_tokens` has one that does not begin with a printable ASCII character",
    ))
}

fn rules(
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<Named>,
    model: &ModelJson,
    specials: Specials,
) -> Result<WordRules, Error> {
    let normalizer = normalizer
        .filter(|normalizer| normalizer.r#type == "BertNormalizer")
        .ok_or(Error::Unsupported("`normalizer` is not a BertNormalizer"))?;
    if pre_tokenizer.is_none_or(|pre_tokenizer| pre_tokenizer.r#type != "BertPreTokenizer") {
        return Err(Error::Unsupported(
            "`pre_tokenizer` is not a BertPreTokenizer",
        ));
    }
    if normalizer.clean_text == Some(false) {
        return Err(Error::Unsupported("`normalizer.clean_text` is false"));
    }
    let lowercase = normalizer.lowercase.unwrap_or(true);
    Ok(WordRules {
        lowercase,
        strip_accents: normalizer.strip_accents.unwrap_or(lowercase),
        handle_chinese_chars: normalizer.handle_chinese_chars.unwrap_or(true),
        max_word_chars: model.max_input_chars_per_word.unwrap_or(100),
        specials,
    })
}
