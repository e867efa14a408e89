//! FAISS as the peer, in a separate process, measured between our measurements.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::Latency;
use super::data::Vectors;

pub struct Faiss {
    python: String,
    folder: PathBuf,
}

/// What one measurement found.
pub struct Peer {
    pub latency: Latency,
    pub recall: f64,
}

impl Faiss {
    /// Hands the vectors over in files of a temporary folder.
    pub fn start(python: &str, vectors: &Vectors) -> Result<Self> {
        let name = format!("search-bench-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder)?;
        let faiss = Self {
            python: python.to_owned(),
            folder,
        };
        let rows = vectors.rows.iter();
        faiss.write("rows.f32", rows)?;
        let queries = vectors.queries.iter().flat_map(|query| query.0.iter());
        faiss.write("queries.f32", queries)?;
        Ok(faiss)
    }

    fn write<'a>(&self, name: &str, numbers: impl Iterator<Item = &'a f32>) -> Result<()> {
        let mut file = BufWriter::new(fs::File::create(self.folder.join(name))?);
        for number in numbers {
            file.write_all(&number.to_le_bytes())?;
        }
        Ok(file.flush()?)
    }

    /// Asks an exact index of the first `n` rows one query at a time, on one thread.
    pub fn measure(&self, n: usize, k: usize, truth: &[Vec<u32>]) -> Result<Peer> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/search_faiss.py");
        let output = Command::new(&self.python)
            .arg(script)
            .arg(&self.folder)
            .args([n.to_string(), k.to_string()])
            .stderr(std::process::Stdio::inherit())
            .output()
            .context("Python starts")?;
        anyhow::ensure!(output.status.success(), "the FAISS script failed");
        // A line for each query: seconds, then the rows found.
        let (mut seconds, mut hits) = (Vec::new(), 0);
        for (line, truth) in String::from_utf8(output.stdout)?.lines().zip(truth) {
            let mut words = line.split_whitespace();
            seconds.push(words.next().context("seconds")?.parse()?);
            let rows: Vec<u32> = words.map(str::parse).collect::<Result<_, _>>()?;
            hits += rows.iter().filter(|row| truth.contains(row)).count();
        }
        anyhow::ensure!(!seconds.is_empty(), "the FAISS script answered nothing");
        let recall = hits as f64 / (seconds.len() * k) as f64;
        Ok(Peer {
            latency: Latency::of(seconds),
            recall,
        })
    }
}

impl Drop for Faiss {
    fn drop(&mut self) {
        // If this fails, the rest stays in the system's folder for temporary files.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
