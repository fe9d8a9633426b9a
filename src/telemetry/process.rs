//! Resource usage of the process, read from `/proc`.

use std::{fs, time::Duration};

/// The usage at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// User and system time of all threads.
    pub cpu: Duration,
    pub resident_bytes: i64,
    pub open_fds: i64,
    pub max_fds: Option<i64>,
}

/// Reads the current usage; `None` where there is no `/proc`.
pub fn usage() -> Option<Usage> {
    let cpu_ticks = cpu_ticks(&fs::read_to_string("/proc/self/stat").ok()?)?;
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let limits = fs::read_to_string("/proc/self/limits").ok();
    Some(Usage {
        cpu: Duration::from_millis(cpu_ticks.saturating_mul(1000) / hertz),
        resident_bytes: resident_kib(&status)?.saturating_mul(1024),
        open_fds: i64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok()?,
        max_fds: limits.as_deref().and_then(max_open_files),
    })
}

/// utime + stime: the 14th and 15th field. The second is the name in parentheses, which may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn resident_kib(status: &str) -> Option<i64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn max_open_files(limits: &str) -> Option<i64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_of_proc_are_parsed() {
        let stat = "42 (a) b) c) S 1 42 42 0 -1 4194560 100 0 0 0 1234 66 0 0 20 0 3 0 500 0 0";
        assert_eq!(cpu_ticks(stat), Some(1300));
        assert_eq!(resident_kib("VmPeak:\t 9 kB\nVmRSS:\t    5800 kB\n"), Some(5800));
        let limits =
            "Limit  Soft Hard\nMax open files            1024                 524288               files\n";
        assert_eq!(max_open_files(limits), Some(1024));
        assert_eq!(max_open_files("Max open files unlimited unlimited files"), None);
        assert_eq!(cpu_ticks("nonsense"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_something() {
        let usage = usage().unwrap();
        assert!(usage.resident_bytes > 1 << 20, "{usage:?}");
        assert!(usage.open_fds >= 3, "{usage:?}");
    }
}
