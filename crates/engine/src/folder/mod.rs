//! Loads a sentence-transformers folder of the BERT family and converts its weights to the layout
//! of the kernels.

mod config;
mod pack;
mod tensors;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::config::FolderLayout;
use self::pack::{halves, linear, quantise_words};
use self::tensors::TensorFile;
use super::Error;
use super::aligned::AlignedArray;
use super::weights::{Layer, Shape, Weights, WordTable};

/// The largest `tokenizer.json` of a BERT, with half a million tokens, has about 15 MB.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;

/// A folder's model.
pub(super) struct Loaded {
    /// Name of the folder, reduced to characters that are safe in ids and headers.
    pub name: String,
    /// `int8` or `f16`.
    pub precision: &'static str,
    /// Hex SHA-256 of everything read that shapes a vector.
    pub fingerprint: String,
    pub weights: Weights,
}

/// Reads the folder `dir`.
pub(super) fn load(dir: &Path) -> Result<Loaded, Error> {
    let layout = FolderLayout::of(dir)?;
    let shape = layout.shape()?;
    let mut file = TensorFile::open(layout.transformer.join("model.safetensors"))?;
    file.fingerprint(format!("{shape:?}").as_bytes());
    let half = file.is_half();
    let weights = weights(&mut file, shape, half)?;
    let precision = if half { "f16" } else { "int8" };
    Ok(Loaded {
        name: name(dir),
        precision,
        fingerprint: file.finish(),
        weights,
    })
}

/// The tokenizer of a folder.
pub(super) struct TokenizerFile {
    /// The bytes of `tokenizer.json`.
    pub bytes: Vec<u8>,
    /// Whether texts are lowercased before the tokenizer sees them, whatever it does itself.
    pub lower_case: bool,
}

/// Reads the tokenizer of the folder `dir`.
pub(super) fn tokenizer(dir: &Path) -> Result<TokenizerFile, Error> {
    let layout = FolderLayout::of(dir)?;
    let lower_case = layout.lower_case()?;
    let path = layout.transformer.join("tokenizer.json");
    let Some(bytes) = read(&path, MAX_TOKENIZER_BYTES)? else {
        return Err(missing(path));
    };
    Ok(TokenizerFile { bytes, lower_case })
}

/// The bytes of a file; `None` if it is not there. Errors: `Malformed` if there are more than
/// `most`.
fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(Error::Malformed {
            file: path.display().to_string(),
            reason: format!("it is longer than {most} bytes"),
        });
    }
    Ok(Some(bytes))
}

fn missing(path: PathBuf) -> Error {
    Error::Read {
        path,
        source: io::ErrorKind::NotFound.into(),
    }
}

fn name(dir: &Path) -> String {
    let name = dir
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) {
            c
        } else {
            '_'
        }
    };
    let name: String = name.chars().take(64).map(safe).collect();
    if name.is_empty() {
        "model".to_owned()
    } else {
        name
    }
}

fn weights(file: &mut TensorFile, shape: Shape, half: bool) -> Result<Weights, Error> {
    let hidden = shape.hidden;
    let words = file.floats(
        "embeddings.word_embeddings.weight",
        &[shape.vocabulary, hidden],
    )?;
    let words = if half {
        WordTable::Half(halves(&words))
    } else {
        quantise_words(&words, hidden)
    };
    let rows = |file: &TensorFile, name: &str| file.shape(name)?.first().copied();
    let segments = rows(file, "embeddings.token_type_embeddings.weight").unwrap_or(1);
    let segment = file.floats(
        "embeddings.token_type_embeddings.weight",
        &[segments, hidden],
    )?;
    let Some(segment) = segment.get(..hidden) else {
        return Err(file.malformed("it has no segment embedding".to_owned()));
    };
    let rows = rows(file, "embeddings.position_embeddings.weight").unwrap_or(shape.max_tokens);
    let mut positions = file.floats("embeddings.position_embeddings.weight", &[rows, hidden])?;
    if rows < shape.max_tokens {
        return Err(file.malformed(format!(
            "it has {rows} positions, and max_seq_length is {}",
            shape.max_tokens
        )));
    }
    positions.truncate(shape.max_tokens * hidden);
    for position in positions.chunks_exact_mut(hidden) {
        position
            .iter_mut()
            .zip(segment)
            .for_each(|(position, segment)| *position += segment);
    }
    let positions = AlignedArray::build(positions.len(), |items| items.copy_from_slice(&positions));
    let norm = file.norm("embeddings", &shape)?;
    let mut layers: Vec<Layer> = Vec::new();
    for index in 0..shape.layers {
        let input_norm = layers
            .last()
            .map_or(&norm, |layer| &layer.feed_forward_norm);
        let layer = read_layer(file, &shape, index, &input_norm.bias, half)?;
        layers.push(layer);
    }
    Ok(Weights {
        words,
        positions,
        norm,
        layers,
        shape,
    })
}

fn read_layer(
    file: &mut TensorFile,
    shape: &Shape,
    layer: usize,
    input_centre: &[f32],
    half: bool,
) -> Result<Layer, Error> {
    let (hidden, intermediate) = (shape.hidden, shape.intermediate);
    let name = |part: &str| format!("encoder.layer.{layer}.{part}");
    let (mut rows, mut bias) = file.linear(&name("attention.self.query"), hidden, hidden)?;
    // The softmax is to base two. The usual division is done here once instead of at every score.
    let fold = std::f32::consts::LOG2_E / (shape.head() as f32).sqrt();
    rows.iter_mut().chain(&mut bias).for_each(|x| *x *= fold);
    for part in ["attention.self.key", "attention.self.value"] {
        let (more_rows, more_bias) = file.linear(&name(part), hidden, hidden)?;
        rows.extend(more_rows);
        bias.extend(more_bias);
    }
    let attention_norm = file.norm(&name("attention.output"), shape)?;
    Ok(Layer {
        qkv: linear((rows, bias), Some(input_centre), half),
        attention: linear(
            file.linear(&name("attention.output.dense"), hidden, hidden)?,
            Some(&vec![0.0; hidden]),
            half,
        ),
        up: linear(
            file.linear(&name("intermediate.dense"), hidden, intermediate)?,
            Some(&attention_norm.bias),
            half,
        ),
        down: linear(
            file.linear(&name("output.dense"), intermediate, hidden)?,
            Some(&vec![0.0; intermediate]),
            half,
        ),
        attention_norm,
        feed_forward_norm: file.norm(&name("output"), shape)?,
    })
}
