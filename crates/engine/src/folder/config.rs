//! The configuration files of a folder, in the places where sentence-transformers looks for them.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::super::Error;
use super::super::safetensors::{place, shown};
use super::super::weights::{Pooling, Shape};
use super::{missing, read};

/// Configuration files have a few hundred bytes. This bounds how much a wrong path can make us
/// read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

#[derive(Deserialize)]
struct BertConfig {
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
    do_lower_case: Option<bool>,
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    /// 10^30 where there is no limit, hence no integer.
    model_max_length: Option<f64>,
}

/// Where the parts of a folder are.
pub(super) struct FolderLayout {
    /// Of `config.json`, the weights and the tokenizer.
    pub transformer: PathBuf,
    pooling: PathBuf,
}

impl FolderLayout {
    /// Reads `modules.json`, if there is one: old folders have the transformer in `0_Transformer`.
    pub fn of(dir: &Path) -> Result<Self, Error> {
        let modules: Vec<Module> = json(&dir.join("modules.json"))?.unwrap_or_default();
        let mut layout = Self {
            transformer: dir.to_owned(),
            pooling: dir.join("1_Pooling"),
        };
        for module in &modules {
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => layout.transformer = inside(dir, &module.path)?,
                "Pooling" => layout.pooling = inside(dir, &module.path)?,
                // Vectors are scaled to unit length in any case: scores are cosines.
                "Normalize" => {}
                _ => {
                    return Err(unsupported(format!(
                        "module {} is not known",
                        shown(&module.kind)
                    )));
                }
            }
        }
        Ok(layout)
    }

    /// Whether the folder says that texts are lowercased before they are tokenized.
    pub fn lower_case(&self) -> Result<bool, Error> {
        Ok(self.sentence()?.do_lower_case.unwrap_or_default())
    }

    /// Sizes and rules of the model.
    pub fn shape(&self) -> Result<Shape, Error> {
        let path = self.transformer.join("config.json");
        let config: BertConfig = json(&path)?.ok_or_else(|| missing(path))?;
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
        let shape = Shape {
            hidden: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            intermediate: config.intermediate_size,
            vocabulary: config.vocab_size,
            max_tokens: self.max_tokens()?.min(config.max_position_embeddings),
            epsilon: config.layer_norm_eps,
            pooling: self.pooling()?,
        };
        shape.check().map_err(unsupported)?;
        Ok(shape)
    }

    fn pooling(&self) -> Result<Pooling, Error> {
        let modes: PoolingConfig = json(&self.pooling.join("config.json"))?.unwrap_or_default();
        let other = modes.pooling_mode_max_tokens
            || modes.pooling_mode_mean_sqrt_len_tokens
            || modes.pooling_mode_weightedmean_tokens
            || modes.pooling_mode_lasttoken;
        match (
            modes.pooling_mode_mean_tokens,
            modes.pooling_mode_cls_token,
            other,
        ) {
            (_, true, false) => Ok(Pooling::Cls),
            (true, false, false) => Ok(Pooling::Mean),
            _ => Err(unsupported(
                "its pooling is neither mean nor cls".to_owned(),
            )),
        }
    }

    /// As in sentence-transformers: the setting of the folder, otherwise the tokenizer's.
    fn max_tokens(&self) -> Result<usize, Error> {
        if let Some(length) = self.sentence()?.max_seq_length {
            return Ok(length);
        }
        let tokenizer: Option<TokenizerConfig> =
            json(&self.transformer.join("tokenizer_config.json"))?;
        let length = tokenizer.and_then(|tokenizer| tokenizer.model_max_length);
        // A number that is too large becomes the greatest number, and anything else 0, which
        // `Shape::check` refuses.
        Ok(length.map_or(usize::MAX, |length| length as usize))
    }

    fn sentence(&self) -> Result<SentenceConfig, Error> {
        Ok(json(&self.transformer.join("sentence_bert_config.json"))?.unwrap_or_default())
    }
}

/// A folder inside `dir`, or `dir` itself.
fn inside(dir: &Path, path: &str) -> Result<PathBuf, Error> {
    let path = Path::new(path);
    if path
        .components()
        .any(|part| !matches!(part, Component::Normal(_)))
    {
        return Err(unsupported(
            "the path of one of its modules leaves the folder".to_owned(),
        ));
    }
    Ok(dir.join(path))
}

fn unsupported(reason: String) -> Error {
    Error::Unsupported { reason }
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let Some(text) = read(path, MAX_CONFIG_BYTES)? else {
        return Ok(None);
    };
    let malformed = |error: serde_json::Error| Error::Malformed {
        file: path.display().to_string(),
        reason: place(&error),
    };
    serde_json::from_slice(&text).map(Some).map_err(malformed)
}
