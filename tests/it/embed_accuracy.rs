//! The bundled model compared with the reference set (`tests/reference/README.md`), on every kernel
//! of this processor.

use prompt_service::embed::{Kernel, Model, Scratch};
use serde::Deserialize;

/// Neighbours that are compared.
const TOP: usize = 10;

#[derive(Deserialize)]
struct Line {
    input_ids: Vec<u32>,
    embedding: Vec<f64>,
}

fn reference() -> Vec<Line> {
    let text = include_str!("../reference/all-MiniLM-L6-v2.jsonl");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line of the reference set"))
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The other rows by falling score, as (score, row).
fn neighbours(rows: &[Vec<f64>], row: usize) -> Vec<(f64, usize)> {
    let others = (0..rows.len()).filter(|other| *other != row);
    let mut scores: Vec<_> = others
        .map(|other| (dot(&rows[row], &rows[other]), other))
        .collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    scores
}

/// Mean share of the nearest ten that are among the reference's nearest ten, or as near as its
/// tenth.
fn overlap(got: &[Vec<f64>], exact: &[Vec<f64>]) -> f64 {
    let share = |row: usize| {
        let tenth = neighbours(exact, row)[TOP - 1].0 - 1e-9;
        let found = &neighbours(got, row)[..TOP];
        let right = found
            .iter()
            .filter(|(_, other)| dot(&exact[row], &exact[*other]) >= tenth);
        right.count() as f64 / TOP as f64
    };
    (0..got.len()).map(share).sum::<f64>() / got.len() as f64
}

#[test]
fn every_kernel_meets_the_accuracy_limits() {
    let lines = reference();
    let exact: Vec<_> = lines.iter().map(|line| line.embedding.clone()).collect();
    let batch: Vec<_> = lines.iter().map(|line| line.input_ids.as_slice()).collect();
    for kernel in Kernel::available() {
        let name = kernel.name();
        let model = Model::bundled().unwrap().with_kernel(kernel);
        let got = model.embed(&batch, &mut Scratch::default());
        let wide = |vector: &[f32]| vector.iter().copied().map(f64::from).collect();
        let got: Vec<Vec<f64>> = got.iter().map(|vector| wide(&vector.0)).collect();
        let cosines: Vec<f64> = got.iter().zip(&exact).map(|(a, b)| dot(a, b)).collect();
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        let least = cosines.iter().copied().fold(1.0, f64::min);
        let overlap = overlap(&got, &exact);
        println!("{name}: mean {mean:.6}, least {least:.5}, overlap {overlap:.4}");
        // The bars of the reference set are 0.998, 0.990 and 0.96. These are what the weights
        // reach, less the noise of another kernel.
        assert!(mean > 0.9997, "{name}: mean cosine {mean}");
        assert!(least > 0.9985, "{name}: least cosine {least}");
        assert!(overlap > 0.978, "{name}: top-10 overlap {overlap}");
    }
}
