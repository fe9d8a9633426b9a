//! The address of the SPIFFE Workload API.

use std::{net::SocketAddr, path::PathBuf, str::FromStr};

/// The address of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentAddress {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// The address is neither `unix:///PATH` nor `tcp://IP:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a Workload API address")]
pub struct InvalidAgentAddress;

/// SPIFFE Workload Endpoint §4: `unix:///path` or `tcp://ip:port`, with or without the slashes.
impl FromStr for AgentAddress {
    type Err = InvalidAgentAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAgentAddress> {
        let (scheme, rest) = text.split_once(':').ok_or(InvalidAgentAddress)?;
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        match scheme {
            "unix" if rest.starts_with('/') => Ok(Self::Unix(rest.into())),
            "tcp" => rest.parse().map(Self::Tcp).map_err(|_| InvalidAgentAddress),
            _ => Err(InvalidAgentAddress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_agents() {
        let unix = Ok(AgentAddress::Unix("/run/agent.sock".into()));
        assert_eq!("unix:///run/agent.sock".parse(), unix);
        assert_eq!("unix:/run/agent.sock".parse(), unix);
        let tcp = Ok(AgentAddress::Tcp(([127, 0, 0, 1], 8081).into()));
        assert_eq!("tcp://127.0.0.1:8081".parse(), tcp);
        assert_eq!("tcp:127.0.0.1:8081".parse(), tcp);
        for invalid in ["", "/run/agent.sock", "unix:agent.sock", "unix://", "tcp://agent:8081", "http://a"] {
            assert_eq!(invalid.parse::<AgentAddress>(), Err(InvalidAgentAddress), "{invalid}");
        }
    }
}
