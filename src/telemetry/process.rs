//! What the kernel counts for this process, under the names that Prometheus' client libraries use.

use std::fmt::{Display, Write as _};
use std::fs;

/// The process's metrics in Prometheus' text format. Empty where `/proc` cannot be read.
pub(super) fn render() -> String {
    try_render().unwrap_or_default()
}

fn try_render() -> Option<String> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let machine = fs::read_to_string("/proc/stat").ok()?;
    let boot_seconds = machine
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?;
    let boot_seconds: f64 = boot_seconds.trim().parse().ok()?;
    let open_files = fs::read_dir("/proc/self/fd").ok()?.count();
    let most_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let ticks = rustix::param::clock_ticks_per_second() as f64;

    // The name, the second field, is in brackets and may hold spaces. The first field after it has
    // number 3 in proc_pid_stat(5).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let seconds = |number| field(number).map(|spent| spent as f64 / ticks);
    let pages = field(24)?;

    let mut text = String::with_capacity(1024);
    let mut metric = |name: &str, kind: &str, help: &str, value: &dyn Display| {
        let _ = write!(
            text,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
        );
    };
    metric(
        "process_cpu_seconds_total",
        "counter",
        "Processor time of all threads.",
        &(seconds(14)? + seconds(15)?),
    );
    metric("process_threads", "gauge", "Threads.", &field(20)?);
    metric(
        "process_start_time_seconds",
        "gauge",
        "When the process started, in seconds since 1970.",
        &(boot_seconds + seconds(22)?),
    );
    metric(
        "process_virtual_memory_bytes",
        "gauge",
        "Reserved addresses.",
        &field(23)?,
    );
    metric(
        "process_resident_memory_bytes",
        "gauge",
        "Memory in use.",
        &(pages * rustix::param::page_size() as u64),
    );
    metric(
        "process_open_fds",
        "gauge",
        "Open files and connections.",
        &open_files,
    );
    metric(
        "process_max_fds",
        "gauge",
        "The system's limit on open files and connections.",
        &most_files.map_or("+Inf".to_owned(), |limit| limit.to_string()),
    );
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::{SystemTime, UNIX_EPOCH};

    #[test]
    fn figures_are_those_of_this_process() {
        let text = super::render();
        let values: HashMap<&str, f64> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_once(' ').unwrap())
            .map(|(name, value)| (name, value.parse().unwrap()))
            .collect();

        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        let age = now - values["process_start_time_seconds"];
        assert!((-2.0..86_400.0).contains(&age), "{age}");
        assert!((0.0..86_400.0).contains(&values["process_cpu_seconds_total"]));
        assert!(values["process_threads"] >= 1.0);
        assert!(values["process_open_fds"] >= 3.0);
        assert!(values["process_max_fds"] > values["process_open_fds"]);
        assert!(values["process_resident_memory_bytes"] > 1e6);
        assert!(values["process_virtual_memory_bytes"] > values["process_resident_memory_bytes"]);
        assert_eq!(values.len(), 7);
    }
}
