//! Loads a sentence-transformers folder of the BERT family and brings its weights into the kernels' layout.

mod pack;
mod tensors;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use self::pack::{halves, linear, quantise_words};
use self::tensors::TensorFile;
use super::Error;
use super::safetensors::shown;
use super::slab::Slab;
use super::weights::{Layer, Pooling, Shape, Weights, WordTable};

/// Configuration files are a few hundred bytes; this bounds what a mistaken path can make us read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

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

#[derive(Deserialize)]
struct Config {
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "default_type_vocab_size")]
    type_vocab_size: usize,
    #[serde(default = "default_layer_norm_eps")]
    layer_norm_eps: f32,
    #[serde(default = "default_hidden_act")]
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
}

fn default_type_vocab_size() -> usize {
    2
}

fn default_layer_norm_eps() -> f32 {
    1e-12
}

fn default_hidden_act() -> String {
    "gelu".to_owned()
}

#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
#[serde(default)]
struct PoolingConfig {
    pooling_mode_mean_tokens: bool,
    pooling_mode_cls_token: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
    pooling_mode_weightedmean_tokens: bool,
    pooling_mode_lasttoken: bool,
}

impl Default for PoolingConfig {
    fn default() -> Self {
        Self {
            pooling_mode_mean_tokens: true,
            pooling_mode_cls_token: false,
            pooling_mode_max_tokens: false,
            pooling_mode_mean_sqrt_len_tokens: false,
            pooling_mode_weightedmean_tokens: false,
            pooling_mode_lasttoken: false,
        }
    }
}

#[derive(Default, Deserialize)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
}

/// Reads the folder `dir`.
pub(super) fn load(dir: &Path) -> Result<Loaded, Error> {
    let shape = shape(dir)?;
    let mut file = TensorFile::open(dir.join("model.safetensors"))?;
    file.fingerprint(format!("{shape:?}").as_bytes());
    let half = file.dtype("embeddings.word_embeddings.weight") == Some("F16");
    let weights = weights(&mut file, shape, half)?;
    let precision = if half { "f16" } else { "int8" };
    Ok(Loaded {
        name: name(dir),
        precision,
        fingerprint: file.finish(),
        weights,
    })
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

fn shape(dir: &Path) -> Result<Shape, Error> {
    let unsupported = |reason: String| Error::Unsupported { reason };
    let config: Config =
        json(&dir.join("config.json"))?.ok_or_else(|| missing(dir.join("config.json")))?;
    if config.model_type != "bert" {
        return Err(unsupported(format!(
            "model_type {} is not bert",
            shown(&config.model_type)
        )));
    }
    if config.hidden_act != "gelu" {
        return Err(unsupported(format!(
            "hidden_act {} is not gelu",
            shown(&config.hidden_act)
        )));
    }
    if config
        .position_embedding_type
        .as_deref()
        .unwrap_or("absolute")
        != "absolute"
        || config.type_vocab_size == 0
    {
        return Err(unsupported(
            "its positions are not absolute, or it has no segment embedding".to_owned(),
        ));
    }
    let modules: Vec<Module> = json(&dir.join("modules.json"))?.unwrap_or_default();
    let mut pooling_dir = "1_Pooling".to_owned();
    for module in &modules {
        match module.kind.rsplit('.').next().unwrap_or_default() {
            // Vectors are scaled to unit length in any case: scores are cosines.
            "Transformer" | "Normalize" => {}
            "Pooling" => pooling_dir.clone_from(&module.path),
            _ => {
                return Err(unsupported(format!(
                    "module {} is not known",
                    shown(&module.kind)
                )));
            }
        }
    }
    let pooling_dir = Path::new(&pooling_dir);
    if pooling_dir
        .components()
        .any(|part| !matches!(part, std::path::Component::Normal(_)))
    {
        return Err(unsupported(
            "the path of its pooling module leaves the folder".to_owned(),
        ));
    }
    let modes: PoolingConfig =
        json(&dir.join(pooling_dir).join("config.json"))?.unwrap_or_default();
    let other = modes.pooling_mode_max_tokens
        || modes.pooling_mode_mean_sqrt_len_tokens
        || modes.pooling_mode_weightedmean_tokens
        || modes.pooling_mode_lasttoken;
    let pooling = match (
        modes.pooling_mode_mean_tokens,
        modes.pooling_mode_cls_token,
        other,
    ) {
        (_, true, false) => Pooling::Cls,
        (true, false, false) => Pooling::Mean,
        _ => {
            return Err(unsupported(
                "its pooling is neither mean nor cls".to_owned(),
            ));
        }
    };
    let sentence: SentenceConfig =
        json(&dir.join("sentence_bert_config.json"))?.unwrap_or_default();
    let shape = Shape {
        hidden: config.hidden_size,
        layers: config.num_hidden_layers,
        heads: config.num_attention_heads,
        intermediate: config.intermediate_size,
        vocabulary: config.vocab_size,
        max_tokens: sentence
            .max_seq_length
            .unwrap_or(usize::MAX)
            .min(config.max_position_embeddings),
        epsilon: config.layer_norm_eps,
        pooling,
    };
    shape.check().map_err(unsupported)?;
    Ok(shape)
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let read = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    let mut text = Vec::new();
    file.take(MAX_CONFIG_BYTES)
        .read_to_end(&mut text)
        .map_err(read)?;
    let malformed = |error: serde_json::Error| Error::Malformed {
        file: path.display().to_string(),
        reason: error.to_string(),
    };
    serde_json::from_slice(&text).map(Some).map_err(malformed)
}

fn missing(path: PathBuf) -> Error {
    Error::Read {
        path,
        source: io::ErrorKind::NotFound.into(),
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
    let positions = Slab::build(positions.len(), |items| items.copy_from_slice(&positions));
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
    // Softmax is taken to base two, and the usual division is done here once instead of at every score.
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
