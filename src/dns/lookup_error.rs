//! Why a lookup has no result.

use std::io;

use hickory_resolver::{
    net::{DnsError, NetError},
    proto::op::ResponseCode,
};

use crate::descriptors;

/// Why the lookup of one candidate of the search list has no result.
pub(super) enum LookupError {
    NoRecords(ResponseCode),
    Timeout,
    /// The server refused the query or failed.
    Failed(String),
    /// No server could be reached; hickory does not report why.
    NoServer(String),
    /// No server could be queried, because this machine lacked a resource.
    LocalResource(String),
}

impl From<NetError> for LookupError {
    fn from(error: NetError) -> Self {
        match error {
            NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
                code @ (ResponseCode::NoError | ResponseCode::NXDomain) => Self::NoRecords(code),
                code => Self::Failed(code.to_string()),
            },
            NetError::Timeout => Self::Timeout,
            NetError::Io(error) => Self::from_io(&error).unwrap_or_else(|| Self::Failed(error.to_string())),
            NetError::NoConnections => Self::NoServer("no DNS server can be reached".to_owned()),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl LookupError {
    pub fn from_io(error: &io::Error) -> Option<Self> {
        let missing = descriptors::missing_resource(error)?;
        Some(Self::LocalResource(format!("{missing} ({error})")))
    }
}
