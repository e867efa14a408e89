//! A model's weights in the form the kernels read, and the bundled file, which holds them in
//! exactly that form. `assets/model/README.md` describes the file.

use std::collections::BTreeMap;

use bytemuck::Pod;

use super::Error;
use super::aligned::AlignedArray;
use super::kernel::LANES;
use super::kernel::linear::Int8Weights;
use super::kernel::rows::{NormWeights, Words};
use super::safetensors::{Header, PREFIX_BYTES, header_bytes, shown};

#[cfg(target_endian = "big")]
compile_error!("the bundled weights are little-endian and read in place");

/// The one value of the bundled file's `format`.
const PACKED_FORMAT: &str = "bert-int8-packed-1";

/// The greatest width of any layer: 255 * 127 * 16384 is a quarter of what the 32-bit sums hold.
const MAX_WIDTH: usize = 16_384;

/// Sizes and rules of one BERT model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub vocabulary: usize,
    pub max_tokens: usize,
    pub epsilon: f32,
    pub pooling: Pooling,
}

/// How a text's token vectors become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pooling {
    Mean,
    Cls,
}

impl Shape {
    /// Width of one attention head.
    pub fn head(&self) -> usize {
        self.hidden / self.heads
    }

    /// Errors: a sentence, if the kernels cannot run a model of this shape.
    pub fn check(&self) -> Result<(), String> {
        let whole = |width: usize| width > 0 && width <= MAX_WIDTH && width.is_multiple_of(LANES);
        if !whole(self.hidden) || !whole(self.intermediate) {
            return Err(format!(
                "layer widths must be multiples of {LANES} up to {MAX_WIDTH}"
            ));
        }
        if self.heads == 0
            || !self.hidden.is_multiple_of(self.heads)
            || !self.head().is_multiple_of(LANES)
        {
            return Err(format!(
                "attention heads must divide the hidden size into multiples of {LANES}"
            ));
        }
        if !(1..=128).contains(&self.layers) || !(1..=MAX_WIDTH).contains(&self.max_tokens) {
            return Err(format!(
                "it must have 1 to 128 layers and 1 to {MAX_WIDTH} positions"
            ));
        }
        // Without an epsilon a row of equal numbers would be divided by zero.
        let epsilons = f32::MIN_POSITIVE..1.0;
        if !(1..=1 << 24).contains(&self.vocabulary) || !epsilons.contains(&self.epsilon) {
            return Err("its vocabulary or layer_norm_eps is out of range".to_owned());
        }
        Ok(())
    }
}

/// All weights of a model.
#[derive(Debug)]
pub(super) struct Weights {
    pub shape: Shape,
    pub words: WordTable,
    /// `[positions, hidden]`, the first segment's embedding added in.
    pub positions: AlignedArray<f32>,
    pub norm: Norm,
    pub layers: Vec<Layer>,
}

/// Word embeddings, `[at least vocabulary, hidden]`.
#[derive(Debug)]
pub(super) enum WordTable {
    Int8 {
        values: AlignedArray<i8>,
        scale: AlignedArray<f32>,
    },
    Half(AlignedArray<u16>),
}

impl WordTable {
    /// The kernels' view.
    pub fn view(&self) -> Words<'_> {
        match self {
            Self::Int8 { values, scale } => Words::Int8 { values, scale },
            Self::Half(values) => Words::Half(values),
        }
    }
}

/// One layer normalisation.
#[derive(Debug)]
pub(super) struct Norm {
    pub gain: AlignedArray<f32>,
    pub bias: AlignedArray<f32>,
    pub epsilon: f32,
}

impl Norm {
    /// The kernels' view.
    pub fn view(&self) -> NormWeights<'_> {
        NormWeights {
            gain: &self.gain,
            bias: &self.bias,
            epsilon: self.epsilon,
        }
    }
}

/// One transformer layer.
#[derive(Debug)]
pub(super) struct Layer {
    /// Query, key and value side by side; the query carries log2(e) / sqrt(head width).
    pub qkv: Linear,
    pub attention: Linear,
    pub attention_norm: Norm,
    pub up: Linear,
    pub down: Linear,
    pub feed_forward_norm: Norm,
}

/// One linear layer, in the layout that the kernels read.
#[derive(Debug)]
pub(super) struct Linear {
    pub matrix: Matrix,
    /// `[outputs]`
    pub bias: AlignedArray<f32>,
    /// `[inputs]`: if there, activations are centred on it and rotated before they are quantised,
    /// and the weights and bias allow for both.
    pub centre: Option<AlignedArray<f32>>,
}

/// Packed weights; the shapes are those of [`Int8Weights`] and of `HalfLinear`.
#[derive(Debug)]
pub(super) enum Matrix {
    Int8 {
        packed: AlignedArray<i8>,
        scale: AlignedArray<f32>,
        sums: AlignedArray<i32>,
    },
    Half(AlignedArray<u16>),
}

impl Matrix {
    /// The kernels' view of int8 weights.
    pub fn int8<'a>(
        packed: &'a AlignedArray<i8>,
        scale: &'a AlignedArray<f32>,
        sums: &'a AlignedArray<i32>,
    ) -> Int8Weights<'a> {
        Int8Weights {
            packed,
            scale,
            sums,
        }
    }
}

/// A file in the packed format, in memory for as long as the program runs.
pub(super) struct PackedFile {
    header: Header,
    data: &'static [u8],
}

impl PackedFile {
    /// Reads the header of `bytes`, which begin on a cache line.
    pub fn parse(bytes: &'static [u8]) -> Result<Self, Error> {
        let malformed = |reason| Error::Malformed {
            file: "bundled model".to_owned(),
            reason,
        };
        let (prefix, rest) = bytes
            .split_first_chunk::<PREFIX_BYTES>()
            .ok_or_else(|| malformed("it is too short".to_owned()))?;
        let length = header_bytes(*prefix, bytes.len() as u64).map_err(malformed)?;
        let (json, data) = rest.split_at(length);
        let header = Header::parse(json, data.len() as u64).map_err(malformed)?;
        if header.metadata.get("format").map(String::as_str) != Some(PACKED_FORMAT) {
            return Err(malformed(format!("its format is not {PACKED_FORMAT}")));
        }
        Ok(Self { header, data })
    }

    /// The strings kept with the weights.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Weights that borrow the file: nothing is copied, and a page is read from disk when a kernel
    /// first touches it.
    pub fn weights(&self) -> Result<Weights, Error> {
        let shape = self.shape().map_err(malformed)?;
        shape.check().map_err(malformed)?;
        let hidden = shape.hidden;
        // Rows past the vocabulary only fill the last cache line.
        let words = shape.vocabulary.next_multiple_of(LANES);
        let mut layers = Vec::with_capacity(shape.layers);
        for layer in 0..shape.layers {
            let name = |part: &str| format!("layers.{layer}.{part}");
            layers.push(Layer {
                qkv: self.linear(&name("attention.qkv"), hidden, 3 * hidden)?,
                attention: self.linear(&name("attention.output"), hidden, hidden)?,
                attention_norm: self.norm(&name("attention.norm"), &shape)?,
                up: self.linear(&name("feed_forward.up"), hidden, shape.intermediate)?,
                down: self.linear(&name("feed_forward.down"), shape.intermediate, hidden)?,
                feed_forward_norm: self.norm(&name("feed_forward.norm"), &shape)?,
            });
        }
        Ok(Weights {
            words: WordTable::Int8 {
                values: self.array("embeddings.word.weight", "I8", &[words, hidden])?,
                scale: self.array("embeddings.word.scale", "F32", &[words])?,
            },
            positions: self.array(
                "embeddings.position.weight",
                "F32",
                &[shape.max_tokens, hidden],
            )?,
            norm: self.norm("embeddings.norm", &shape)?,
            layers,
            shape,
        })
    }

    fn shape(&self) -> Result<Shape, String> {
        fn read<T: std::str::FromStr>(
            metadata: &BTreeMap<String, String>,
            key: &str,
        ) -> Result<T, String> {
            metadata
                .get(key)
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| format!("its metadata has no valid {key}"))
        }
        let metadata = &self.header.metadata;
        Ok(Shape {
            hidden: read(metadata, "hidden_size")?,
            layers: read(metadata, "layers")?,
            heads: read(metadata, "heads")?,
            intermediate: read(metadata, "intermediate_size")?,
            vocabulary: read(metadata, "vocab_size")?,
            max_tokens: read(metadata, "max_tokens")?,
            epsilon: read(metadata, "layer_norm_eps")?,
            pooling: match read::<String>(metadata, "pooling")?.as_str() {
                "mean" => Pooling::Mean,
                "cls" => Pooling::Cls,
                _ => return Err("its pooling is neither mean nor cls".to_owned()),
            },
        })
    }

    fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear, Error> {
        let centre = format!("{name}.centre");
        let centred = self.header.tensors.contains_key(&centre);
        Ok(Linear {
            centre: if centred {
                Some(self.array(&centre, "F32", &[inputs])?)
            } else {
                None
            },
            matrix: Matrix::Int8 {
                packed: self.array(
                    &format!("{name}.weight"),
                    "I8",
                    &[outputs / LANES, inputs / 4, LANES, 4],
                )?,
                scale: self.array(&format!("{name}.scale"), "F32", &[outputs])?,
                sums: self.array(&format!("{name}.weight_sum"), "I32", &[outputs])?,
            },
            bias: self.array(&format!("{name}.bias"), "F32", &[outputs])?,
        })
    }

    fn norm(&self, name: &str, shape: &Shape) -> Result<Norm, Error> {
        Ok(Norm {
            gain: self.array(&format!("{name}.weight"), "F32", &[shape.hidden])?,
            bias: self.array(&format!("{name}.bias"), "F32", &[shape.hidden])?,
            epsilon: shape.epsilon,
        })
    }

    fn array<T: Pod>(
        &self,
        name: &str,
        dtype: &str,
        shape: &[usize],
    ) -> Result<AlignedArray<T>, Error> {
        let tensor = self
            .header
            .tensors
            .get(name)
            .ok_or_else(|| malformed(format!("tensor {} is missing", shown(name))))?;
        if tensor.dtype != dtype || tensor.shape != shape {
            return Err(malformed(format!(
                "tensor {} is not {dtype} {shape:?}",
                shown(name)
            )));
        }
        let bytes = &self.data[tensor.range.0..tensor.range.1];
        let items = bytemuck::try_cast_slice(bytes)
            .map_err(|_| malformed(format!("tensor {} is not aligned", shown(name))))?;
        Ok(AlignedArray::Borrowed(items))
    }
}

fn malformed(reason: String) -> Error {
    Error::Malformed {
        file: "bundled model".to_owned(),
        reason,
    }
}
