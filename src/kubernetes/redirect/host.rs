//! Whether the network that rules would be for is the host's own.

use std::path::Path;

/// A setting that the kernel shows in its initial network namespace only, whatever the mounts and the PID namespace: a
/// container with `hostNetwork` sees it, a pod does not. Not `/proc/1/ns/net`, as process 1 of a pod is in the pod.
const HOST_ONLY_SETTING: &str = "/proc/sys/net/core/netdev_max_backlog";

/// Whether this process is in the initial network namespace.
pub fn is_host_network() -> bool {
    Path::new(HOST_ONLY_SETTING).exists()
}
