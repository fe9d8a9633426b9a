//! Detects whether this is the host's network namespace.

use std::{io, path::Path};

/// A setting that exists only in the kernel's initial network namespace, whatever the mounts and the PID namespace: a
/// container with `hostNetwork` sees it, a pod does not. `/proc/1/ns/net` does not help: process 1 of a pod is in the
/// pod.
const HOST_ONLY_SETTING: &str = "netdev_max_backlog";

/// The settings of the network namespace. Every namespace has some.
const SETTINGS: &str = "/proc/sys/net/core";

/// Whether this process is in the initial network namespace.
///
/// # Errors
/// Unknown: `/proc/sys` is not mounted, hidden or not readable.
pub fn is_host_network() -> io::Result<bool> {
    is_shown_in(Path::new(SETTINGS))
}

fn is_shown_in(settings: &Path) -> io::Result<bool> {
    // An empty directory is not the real one: `somaxconn` and others exist in every namespace.
    let mut others = 0;
    for entry in settings.read_dir()? {
        if entry?.file_name() == HOST_ONLY_SETTING {
            return Ok(true);
        }
        others += 1;
    }
    if others == 0 { Err(io::ErrorKind::NotFound.into()) } else { Ok(false) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn without_settings_the_namespace_is_unknown() {
        let directory = std::env::temp_dir().join(format!("outrigger-settings-{}", std::process::id()));
        assert!(is_shown_in(&directory).is_err(), "missing");
        fs::create_dir_all(&directory).unwrap();
        assert!(is_shown_in(&directory).is_err(), "empty");
        fs::write(directory.join("somaxconn"), "4096").unwrap();
        assert!(is_shown_in(&directory).is_ok_and(|is_host| !is_host));
        fs::write(directory.join(HOST_ONLY_SETTING), "1000").unwrap();
        assert!(is_shown_in(&directory).is_ok_and(|is_host| is_host));
        fs::remove_dir_all(directory).unwrap();
    }
}
