//! What a run of the tests expects of its machine. The tests of kernels run those that the
//! processor has, and pass whichever they are. A line of the run says which ran. If an environment
//! variable names a kernel that did not run, the run fails.

use std::io::Write;

/// Prints which kernels of `part` ran: `ran` of `all`.
///
/// # Panics
/// If the environment's `variable` (names, separated by commas) names a kernel that did not run.
pub fn kernels(part: &str, variable: &str, all: &[&str], ran: &[&str]) {
    let missing: Vec<&str> = all
        .iter()
        .copied()
        .filter(|name| !ran.contains(name))
        .collect();
    let rest = if missing.is_empty() {
        String::new()
    } else {
        format!("; this processor has no {}", missing.join(", "))
    };
    // Not by `eprintln!`, whose output the test harness shows only if the test fails.
    let line = format!("kernels tested ({part}): {}{rest}\n", ran.join(", "));
    let _ = std::io::stderr().write_all(line.as_bytes());
    require(variable, &std::env::var(variable).unwrap_or_default(), ran);
}

fn require(variable: &str, expected: &str, ran: &[&str]) {
    for name in expected.split(',').map(str::trim) {
        assert!(
            name.is_empty() || ran.contains(&name),
            "{variable} names {name}, which did not run; tested: {}",
            ran.join(", ")
        );
    }
}

#[test]
fn an_expected_kernel_that_did_not_run_is_a_failure() {
    for satisfied in ["", "portable", "avx2, portable"] {
        require("EXPECT_KERNELS", satisfied, &["avx2", "portable"]);
    }
    for unsatisfied in ["avx512", "portable,avx512", "portabel"] {
        let run = || require("EXPECT_KERNELS", unsatisfied, &["avx2", "portable"]);
        let message = std::panic::catch_unwind(run).unwrap_err();
        let message = message.downcast::<String>().unwrap();
        assert!(message.starts_with("EXPECT_KERNELS names "), "{message}");
    }
}
