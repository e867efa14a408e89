//! The numerics of the forward pass, for each instruction set, and the only unsafe code of the
//! project.
//!
//! Invariants: the integer sums of every kernel are equal. AVX2 and AVX-512 agree to the bit. If
//! its target has no fused multiply-add, the portable kernel gives vectors with a cosine of at
//! least 0.9995 to theirs (a number near a rounding boundary is quantised to its neighbour), and it
//! meets the same accuracy limits. A row's result depends only on that row (a token's attention
//! only on its text), not on the number of rows in the call.

#![expect(
    clippy::needless_range_loop,
    reason = "tiles are indexed by constant bounds, which unroll into registers; iterators over several arrays at once do not"
)]

pub mod attention;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics: 5 times the portable kernel's speed, see benches/engine"
)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics: 4 times the AVX2 kernel's speed, see benches/engine"
)]
mod avx512;
pub mod linear;
mod portable;
pub mod quantise;
pub mod rows;
mod simd;
#[cfg(test)]
mod tests;

use simd::Simd;
pub use simd::{LANES, Op};

/// The instruction set that a model runs on.
#[derive(Clone, Copy, Debug)]
pub struct Kernel(InstructionSet);

#[derive(Clone, Copy, Debug)]
enum InstructionSet {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(avx512::Avx512Vnni),
}

impl Kernel {
    /// Every kernel that this processor can run, fastest first. The portable one is always the
    /// last.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(
                avx512::Avx512Vnni::detect().map(|simd| Self(InstructionSet::Avx512Vnni(simd))),
            );
            found.extend(avx2::Avx2::detect().map(|simd| Self(InstructionSet::Avx2(simd))));
        }
        found.push(Self(InstructionSet::Portable(portable::Portable)));
        found
    }

    /// The fastest kernel that this processor can run.
    pub fn fastest() -> Self {
        Self::available()[0]
    }

    /// Its name in logs and benches: `avx512-vnni`, `avx2` or `portable`.
    pub fn name(self) -> &'static str {
        match self.0 {
            InstructionSet::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vnni(_) => "avx512-vnni",
        }
    }

    /// Runs `op` with this kernel's instructions.
    pub(super) fn run<O: Op>(self, op: O) -> O::Output {
        match self.0 {
            InstructionSet::Portable(simd) => simd.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2(simd) => simd.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vnni(simd) => simd.vectorize(op),
        }
    }
}
