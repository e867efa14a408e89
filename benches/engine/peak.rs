//! What this core can do at most: byte products, float products, and reading weights. Measured,
//! since processors of one name differ.

#![expect(
    unsafe_code,
    reason = "the peak of an instruction can only be measured with that instruction"
)]

use std::hint::black_box;
use std::time::Instant;

use prompt_service::embed::Kernel;

/// Independent sums: enough to hide the latency of four cycles at two a cycle, few enough for
/// sixteen registers.
const SUMS: usize = 12;

/// Repetitions in one measurement; a millisecond or less, so that it fits between two runs of the
/// engine.
const STEPS: usize = 100_000;

/// Peak rates of one core.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Byte multiply-adds, counted as two operations, a second.
    pub int8: f64,
    /// Float multiply-adds, counted as two operations, a second.
    pub float: f64,
}

/// One measurement for the instruction set of `kernel`; `None` for kernels without a known peak.
pub fn measure(kernel: Kernel) -> Option<Peak> {
    #[cfg(target_arch = "x86_64")]
    match kernel.name() {
        // SAFETY: a kernel of this name exists only on a processor with the instructions.
        "avx512-vnni" => {
            return Some(unsafe {
                Peak {
                    int8: rate(|| vnni(), 128),
                    float: rate(|| fma512(), 32),
                }
            });
        }
        // SAFETY: as above.
        "avx2" => {
            return Some(unsafe {
                Peak {
                    int8: rate(|| madd(), 32),
                    float: rate(|| fma256(), 16),
                }
            });
        }
        _ => {}
    }
    let _ = kernel;
    None
}

/// Operations a second of `work`, which does `SUMS * STEPS` instructions of `operations` each.
fn rate(work: impl Fn(), operations: usize) -> f64 {
    let start = Instant::now();
    work();
    (SUMS * STEPS * operations) as f64 / start.elapsed().as_secs_f64()
}

/// Bytes a second at which one core reads `data`, best of a few passes: where the weights lie after
/// a pass over them.
pub fn read_rate(data: &[u64]) -> f64 {
    let pass = || {
        let start = Instant::now();
        let mut sums = [0_u64; 32];
        for line in data.as_chunks::<32>().0 {
            for (sum, x) in sums.iter_mut().zip(line) {
                *sum ^= x;
            }
        }
        black_box(sums);
        size_of_val(data) as f64 / start.elapsed().as_secs_f64()
    };
    (0..8).map(|_| pass()).fold(0.0, f64::max)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{STEPS, SUMS};

    macro_rules! peak {
        ($name:ident, $features:literal, $zero:expr, |$sum:ident, $x:ident| $step:expr) => {
            #[target_feature(enable = $features)]
            pub fn $name() {
                let mut sums = [$zero; SUMS];
                let $x = black_box($zero);
                for _ in 0..STEPS {
                    for $sum in &mut sums {
                        *$sum = $step;
                    }
                }
                black_box(sums);
            }
        };
    }

    peak!(
        vnni,
        "avx512f,avx512vnni",
        _mm512_setzero_si512(),
        |sum, x| _mm512_dpbusd_epi32(*sum, x, x)
    );
    peak!(fma512, "avx512f", _mm512_setzero_ps(), |sum, x| {
        _mm512_fmadd_ps(x, x, *sum)
    });
    peak!(madd, "avx2", _mm256_setzero_si256(), |sum, x| {
        _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, x))
    });
    peak!(fma256, "avx2,fma", _mm256_setzero_ps(), |sum, x| {
        _mm256_fmadd_ps(x, x, *sum)
    });
}
#[cfg(target_arch = "x86_64")]
use x86::*;
