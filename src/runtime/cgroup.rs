//! The CPU limit of the container this process runs in.

use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";

/// CPUs that the container may use, rounded up; `None` where there is no limit (or no cgroup).
pub fn cpu_limit() -> Option<u16> {
    cpu_limit_in(Path::new(MOUNT), &std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The lowest limit of this group and its ancestors.
fn cpu_limit_in(mount: &Path, membership: &str) -> Option<u16> {
    let tightest = membership.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        if controllers.is_empty() {
            tightest(mount, path, |group| quota_v2(&read(group, "cpu.max")?))
        } else if controllers.split(',').any(|name| name == "cpu") {
            // cgroup v1 mounts each controller separately, `cpu` often together with `cpuacct`.
            [controllers, "cpu"].iter().find_map(|name| {
                tightest(&mount.join(name), path, |group| {
                    quota_v1(&read(group, "cpu.cfs_quota_us")?, &read(group, "cpu.cfs_period_us")?)
                })
            })
        } else {
            None
        }
    });
    let cpus = tightest.reduce(f64::min)?;
    Some(cpus.ceil().clamp(1.0, 256.0) as u16)
}

fn tightest(mount: &Path, path: &str, limit: impl Fn(&Path) -> Option<f64>) -> Option<f64> {
    let group = mount.join(path.trim_start_matches('/'));
    // In a container the path may be the host's, which does not exist here. Then its ancestors end at the mount point,
    // which is the container's own group.
    group.ancestors().take_while(|dir| dir.starts_with(mount)).filter_map(limit).reduce(f64::min)
}

fn read(group: &Path, file: &str) -> Option<String> {
    let path: PathBuf = group.join(file);
    std::fs::read_to_string(path).ok()
}

/// `cpu.max`: `"150000 100000"`, or `"max 100000"` for none.
fn quota_v2(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    quota_v1(quota, period)
}

/// A quota of −1 (or `max`) means none.
fn quota_v1(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.trim().parse().ok()?;
    let period: f64 = period.trim().parse().ok()?;
    (quota > 0.0 && period > 0.0).then_some(quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_parsed() {
        assert_eq!(quota_v2("150000 100000\n"), Some(1.5));
        assert_eq!(quota_v2("max 100000\n"), None);
        assert_eq!(quota_v2(""), None);
        assert_eq!(quota_v1("-1\n", "100000\n"), None);
        assert_eq!(quota_v1("50000\n", "100000\n"), Some(0.5));
        assert_eq!(quota_v1("50000", "0"), None);
    }

    fn groups(files: &[(&str, &str)]) -> tempfile::TempDir {
        let mount = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = mount.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        mount
    }

    #[test]
    fn the_lowest_limit_applies_rounded_up() {
        let mount = groups(&[("pod/cpu.max", "250000 100000\n"), ("pod/app/cpu.max", "max 100000\n")]);
        assert_eq!(cpu_limit_in(mount.path(), "0::/pod/app\n"), Some(3));
        let mount = groups(&[("cpu.max", "10000 100000\n")]);
        assert_eq!(cpu_limit_in(mount.path(), "0::/\n"), Some(1), "a tenth of a CPU is one worker");
    }

    #[test]
    fn a_path_of_the_host_falls_back_to_the_mounted_group() {
        let mount = groups(&[("cpu.max", "200000 100000\n")]);
        assert_eq!(cpu_limit_in(mount.path(), "0::/kubepods/burstable/pod1/abc\n"), Some(2));
    }

    #[test]
    fn cgroup_v1_is_supported() {
        let mount = groups(&[
            ("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "120000\n"),
            ("cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n"),
        ]);
        let membership = "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/docker/x\n";
        assert_eq!(cpu_limit_in(mount.path(), membership), Some(2));
    }

    #[test]
    fn without_a_limit_there_is_none() {
        let mount = groups(&[("cpu.max", "max 100000\n")]);
        assert_eq!(cpu_limit_in(mount.path(), "0::/\n"), None);
        assert_eq!(cpu_limit_in(mount.path(), "nonsense"), None);
        let _ = cpu_limit(); // does not fail on this machine
    }
}
