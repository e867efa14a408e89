//! The forward pass of a BERT sentence encoder.

use std::path::Path;
use std::sync::Arc;

use super::Error;
use super::folder;
use super::kernel::Kernel;
use super::kernel::attention::{Attention, AttentionScratch};
use super::kernel::linear::{Finish, HalfLinear, Int8Linear, OutputLayout};
use super::kernel::quantise::{Quantise, QuantisedRows};
use super::kernel::rows::{Embed, LayerNorm, MeanPool};
use super::weights::{Layer, Linear, Matrix, PackedFile, Pooling, Weights};
use crate::embedding::{Embedding, ModelId};

/// Changes with everything that changes the vectors of the same weights.
const ARITHMETIC: u32 = 1;

/// Texts run together up to so many tokens, so that activations stay in the second-level cache
/// while the weights are read.
const CHUNK_TOKENS: usize = 256;

/// Rows of the feed-forward block at a time: its inner activations are four times as wide as the
/// rest.
const FEED_FORWARD_ROWS: usize = 64;

/// The bundled file, on a cache line, so that its tensors (multiples of 64 bytes) are too.
static BUNDLED: &Aligned<[u8]> = &Aligned(*include_bytes!(
    "../../../assets/model/all-MiniLM-L6-v2.int8.safetensors"
));

#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// A sentence encoder: token ids in, unit vectors out. Immutable; share it by `Arc`.
#[derive(Debug)]
pub struct Model {
    id: ModelId,
    weights: Weights,
    kernel: Kernel,
}

/// Working memory of [`Model::embed`]. Keep one per worker: it grows to what the longest batch
/// chunk needs (about 4 MB with the bundled model) and is reused, so that a warm call allocates its
/// results and nothing else.
#[derive(Debug, Default)]
pub struct Scratch {
    ids: Vec<u32>,
    hidden: Vec<f32>,
    next: Vec<f32>,
    qkv: Vec<f32>,
    context: Vec<f32>,
    inner: Vec<f32>,
    attention: AttentionScratch,
    linear: LinearScratch,
    pooled: Vec<f32>,
}

#[derive(Debug, Default)]
struct LinearScratch {
    quantised: QuantisedRows,
    wide_rows: Vec<i16>,
    wide_weights: Vec<f32>,
}

impl Model {
    /// The model inside this program: all-MiniLM-L6-v2 with int8 weights, 384 numbers a vector, 256
    /// tokens. Nothing is copied. Loading takes well under a millisecond. Errors:
    /// [`Error::Malformed`], which a test of this crate excludes.
    pub fn bundled() -> Result<Self, Error> {
        Self::packed(&BUNDLED.0)
    }

    pub(super) fn packed(bytes: &'static [u8]) -> Result<Self, Error> {
        let file = PackedFile::parse(bytes)?;
        let text = |key: &str| file.metadata().get(key).cloned().unwrap_or_default();
        let (name, fingerprint) = (text("name"), text("fingerprint"));
        Ok(Self {
            id: id(&name, "int8", &fingerprint),
            weights: file.weights()?,
            kernel: Kernel::fastest(),
        })
    }

    /// A sentence-transformers folder of the BERT family: `config.json`, `model.safetensors`, and
    /// where present `modules.json`, `1_Pooling/config.json` (mean or cls) and
    /// `sentence_bert_config.json`. F16 weights are kept and computed with in `f32` (cosine to the
    /// exact vectors at least 0.99999); F32 and BF16 weights are quantised as the bundled model's
    /// were at first. Errors: [`Error::Read`], [`Error::Malformed`], and [`Error::Unsupported`] for
    /// other kinds of models.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let folder::Loaded {
            name,
            precision,
            fingerprint,
            weights,
        } = folder::load(dir)?;
        Ok(Self {
            id: id(&name, precision, &fingerprint),
            weights,
            kernel: Kernel::fastest(),
        })
    }

    /// The same model on another kernel, for tests and benches.
    pub fn with_kernel(self, kernel: Kernel) -> Self {
        Self { kernel, ..self }
    }

    /// Changes whenever the weights or the arithmetic do: vectors of different ids must not be
    /// compared.
    pub fn id(&self) -> &ModelId {
        &self.id
    }

    /// Numbers in a vector.
    pub fn dimension(&self) -> usize {
        self.weights.shape.hidden
    }

    /// Number of word embeddings: every id is below it.
    pub fn vocabulary_size(&self) -> usize {
        self.weights.shape.vocabulary
    }

    /// The most tokens of a text that count, including `[CLS]` and `[SEP]`.
    pub fn max_tokens(&self) -> usize {
        self.weights.shape.max_tokens
    }

    /// The kernel in use.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// One unit vector for each text, in order. `batch`: token ids of each text, with `[CLS]` and
    /// `[SEP]`, without padding.
    ///
    /// A text's vector does not depend on its neighbours: it has the same bits as in a separate
    /// call. Ids past `max_tokens` are ignored, an id outside the vocabulary counts as id 0, and no
    /// ids at all give the zero vector. Runs on the calling thread, for about 0.05 ms per token:
    /// not for an async thread.
    pub fn embed(&self, batch: &[&[u32]], scratch: &mut Scratch) -> Vec<Embedding> {
        let mut out = Vec::with_capacity(batch.len());
        let mut rest = batch;
        while !rest.is_empty() {
            let mut tokens = 0;
            let mut texts = 0;
            for ids in rest {
                let length = ids.len().min(self.max_tokens());
                if texts > 0 && tokens + length > CHUNK_TOKENS {
                    break;
                }
                tokens += length;
                texts += 1;
            }
            let (chunk, later) = rest.split_at(texts);
            self.forward(chunk, tokens, scratch);
            self.pool(chunk, scratch, &mut out);
            rest = later;
        }
        out
    }

    /// Leaves the last hidden states of the texts, `tokens` rows in all, in `scratch.hidden`.
    fn forward(&self, texts: &[&[u32]], tokens: usize, scratch: &mut Scratch) {
        if tokens == 0 {
            return;
        }
        let shape = &self.weights.shape;
        scratch.hidden.resize(tokens * shape.hidden, 0.0);
        scratch.next.resize(tokens * shape.hidden, 0.0);
        scratch.context.resize(tokens * shape.hidden, 0.0);
        scratch.qkv.resize(3 * tokens * shape.hidden, 0.0);
        scratch
            .inner
            .resize(tokens.min(FEED_FORWARD_ROWS) * shape.intermediate, 0.0);
        let mut row = 0;
        for ids in texts {
            let length = ids.len().min(shape.max_tokens);
            let known = |id: &u32| {
                if (*id as usize) < shape.vocabulary {
                    *id
                } else {
                    0
                }
            };
            scratch.ids.clear();
            scratch.ids.extend(ids[..length].iter().map(known));
            self.kernel.run(Embed {
                ids: &scratch.ids,
                words: self.weights.words.view(),
                positions: &self.weights.positions,
                norm: self.weights.norm.view(),
                out: &mut scratch.hidden[row * shape.hidden..(row + length) * shape.hidden],
            });
            row += length;
        }
        for layer in &self.weights.layers {
            self.attend(layer, texts, tokens, scratch);
            self.feed_forward(layer, scratch);
        }
    }

    fn attend(&self, layer: &Layer, texts: &[&[u32]], tokens: usize, scratch: &mut Scratch) {
        let Scratch {
            hidden,
            next,
            qkv,
            context,
            attention,
            linear,
            ..
        } = scratch;
        let (width, heads, head) = (
            self.weights.shape.hidden,
            self.weights.shape.heads,
            self.weights.shape.head(),
        );
        let by_head = OutputLayout {
            group: head,
            group_stride: tokens * head,
            row_stride: head,
        };
        self.linear(&layer.qkv, hidden, Finish::Store, by_head, linear, qkv);
        let mut row = 0;
        for ids in texts {
            let length = ids.len().min(self.max_tokens());
            for index in 0..heads {
                let of = |part: usize| {
                    &qkv[((part * heads + index) * tokens + row) * head..][..length * head]
                };
                self.kernel.run(Attention {
                    queries: of(0),
                    keys: of(1),
                    values: of(2),
                    head,
                    scratch: attention,
                    out: &mut context[row * width + index * head..],
                    out_stride: width,
                });
            }
            row += length;
        }
        self.linear(
            &layer.attention,
            context,
            Finish::Residual(hidden),
            by_row(width),
            linear,
            next,
        );
        self.kernel.run(LayerNorm {
            rows: next,
            weights: layer.attention_norm.view(),
        });
        std::mem::swap(hidden, next);
    }

    fn feed_forward(&self, layer: &Layer, scratch: &mut Scratch) {
        let Scratch {
            hidden,
            next,
            inner,
            linear,
            ..
        } = scratch;
        let (width, intermediate) = (self.weights.shape.hidden, self.weights.shape.intermediate);
        let blocks = hidden
            .chunks(FEED_FORWARD_ROWS * width)
            .zip(next.chunks_mut(FEED_FORWARD_ROWS * width));
        for (hidden, next) in blocks {
            let inner = &mut inner[..hidden.len() / width * intermediate];
            self.linear(
                &layer.up,
                hidden,
                Finish::Gelu,
                by_row(intermediate),
                linear,
                inner,
            );
            self.linear(
                &layer.down,
                inner,
                Finish::Residual(hidden),
                by_row(width),
                linear,
                next,
            );
            self.kernel.run(LayerNorm {
                rows: next,
                weights: layer.feed_forward_norm.view(),
            });
        }
        std::mem::swap(hidden, next);
    }

    fn linear(
        &self,
        linear: &Linear,
        rows: &[f32],
        finish: Finish<'_>,
        layout: OutputLayout,
        scratch: &mut LinearScratch,
        out: &mut [f32],
    ) {
        let bias = &linear.bias;
        match &linear.matrix {
            Matrix::Int8 {
                packed,
                scale,
                sums,
            } => {
                let width = packed.len() / bias.len();
                let centre = linear.centre.as_deref();
                self.kernel.run(Quantise {
                    rows,
                    width,
                    centre,
                    into: &mut scratch.quantised,
                });
                let weights = Matrix::int8(packed, scale, sums);
                self.kernel.run(Int8Linear {
                    rows: &scratch.quantised,
                    weights,
                    bias,
                    finish,
                    layout,
                    widened: &mut scratch.wide_rows,
                    out,
                });
            }
            Matrix::Half(packed) => {
                self.kernel.run(HalfLinear {
                    rows,
                    packed,
                    bias,
                    finish,
                    layout,
                    widened: &mut scratch.wide_weights,
                    out,
                });
            }
        }
    }

    fn pool(&self, texts: &[&[u32]], scratch: &mut Scratch, out: &mut Vec<Embedding>) {
        let width = self.weights.shape.hidden;
        scratch.pooled.resize(width, 0.0);
        let mut row = 0;
        for ids in texts {
            let length = ids.len().min(self.max_tokens());
            let pooled_rows = match self.weights.shape.pooling {
                Pooling::Mean => length,
                Pooling::Cls => length.min(1),
            };
            let rows = &scratch.hidden[row * width..(row + pooled_rows) * width];
            self.kernel.run(MeanPool {
                rows,
                out: &mut scratch.pooled,
            });
            out.push(Embedding(Arc::from(scratch.pooled.as_slice())));
            row += length;
        }
    }
}

fn by_row(width: usize) -> OutputLayout {
    OutputLayout {
        group: width,
        group_stride: 0,
        row_stride: width,
    }
}

/// `all-MiniLM-L6-v2/int8-1-53aa5117`: name, precision, arithmetic, start of the weights' SHA-256.
fn id(name: &str, precision: &str, fingerprint: &str) -> ModelId {
    let start = fingerprint.get(..8).unwrap_or(fingerprint);
    ModelId(Arc::from(format!(
        "{name}/{precision}-{ARITHMETIC}-{start}"
    )))
}
