//! The address of the SPIFFE Workload API.

use std::{net::SocketAddr, path::PathBuf, str::FromStr};

/// The address of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// The address is neither `unix:///PATH` nor `tcp://IP:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a Workload API address")]
pub struct InvalidSocket;

/// SPIFFE Workload Endpoint §4: `unix:///path` or `tcp://ip:port`, with or without the slashes.
impl FromStr for Socket {
    type Err = InvalidSocket;

    fn from_str(text: &str) -> Result<Self, InvalidSocket> {
        let (scheme, rest) = text.split_once(':').ok_or(InvalidSocket)?;
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        match scheme {
            "unix" if rest.starts_with('/') => Ok(Self::Unix(rest.into())),
            "tcp" => rest.parse().map(Self::Tcp).map_err(|_| InvalidSocket),
            _ => Err(InvalidSocket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_agents() {
        let unix = Ok(Socket::Unix("/run/agent.sock".into()));
        assert_eq!("unix:///run/agent.sock".parse(), unix);
        assert_eq!("unix:/run/agent.sock".parse(), unix);
        let tcp = Ok(Socket::Tcp(([127, 0, 0, 1], 8081).into()));
        assert_eq!("tcp://127.0.0.1:8081".parse(), tcp);
        assert_eq!("tcp:127.0.0.1:8081".parse(), tcp);
        for invalid in ["", "/run/agent.sock", "unix:agent.sock", "unix://", "tcp://agent:8081", "http://a"] {
            assert_eq!(invalid.parse::<Socket>(), Err(InvalidSocket), "{invalid}");
        }
    }
}
