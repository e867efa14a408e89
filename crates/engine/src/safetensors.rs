//! The header of a safetensors file: eight bytes of length, JSON, then the tensors' bytes back to
//! back.
//!
//! The file may be hostile: sizes are checked against its length before memory is allocated for
//! them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::error::Category;

/// Real headers are far smaller. This bounds how much a wrong length can make us read.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Bytes of the header's length.
pub(super) const PREFIX_BYTES: usize = 8;

/// The tensors of a file. Every range is inside the file, and no ranges overlap.
#[derive(Debug)]
pub(super) struct Header {
    /// The free-form strings under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// One tensor's type, shape and bytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TensorInfo {
    /// `F32`, `F16`, `BF16`, `I8`, ...
    pub dtype: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// First byte and the byte after the last, counted from the end of the header.
    #[serde(rename = "data_offsets")]
    pub range: (usize, usize),
}

#[derive(Deserialize)]
struct RawHeader {
    #[serde(rename = "__metadata__", default)]
    metadata: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<String, TensorInfo>,
}

/// Length of the JSON that follows the first eight bytes of a file of `file_bytes` bytes.
/// Errors: a sentence, if the file cannot hold it.
pub(super) fn header_bytes(prefix: [u8; PREFIX_BYTES], file_bytes: u64) -> Result<usize, String> {
    let claimed = u64::from_le_bytes(prefix);
    let room = file_bytes.saturating_sub(PREFIX_BYTES as u64);
    if claimed > room.min(MAX_HEADER_BYTES) {
        return Err(format!(
            "its header claims {claimed} bytes, and the file has {file_bytes}"
        ));
    }
    usize::try_from(claimed).map_err(|_| "its header is too long".to_owned())
}

impl Header {
    /// Reads the JSON; `data_bytes` follow it in the file. Errors: a sentence, if it is no header
    /// or a tensor's range is not what its shape and neighbours demand.
    pub fn parse(json: &[u8], data_bytes: u64) -> Result<Self, String> {
        let raw: RawHeader = serde_json::from_slice(json)
            .map_err(|error| format!("its header is not valid: {}", place(&error)))?;
        let mut ranges = Vec::with_capacity(raw.tensors.len());
        for (name, tensor) in &raw.tensors {
            let (start, end) = tensor.range;
            let items = tensor
                .shape
                .iter()
                .try_fold(1_usize, |items, size| items.checked_mul(*size));
            let bytes = items.and_then(|items| items.checked_mul(item_bytes(&tensor.dtype)?));
            if bytes.is_none() || end.checked_sub(start) != bytes {
                return Err(format!(
                    "tensor {} has a range that is not its shape's size",
                    shown(name)
                ));
            }
            ranges.push((start, end, name));
        }
        ranges.sort_unstable();
        let mut expected = 0;
        for (start, end, name) in ranges {
            // The format allows neither gaps nor overlaps, so one comparison finds both.
            if start != expected {
                return Err(format!(
                    "tensor {} does not start where the one before it ends",
                    shown(name)
                ));
            }
            expected = end;
        }
        if expected as u64 != data_bytes {
            return Err(format!(
                "its tensors take {expected} bytes, and {data_bytes} follow the header"
            ));
        }
        Ok(Self {
            metadata: raw.metadata,
            tensors: raw.tensors,
        })
    }
}

fn item_bytes(dtype: &str) -> Option<usize> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" => Some(1),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "F32" | "I32" | "U32" => Some(4),
        "F64" | "I64" | "U64" => Some(8),
        _ => None,
    }
}

/// Where a file is wrong, and how. Without the parser's message, which quotes the file at any
/// length.
pub(super) fn place(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        Category::Io | Category::Syntax => "it is not JSON",
        Category::Eof => "it ends too early",
        Category::Data => "something is missing, or not of the expected kind,",
    };
    let (line, column) = (error.line(), error.column());
    format!("{what} at line {line} column {column}")
}

/// A name from a file, short and printable enough for an error message.
pub(super) fn shown(name: &str) -> String {
    let mut short = String::new();
    for c in name.chars() {
        if short.len() > 80 {
            short.push('…');
            break;
        }
        short.extend(c.escape_debug());
    }
    format!("\"{short}\"")
}
