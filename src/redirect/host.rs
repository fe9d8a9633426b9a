//! Whether the network that rules would be for is the host's own.

use std::{io, path::Path};

/// A setting that the kernel shows in its initial network namespace only, whatever the mounts and the PID namespace: a
/// container with `hostNetwork` sees it, a pod does not. Not `/proc/1/ns/net`, as process 1 of a pod is in the pod.
const HOST_ONLY_SETTING: &str = "netdev_max_backlog";

/// Where the kernel shows the settings of a network namespace. Something of it is in each.
const SETTINGS: &str = "/proc/sys/net/core";

/// Whether this process is in the initial network namespace.
///
/// # Errors
/// It cannot be told: `/proc/sys` is not mounted, hidden, or not readable.
pub fn is_host_network() -> io::Result<bool> {
    is_shown_in(Path::new(SETTINGS))
}

fn is_shown_in(settings: &Path) -> io::Result<bool> {
    // An empty directory in the place of it says nothing: `somaxconn` and others are in every namespace.
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
    fn it_is_unknown_where_the_kernel_shows_no_settings() {
        let directory = std::env::temp_dir().join(format!("outrigger-settings-{}", std::process::id()));
        assert!(is_shown_in(&directory).is_err(), "it is not there");
        fs::create_dir_all(&directory).unwrap();
        assert!(is_shown_in(&directory).is_err(), "it is empty");
        fs::write(directory.join("somaxconn"), "4096").unwrap();
        assert!(is_shown_in(&directory).is_ok_and(|is_host| !is_host));
        fs::write(directory.join(HOST_ONLY_SETTING), "1000").unwrap();
        assert!(is_shown_in(&directory).is_ok_and(|is_host| is_host));
        fs::remove_dir_all(directory).unwrap();
    }
}
