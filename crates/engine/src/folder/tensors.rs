//! Reads the numbers of a safetensors file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::super::Error;
use super::super::aligned::AlignedArray;
use super::super::safetensors::{Header, PREFIX_BYTES, header_bytes, shown};
use super::super::weights::{Norm, Shape};

/// The greatest number of half precision. Trained weights are a thousandth of it, and within it no
/// intermediate result overflows: 16,384 products of a normalised activation (below 2²³) and a
/// weight stay below 2⁵³, sums of products of two such below 2¹²⁰.
const GREATEST: f32 = 65_504.0;

/// A safetensors file, read tensor by tensor, so that it need not fit in memory twice.
pub(super) struct TensorFile {
    path: PathBuf,
    file: File,
    header: Header,
    data_start: u64,
    /// Some exporters put `bert.` before every name.
    prefix: &'static str,
    hasher: Sha256,
}

impl TensorFile {
    /// Opens the file and reads its header.
    pub fn open(path: PathBuf) -> Result<Self, Error> {
        let read = |source| Error::Read {
            path: path.clone(),
            source,
        };
        let malformed = |reason| Error::Malformed {
            file: path.display().to_string(),
            reason,
        };
        let mut file = File::open(&path).map_err(read)?;
        let file_bytes = file.metadata().map_err(read)?.len();
        let mut prefix = [0; PREFIX_BYTES];
        file.read_exact(&mut prefix).map_err(read)?;
        let length = header_bytes(prefix, file_bytes).map_err(malformed)?;
        let mut json = vec![0; length];
        file.read_exact(&mut json).map_err(read)?;
        let data_start = (PREFIX_BYTES + length) as u64;
        let header = Header::parse(&json, file_bytes - data_start).map_err(malformed)?;
        let prefix = if header
            .tensors
            .contains_key("bert.embeddings.word_embeddings.weight")
        {
            "bert."
        } else {
            ""
        };
        Ok(Self {
            path,
            file,
            header,
            data_start,
            prefix,
            hasher: Sha256::new(),
        })
    }

    /// Whether its word embeddings are of half precision, and with them all its matrices: see
    /// [`linear`](Self::linear).
    pub fn is_half(&self) -> bool {
        self.dtype("embeddings.word_embeddings.weight") == Some("F16")
    }

    fn dtype(&self, name: &str) -> Option<&str> {
        self.header
            .tensors
            .get(&format!("{}{name}", self.prefix))
            .map(|tensor| tensor.dtype.as_str())
    }

    /// Shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let tensor = self.header.tensors.get(&format!("{}{name}", self.prefix));
        tensor.map(|tensor| tensor.shape.as_slice())
    }

    /// Adds `bytes` to the fingerprint, besides all tensors that are read.
    pub fn fingerprint(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// Hex SHA-256 of everything that was added.
    pub fn finish(self) -> String {
        let digest = self.hasher.finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// An error about this file.
    pub fn malformed(&self, reason: String) -> Error {
        Error::Malformed {
            file: self.path.display().to_string(),
            reason,
        }
    }

    /// The numbers of a tensor of this shape, all within [`GREATEST`].
    pub fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let name = format!("{}{name}", self.prefix);
        let Some(tensor) = self.header.tensors.get(&name).cloned() else {
            return Err(self.malformed(format!("tensor {} is missing", shown(&name))));
        };
        if tensor.shape != shape {
            return Err(
                self.malformed(format!("tensor {} is not of shape {shape:?}", shown(&name)))
            );
        }
        // The header was checked against the file's length, so this is no more than the file holds.
        let mut bytes = vec![0; tensor.range.1 - tensor.range.0];
        let at = SeekFrom::Start(self.data_start + tensor.range.0 as u64);
        let result = self
            .file
            .seek(at)
            .and_then(|_| self.file.read_exact(&mut bytes));
        result.map_err(|source| Error::Read {
            path: self.path.clone(),
            source,
        })?;
        self.hasher.update(&bytes);
        let numbers: Vec<f32> = match tensor.dtype.as_str() {
            "F32" => bytes
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect(),
            "F16" => bytes
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f16::from_le_bytes(*bytes).to_f32())
                .collect(),
            "BF16" => bytes
                .as_chunks()
                .0
                .iter()
                .map(|bytes| bf16::from_le_bytes(*bytes).to_f32())
                .collect(),
            _ => {
                return Err(self.malformed(format!(
                    "tensor {} is none of F32, F16 and BF16",
                    shown(&name)
                )));
            }
        };
        // False for NaN too.
        if !numbers.iter().all(|x| x.abs() <= GREATEST) {
            return Err(self.malformed(format!(
                "tensor {} has a number that is not finite or beyond {GREATEST}",
                shown(&name)
            )));
        }
        Ok(numbers)
    }

    /// As `floats`, on a cache line.
    pub fn array(&mut self, name: &str, shape: &[usize]) -> Result<AlignedArray<f32>, Error> {
        let numbers = self.floats(name, shape)?;
        Ok(AlignedArray::build(numbers.len(), |items| {
            items.copy_from_slice(&numbers)
        }))
    }

    /// The layer normalisation `name`.
    pub fn norm(&mut self, name: &str, shape: &Shape) -> Result<Norm, Error> {
        Ok(Norm {
            gain: self.array(&format!("{name}.LayerNorm.weight"), &[shape.hidden])?,
            bias: self.array(&format!("{name}.LayerNorm.bias"), &[shape.hidden])?,
            epsilon: shape.epsilon,
        })
    }

    /// Weights, `[outputs, inputs]`, and bias of the linear layer `name`. The weights are of half
    /// precision if and only if the word embeddings are: a mixed model would have a wrong name, and
    /// lose either precision or speed.
    pub fn linear(
        &mut self,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let weight = format!("{name}.weight");
        let rows = self.floats(&weight, &[outputs, inputs])?;
        if (self.dtype(&weight) == Some("F16")) != self.is_half() {
            return Err(self.malformed("only some of its matrices are F16".to_owned()));
        }
        let bias = self.floats(&format!("{name}.bias"), &[outputs])?;
        Ok((rows, bias))
    }
}
