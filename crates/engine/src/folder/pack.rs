//! Quantises weights and arranges them for the kernels.

use half::f16;

use super::super::aligned::AlignedArray;
use super::super::kernel::LANES;
use super::super::kernel::quantise::rotate_weights;
use super::super::weights::{Linear, Matrix, WordTable};

/// Converts weights, `[outputs, inputs]`, and bias to the layout of the kernels, as half-precision
/// numbers or quantised. `centre`: if the layer's input comes from a normalisation, the bias of
/// that normalisation, which is about the mean of each channel.
pub(super) fn linear(
    (mut rows, mut bias): (Vec<f32>, Vec<f32>),
    centre: Option<&[f32]>,
    half: bool,
) -> Linear {
    let array =
        |items: &[f32]| AlignedArray::build(items.len(), |array| array.copy_from_slice(items));
    if half {
        return Linear {
            matrix: pack_halves(&rows, bias.len()),
            bias: array(&bias),
            centre: None,
        };
    }
    if let Some(centre) = centre {
        for (row, bias) in rows.chunks_exact_mut(centre.len()).zip(&mut bias) {
            *bias += row.iter().zip(centre).map(|(w, x)| w * x).sum::<f32>();
            rotate_weights(row);
        }
    }
    Linear {
        matrix: quantise(&rows, bias.len()),
        bias: array(&bias),
        centre: centre.map(array),
    }
}

/// Scale and bytes of one row, symmetric: -127 to 127.
fn quantise_row(row: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
    let greatest = row
        .iter()
        .fold(0.0_f32, |greatest, x| greatest.max(x.abs()));
    let scale = greatest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (at, x) in row.iter().enumerate() {
        put(at, (x * inverse).round_ties_even() as i8);
    }
    scale
}

/// Word embeddings, `[words, hidden]`, as bytes with a scale for each word.
pub(super) fn quantise_words(words: &[f32], hidden: usize) -> WordTable {
    let mut scales = Vec::with_capacity(words.len() / hidden);
    let values = AlignedArray::build(words.len(), |values| {
        for (row, values) in words
            .chunks_exact(hidden)
            .zip(values.chunks_exact_mut(hidden))
        {
            scales.push(quantise_row(row, |at, byte| values[at] = byte));
        }
    });
    WordTable::Int8 {
        values,
        scale: AlignedArray::build(scales.len(), |items| items.copy_from_slice(&scales)),
    }
}

/// `rows`: `[outputs, inputs]`; see [`Int8Weights`](crate::kernel::linear::Int8Weights) for
/// the result's order.
fn quantise(rows: &[f32], outputs: usize) -> Matrix {
    let inputs = rows.len() / outputs;
    let mut scales = Vec::with_capacity(outputs);
    let mut all_sums = Vec::with_capacity(outputs);
    let packed = AlignedArray::build(rows.len(), |packed: &mut [i8]| {
        for (output, row) in rows.chunks_exact(inputs).enumerate() {
            let start = output / LANES * LANES * inputs + output % LANES * 4;
            let mut sum = 0;
            scales.push(quantise_row(row, |input, byte| {
                packed[start + input / 4 * 4 * LANES + input % 4] = byte;
                sum += i32::from(byte);
            }));
            all_sums.push(sum);
        }
    });
    Matrix::Int8 {
        packed,
        scale: AlignedArray::build(outputs, |items| items.copy_from_slice(&scales)),
        sums: AlignedArray::build(outputs, |items| items.copy_from_slice(&all_sums)),
    }
}

/// The numbers as half-precision bits.
pub(super) fn halves(numbers: &[f32]) -> AlignedArray<u16> {
    AlignedArray::build(numbers.len(), |items| {
        items
            .iter_mut()
            .zip(numbers)
            .for_each(|(item, x)| *item = f16::from_f32(*x).to_bits());
    })
}

fn pack_halves(rows: &[f32], outputs: usize) -> Matrix {
    let inputs = rows.len() / outputs;
    Matrix::Half(AlignedArray::build(rows.len(), |packed: &mut [u16]| {
        for (output, row) in rows.chunks_exact(inputs).enumerate() {
            let start = output / LANES * LANES * inputs + output % LANES;
            for (input, x) in row.iter().enumerate() {
                packed[start + input * LANES] = f16::from_f32(*x).to_bits();
            }
        }
    }))
}
