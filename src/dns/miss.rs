//! Why a look-up gave nothing.

use std::io;

use hickory_resolver::{
    net::{DnsError, NetError},
    proto::op::ResponseCode,
};

use crate::descriptors;

/// Why one name of the search list gave nothing.
pub(super) enum Miss {
    NoRecords(ResponseCode),
    Timeout,
    /// The server refused or failed to say.
    Failed(String),
    /// No server could be connected to; hickory does not tell why.
    NoServer(String),
    /// None could be asked, for want of something of this machine's own.
    LocalResource(String),
}

impl From<NetError> for Miss {
    fn from(error: NetError) -> Self {
        match error {
            NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
                code @ (ResponseCode::NoError | ResponseCode::NXDomain) => Self::NoRecords(code),
                code => Self::Failed(code.to_string()),
            },
            NetError::Timeout => Self::Timeout,
            NetError::Io(error) => Self::from_io(&error).unwrap_or_else(|| Self::Failed(error.to_string())),
            NetError::NoConnections => Self::NoServer("no DNS server can be connected to".to_owned()),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl Miss {
    pub fn from_io(error: &io::Error) -> Option<Self> {
        let missing = descriptors::missing(error)?;
        Some(Self::LocalResource(format!("{missing} ({error})")))
    }
}
