//! `tcp_user_timeout`: when the kernel closes a connection whose peer acknowledges nothing.

use std::{fmt, str::FromStr, time::Duration};

use super::{Policy, Upstream};
use crate::{net::alpn::ApplicationProtocol, text_value, units::HumanDuration};

/// The default over HTTP/2, where a peer reads at all times, however slow its streams are.
const HTTP2: Duration = Duration::from_secs(30);

/// `upstream.tcp_user_timeout`
///
/// The kernel also closes connections whose peer is alive but keeps its window closed for that long. Over HTTP/1.1 a
/// slow peer may do so in the middle of an upload, so the default there is the idle timeout that applies anyway.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum UserTimeout {
    /// HTTP/2: 30 s; HTTP/1.1: `idle_timeout`; tunnels: `tunnel_idle_timeout`.
    #[default]
    Auto,
    Fixed(HumanDuration),
}

impl UserTimeout {
    fn limit(self, policy: &Policy, speaks: ApplicationProtocol) -> Option<Duration> {
        match (self, speaks) {
            (Self::Fixed(limit), _) => limit.limit(),
            (Self::Auto, ApplicationProtocol::H2) => Some(HTTP2),
            (Self::Auto, ApplicationProtocol::Http1) => policy.idle_timeout.limit(),
            (Self::Auto, ApplicationProtocol::Opaque | ApplicationProtocol::ByteStream) => {
                policy.tunnel_idle_timeout.limit()
            }
        }
    }
}

impl Upstream {
    /// TCP_USER_TIMEOUT of a connection to this upstream. `None`: the kernel's default.
    pub fn user_timeout(&self, speaks: ApplicationProtocol) -> Option<Duration> {
        self.tcp_user_timeout.limit(&self.policy, speaks)
    }
}

impl FromStr for UserTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Fixed) }
    }
}

impl fmt::Display for UserTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(duration) => duration.fmt(f),
        }
    }
}

text_value!(
    UserTimeout,
    "UserTimeout",
    "\"auto\" or a duration",
    r"auto|\s*(?:0|(?:[0-9][0-9.]*\s*(?:us|ms|s|m|h|d)\s*)+)\s*"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_at_least_the_idle_timeout_of_the_policy() {
        let policy = Policy::default();
        let limits = |text: &str| {
            let timeout: UserTimeout = text.parse().expect("a timeout");
            [ApplicationProtocol::H2, ApplicationProtocol::Http1, ApplicationProtocol::Opaque]
                .map(|speaks| timeout.limit(&policy, speaks))
        };
        let seconds = |count| Some(Duration::from_secs(count));
        assert_eq!(limits("auto"), [seconds(30), seconds(300), seconds(3600)]);
        assert_eq!(limits("20s"), [seconds(20); 3]);
        assert_eq!(limits("0s"), [None; 3]);
        assert!("soon".parse::<UserTimeout>().is_err());
    }
}
