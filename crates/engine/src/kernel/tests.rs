//! Every kernel against plain arithmetic, and against each other.

use proptest::prelude::*;

use super::attention::{Attention, AttentionScratch};
use super::linear::{Finish, Int8Linear, Int8Weights, OutputLayout};
use super::quantise::{Quantise, QuantisedRows, rotate_weights};
use super::rows::{LayerNorm, MeanPool, NormWeights};
use super::{Kernel, LANES};

#[test]
fn expected_kernels_have_run() {
    let shape = (3, 64, 2 * LANES);
    let activation = |row, input| (row * 31 + input * 7) as u8;
    let weight = |channel, input| (channel * 5 + input * 3) as u8 as i8;
    let expected = naive_product(shape, 128, activation, weight);
    let mut ran = Vec::new();
    for kernel in Kernel::available() {
        let product = integer_product(kernel, shape, 128, activation, weight);
        assert_eq!(product, expected, "{}", kernel.name());
        ran.push(kernel.name());
    }
    let all = ["avx512-vnni", "avx2", "portable"];
    crate::expected::kernels("embedding", "EXPECT_KERNELS", &all, &ran);
}

/// Splits of a fixed stream of numbers in -1..1; the tests need many numbers, not unpredictable
/// ones.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn row_major(width: usize) -> OutputLayout {
    OutputLayout {
        group: width,
        group_stride: 0,
        row_stride: width,
    }
}

/// Weights in the order the kernels read, and each channel's sum.
fn pack(inputs: usize, outputs: usize, weight: impl Fn(usize, usize) -> i8) -> (Vec<i8>, Vec<i32>) {
    let mut packed = vec![0; outputs * inputs];
    let mut sums = vec![0; outputs];
    for channel in 0..outputs {
        for input in 0..inputs {
            let place = channel / LANES * LANES * inputs
                + input / 4 * 4 * LANES
                + channel % LANES * 4
                + input % 4;
            packed[place] = weight(channel, input);
            sums[channel] += i32::from(weight(channel, input));
        }
    }
    (packed, sums)
}

/// Runs the integer product with scales of one, so that the output is the exact sum, rounded to
/// `f32` once. `activation` and `weight` give the values by (row or channel, input).
fn integer_product(
    kernel: Kernel,
    shape: (usize, usize, usize),
    zero_point: i32,
    activation: impl Fn(usize, usize) -> u8,
    weight: impl Fn(usize, usize) -> i8,
) -> Vec<f32> {
    let (rows, inputs, outputs) = shape;
    let mut quantised = QuantisedRows {
        params: vec![(1.0, zero_point); rows],
        ..QuantisedRows::default()
    };
    quantised.values = (0..rows * inputs)
        .map(|at| activation(at / inputs, at % inputs))
        .collect();
    let (packed, sums) = pack(inputs, outputs, weight);
    let mut out = vec![f32::NAN; rows * outputs];
    kernel.run(Int8Linear {
        rows: &quantised,
        weights: Int8Weights {
            packed: &packed,
            scale: &vec![1.0; outputs],
            sums: &sums,
        },
        bias: &vec![0.0; outputs],
        finish: Finish::Store,
        layout: row_major(outputs),
        widened: &mut Vec::new(),
        out: &mut out,
    });
    out
}

fn naive_product(
    shape: (usize, usize, usize),
    zero_point: i32,
    activation: impl Fn(usize, usize) -> u8,
    weight: impl Fn(usize, usize) -> i8,
) -> Vec<f32> {
    let (rows, inputs, outputs) = shape;
    let sum = |row, channel| -> i64 {
        let term = |input| {
            (i64::from(activation(row, input)) - i64::from(zero_point))
                * i64::from(weight(channel, input))
        };
        (0..inputs).map(term).sum()
    };
    (0..rows * outputs)
        .map(|at| sum(at / outputs, at % outputs) as f32)
        .collect()
}

proptest! {
    #[test]
    fn integer_sums_of_every_kernel_are_exact(
        rows in 1_usize..20, quads in 1_usize..40, panels in 1_usize..9, zero_point in 0_i32..=255, seed in any::<u32>(),
    ) {
        let shape = (rows, 4 * quads, LANES * panels);
        let byte = |a: usize, b: usize, salt: u32| (seed ^ salt).wrapping_add((a * 7919 + b) as u32).wrapping_mul(2_654_435_761) >> 24;
        let activation = |row, input| byte(row, input, 1) as u8;
        let weight = |channel, input| byte(channel, input, 2) as u8 as i8;
        let want = naive_product(shape, zero_point, activation, weight);
        for kernel in Kernel::available() {
            prop_assert_eq!(&integer_product(kernel, shape, zero_point, activation, weight), &want, "{}", kernel.name());
        }
    }

    #[test]
    fn every_layout_and_finish_puts_each_sum_in_its_place(
        rows in 1_usize..20, quads in 1_usize..16, group in 1_usize..4, groups in 1_usize..4, residual in any::<bool>(), seed in any::<u32>(),
    ) {
        let (inputs, outputs) = (4 * quads, LANES * group * groups);
        let byte = |a: usize, b: usize, salt: u32| (seed ^ salt).wrapping_add((a * 7919 + b) as u32).wrapping_mul(2_654_435_761) >> 24;
        let activation = |row, input| byte(row, input, 1) as u8;
        let weight = |channel, input| byte(channel, input, 2) as u8 as i8;
        let sums = naive_product((rows, inputs, outputs), 3, activation, weight);
        // Each group's rows together, as attention needs them. Whole numbers below 2^24: exact,
        // fused or not.
        let layout = OutputLayout { group: LANES * group, group_stride: LANES * group * rows, row_stride: LANES * group };
        let before: Vec<f32> = (0..rows * outputs).map(|at| at as f32).collect();
        let mut want = vec![f32::NAN; rows * outputs];
        for (at, sum) in sums.iter().enumerate() {
            let (row, channel) = (at / outputs, at % outputs);
            let place = channel / layout.group * layout.group_stride + channel % layout.group + row * layout.row_stride;
            want[place] = sum + channel as f32 + if residual { before[place] } else { 0.0 };
        }
        let quantised = QuantisedRows {
            values: (0..rows * inputs).map(|at| activation(at / inputs, at % inputs)).collect(),
            params: vec![(1.0, 3); rows],
            ..QuantisedRows::default()
        };
        let (packed, weight_sums) = pack(inputs, outputs, weight);
        let bias: Vec<f32> = (0..outputs).map(|channel| channel as f32).collect();
        for kernel in Kernel::available() {
            let mut out = vec![f32::NAN; rows * outputs];
            kernel.run(Int8Linear {
                rows: &quantised,
                weights: Int8Weights { packed: &packed, scale: &vec![1.0; outputs], sums: &weight_sums },
                bias: &bias,
                finish: if residual { Finish::Residual(&before) } else { Finish::Store },
                layout,
                // What a longer call left there must not show.
                widened: &mut vec![-1; 4096],
                out: &mut out,
            });
            prop_assert_eq!(&out, &want, "{}", kernel.name());
        }
    }

    #[test]
    fn quantised_rows_are_equal_bytes_on_every_kernel_and_near_their_numbers(rows in 1_usize..6, vectors in 1_usize..30, size in 1e-6_f32..1e6, seed in any::<u32>()) {
        let width = vectors * LANES;
        let numbers: Vec<f32> = numbers(rows * width, seed).iter().map(|x| x * size).collect();
        let quantise = |kernel: Kernel, centre: Option<&[f32]>| {
            let mut into = QuantisedRows::default();
            kernel.run(Quantise { rows: &numbers, width, centre, into: &mut into });
            (into.values, into.params)
        };
        let centre = vec![size / 3.0; width];
        let (plain, rotated) = (quantise(Kernel::fastest(), None), quantise(Kernel::fastest(), Some(&centre)));
        for kernel in Kernel::available() {
            prop_assert_eq!(&quantise(kernel, None), &plain, "{}", kernel.name());
            prop_assert_eq!(&quantise(kernel, Some(&centre)), &rotated, "{}", kernel.name());
        }
        for (at, x) in numbers.iter().enumerate() {
            let (scale, zero_point) = plain.1[at / width];
            let back = scale * (i32::from(plain.0[at]) - zero_point) as f32;
            // One step at the ends, where the rounded zero point pushes numbers out of 0..=255, and
            // half a step elsewhere.
            prop_assert!((back - x).abs() <= scale * 1.01, "{x} came back as {back}, scale {scale}");
        }
    }
}

#[test]
fn extreme_values_do_not_saturate_or_wrap() {
    for kernel in Kernel::available() {
        for weight in [-128, -127, 127] {
            for (inputs, zero_point) in [(4, 0), (1536, 0), (1536, 255), (16_384, 0)] {
                let shape = (3, inputs, 2 * LANES);
                let got = integer_product(kernel, shape, zero_point, |_, _| 255, |_, _| weight);
                assert_eq!(
                    got,
                    naive_product(shape, zero_point, |_, _| 255, |_, _| weight),
                    "{} {weight} {inputs}",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn rotated_weights_undo_rotated_activations() {
    for width in [16, 48, 64, 384, 1536] {
        let (activations, weights, centre) =
            (numbers(width, 1), numbers(width, 2), numbers(width, 3));
        let exact: f32 = activations
            .iter()
            .zip(&weights)
            .zip(&centre)
            .map(|((x, w), c)| (x - c) * w)
            .sum();
        let mut rotated = weights;
        rotate_weights(&mut rotated);
        for kernel in Kernel::available() {
            let mut into = QuantisedRows::default();
            kernel.run(Quantise {
                rows: &activations,
                width,
                centre: Some(&centre),
                into: &mut into,
            });
            let (scale, zero_point) = into.params[0];
            let got: f32 = into
                .values
                .iter()
                .zip(&rotated)
                .map(|(a, w)| scale * (i32::from(*a) - zero_point) as f32 * w)
                .sum();
            // 256 steps over a range of about six deviations: an error near 1 % of one product's
            // size, which is about sqrt(width) / 3.
            assert!(
                (got - exact).abs() < 0.02 * (width as f32).sqrt(),
                "{} {width}: {got} against {exact}",
                kernel.name()
            );
        }
    }
}

#[test]
fn gelu_is_within_a_ten_thousandth_of_the_exact_function() {
    for kernel in Kernel::available() {
        for step in -160..160 {
            let x = step as f32 / 20.0;
            let quantised = QuantisedRows {
                values: vec![0; 4],
                params: vec![(1.0, 0)],
                ..QuantisedRows::default()
            };
            let mut out = [0.0; LANES];
            kernel.run(Int8Linear {
                rows: &quantised,
                weights: Int8Weights {
                    packed: &[0; 4 * LANES],
                    scale: &[1.0; LANES],
                    sums: &[0; LANES],
                },
                bias: &[x; LANES],
                finish: Finish::Gelu,
                layout: row_major(LANES),
                widened: &mut Vec::new(),
                out: &mut out,
            });
            let exact = f64::from(x) * normal_distribution(f64::from(x));
            assert!(
                (f64::from(out[3]) - exact).abs() < 1e-4,
                "{} at {x}: {} against {exact}",
                kernel.name(),
                out[3]
            );
        }
    }
}

/// Phi by its Taylor series around zero, which converges everywhere and keeps ten digits within
/// eight deviations.
fn normal_distribution(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for k in 1..400 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

fn attend(kernel: Kernel, tokens: usize, head: usize) -> Vec<f32> {
    let [queries, keys, values] = [1, 2, 3].map(|seed| numbers(tokens * head, seed));
    let mut out = vec![0.0; tokens * head];
    let mut scratch = AttentionScratch::default();
    // A longer text first: nothing of it may show in the next.
    let longer = numbers((tokens + 40) * head, 4)
        .iter()
        .map(|x| x * 1e30)
        .collect::<Vec<_>>();
    let mut ignored = vec![0.0; longer.len()];
    for (q, k, v, out) in [
        (&longer, &longer, &longer, &mut ignored),
        (&queries, &keys, &values, &mut out),
    ] {
        kernel.run(Attention {
            queries: q,
            keys: k,
            values: v,
            head,
            scratch: &mut scratch,
            out,
            out_stride: head,
        });
    }
    out
}

#[test]
fn attention_is_softmax_to_base_two_over_the_text() {
    for (tokens, head) in [(1, 16), (2, 32), (9, 32), (16, 64), (53, 32), (130, 48)] {
        let [queries, keys, values] = [1, 2, 3].map(|seed| numbers(tokens * head, seed));
        let row = |x: &[f32], t: usize| -> Vec<f64> {
            x[t * head..][..head]
                .iter()
                .map(|x| f64::from(*x))
                .collect()
        };
        for kernel in Kernel::available() {
            let got = attend(kernel, tokens, head);
            for t in 0..tokens {
                let score = |other| {
                    row(&queries, t)
                        .iter()
                        .zip(row(&keys, other))
                        .map(|(a, b)| a * b)
                        .sum::<f64>()
                        .exp2()
                };
                let weights: Vec<f64> = (0..tokens).map(score).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head {
                    let exact: f64 = (0..tokens)
                        .map(|other| weights[other] / total * f64::from(values[other * head + d]))
                        .sum();
                    let got = f64::from(got[t * head + d]);
                    assert!(
                        (got - exact).abs() < 1e-5,
                        "{} {tokens}x{head}: {got} against {exact}",
                        kernel.name()
                    );
                }
            }
        }
    }
}

#[test]
fn a_normalised_row_has_mean_bias_and_deviation_gain() {
    for kernel in Kernel::available() {
        let mut rows: Vec<f32> = numbers(2 * 384, 5).iter().map(|x| 40.0 + 3.0 * x).collect();
        kernel.run(LayerNorm {
            rows: &mut rows,
            weights: NormWeights {
                gain: &[2.0; 384],
                bias: &[0.5; 384],
                epsilon: 1e-12,
            },
        });
        for row in rows.chunks(384) {
            let mean = row.iter().sum::<f32>() / 384.0;
            let deviation = (row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 384.0).sqrt();
            assert!(
                (mean - 0.5).abs() < 1e-4 && (deviation - 2.0).abs() < 1e-4,
                "{}: {mean} {deviation}",
                kernel.name()
            );
        }
    }
}

#[test]
fn pooling_averages_and_scales_to_unit_length() {
    for kernel in Kernel::available() {
        let mut rows = vec![0.0; 2 * LANES];
        (rows[0], rows[LANES], rows[LANES + 1]) = (3.0, 3.0, 8.0);
        let mut out = [f32::NAN; LANES];
        kernel.run(MeanPool {
            rows: &rows,
            out: &mut out,
        });
        assert!(
            (out[0] - 0.6).abs() < 1e-6 && (out[1] - 0.8).abs() < 1e-6 && out[2] == 0.0,
            "{}",
            kernel.name()
        );
        kernel.run(MeanPool {
            rows: &[0.0; LANES],
            out: &mut out,
        });
        assert_eq!(out, [0.0; LANES]);
    }
}
