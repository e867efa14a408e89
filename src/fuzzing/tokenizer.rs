use std::sync::LazyLock;

use crate::embed::tokenizer::Tokenizer;

/// More tokens than any input here has.
const ALL: usize = 1 << 20;

/// A text. The first byte says where it is divided, the second how many tokens are taken.
///
/// The ids are in the vocabulary, between the two tokens that frame every text. A lower limit gives
/// a prefix of the same ids. The ids of a word do not depend on its neighbours.
pub fn tokenizer(data: &[u8]) {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::bundled);
    let [at, most, text @ ..] = data else {
        return;
    };
    let tokenizer = &*TOKENIZER;
    let text = &*String::from_utf8_lossy(text);
    let all = tokenizer.encode(text, ALL);
    let [cls, ids @ .., sep] = &all[..] else {
        panic!("{all:?} has no frame");
    };
    let size = tokenizer.vocabulary_size();
    assert!(all.iter().all(|id| (*id as usize) < size));
    assert_eq!(tokenizer.encode("", ALL), [*cls, *sep]);
    // A character is at most a Hangul syllable, which becomes three letters.
    assert!(ids.len() <= 4 * text.chars().count());

    let most = usize::from(*most);
    let taken = most.max(2).min(all.len());
    let mut limited = all[..taken - 1].to_vec();
    limited.push(*sep);
    assert_eq!(tokenizer.encode(text, most), limited, "at most {most}");

    let (left, right) = text.split_at(text.floor_char_boundary(usize::from(*at)));
    let inner = |text: &str| {
        let ids = tokenizer.encode(text, ALL);
        ids[1..ids.len() - 1].to_vec()
    };
    let apart = [inner(left), inner(right)].concat();
    assert_eq!(inner(&format!("{left} {right}")), apart, "words apart");
    assert_eq!(inner(&format!("\u{3000}{text}\t")), ids, "blanks around");
    if text.is_ascii() && !text.contains('[') {
        assert_eq!(inner(&text.to_ascii_uppercase()), ids, "capitals");
    }
}
