use std::io::Cursor;

use crate::domain::Timestamp;
use crate::transfer::json_lines::{Line, Options, Reader, Record, Writer};

/// A file for `import`.
///
/// What is read from it is read again after going back, and from a file that is written with it.
pub fn json_lines(data: &[u8]) {
    let Ok(mut reader) = Reader::new(Cursor::new(data)) else {
        return;
    };
    let lines = rest(&mut reader);
    let most = data.split(|byte| *byte == b'\n').count() as u64;
    let numbers: Vec<u64> = lines.iter().map(|line| line.number).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b));
    assert!(numbers.iter().all(|number| (2..=most).contains(number)));
    reader.rewind().expect("bytes in memory");
    let again = rest(&mut reader);
    assert!(lines.iter().zip(&again).all(|(a, b)| a.record == b.record));
    assert_eq!(lines.len(), again.len());

    let records: Vec<Record> = lines
        .into_iter()
        .filter_map(|line| line.record.ok())
        .collect();
    let written = write(&records, &reader);
    let mut read = Reader::new(Cursor::new(&written[..])).expect("an export has a header");
    assert_eq!(read.last_ids(), reader.last_ids());
    let read: Result<Vec<Record>, _> = rest(&mut read)
        .into_iter()
        .map(|line| line.record)
        .collect();
    assert_eq!(read, Ok(records));
}

fn rest(reader: &mut Reader<Cursor<&[u8]>>) -> Vec<Line> {
    let row = || reader.read_row().expect("bytes in memory");
    std::iter::from_fn(row).collect()
}

fn write(records: &[Record], reader: &Reader<Cursor<&[u8]>>) -> Vec<u8> {
    let options = Options {
        password_hashes: true,
        embeddings: true,
    };
    let mut written = Vec::new();
    let mut writer = Writer::begin(&mut written, options, reader.last_ids(), Timestamp(0))
        .expect("bytes in memory");
    for record in records {
        match record {
            Record::User(user) => writer.user(user),
            Record::Prompt(prompt) => writer.prompt(prompt),
        }
        .expect("bytes in memory");
    }
    writer.finish().expect("bytes in memory");
    written
}
