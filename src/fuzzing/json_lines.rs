use std::io::Cursor;

use crate::domain::{Record, Timestamp};
use crate::transfer::json_lines::{Options, Reader, Writer};
use crate::transfer::{Location, Row};

/// A file for `import`.
///
/// The rows that are read from it are read again after a rewind, and from a file that is written
/// with them.
pub fn json_lines(data: &[u8]) {
    let Ok(mut reader) = Reader::new(Cursor::new(data)) else {
        return;
    };
    let rows = rest(&mut reader);
    let most = data.split(|byte| *byte == b'\n').count() as u64;
    assert!(rows.is_sorted_by(|a, b| a.location < b.location));
    let lines = Location::Line(2)..=Location::Line(most);
    assert!(rows.iter().all(|row| lines.contains(&row.location)));
    reader.rewind().expect("bytes in memory");
    let again = rest(&mut reader);
    assert!(rows.iter().zip(&again).all(|(a, b)| a.record == b.record));
    assert_eq!(rows.len(), again.len());

    let records: Vec<Record> = rows.into_iter().filter_map(|row| row.record.ok()).collect();
    let written = write(&records, &reader);
    let mut read = Reader::new(Cursor::new(&written[..])).expect("an export has a header");
    assert_eq!(read.last_ids(), reader.last_ids());
    let read: Result<Vec<Record>, _> = rest(&mut read).into_iter().map(|row| row.record).collect();
    assert_eq!(read, Ok(records));
}

fn rest(reader: &mut Reader<Cursor<&[u8]>>) -> Vec<Row> {
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
        writer.row(record).expect("bytes in memory");
    }
    writer.finish().expect("bytes in memory");
    written
}
