//! gRPC status codes, and how they count for the server.

use http::{HeaderMap, StatusCode};

use super::classify::Health;

/// The status of a gRPC call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GrpcStatus {
    Ok,
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    Unimplemented,
    Internal,
    Unavailable,
    DataLoss,
    Unauthenticated,
}

impl GrpcStatus {
    const BY_CODE: [(Self, &str); 17] = [
        (Self::Ok, "grpc_ok"),
        (Self::Cancelled, "grpc_cancelled"),
        (Self::Unknown, "grpc_unknown"),
        (Self::InvalidArgument, "grpc_invalid_argument"),
        (Self::DeadlineExceeded, "grpc_deadline_exceeded"),
        (Self::NotFound, "grpc_not_found"),
        (Self::AlreadyExists, "grpc_already_exists"),
        (Self::PermissionDenied, "grpc_permission_denied"),
        (Self::ResourceExhausted, "grpc_resource_exhausted"),
        (Self::FailedPrecondition, "grpc_failed_precondition"),
        (Self::Aborted, "grpc_aborted"),
        (Self::OutOfRange, "grpc_out_of_range"),
        (Self::Unimplemented, "grpc_unimplemented"),
        (Self::Internal, "grpc_internal"),
        (Self::Unavailable, "grpc_unavailable"),
        (Self::DataLoss, "grpc_data_loss"),
        (Self::Unauthenticated, "grpc_unauthenticated"),
    ];

    /// A code that gRPC does not know is UNKNOWN.
    pub fn from_code(code: u32) -> Self {
        usize::try_from(code)
            .ok()
            .and_then(|code| Self::BY_CODE.get(code))
            .map_or(Self::Unknown, |(status, _)| *status)
    }

    pub const fn code(self) -> u32 {
        self as u32
    }

    /// `grpc-status`, from the headers of a Trailers-Only response or from trailers. UNKNOWN if it is not a number.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get("grpc-status")?;
        let code = value.to_str().ok().and_then(|text| text.parse().ok());
        Some(code.map_or(Self::Unknown, Self::from_code))
    }

    /// The status that a gRPC client derives from a response without `grpc-status` ("HTTP to gRPC Status Code
    /// Mapping").
    pub fn from_http(status: StatusCode) -> Self {
        match status.as_u16() {
            400 => Self::Internal,
            401 => Self::Unauthenticated,
            403 => Self::PermissionDenied,
            404 => Self::Unimplemented,
            429 | 502..=504 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }

    pub fn label(self) -> &'static str {
        Self::BY_CODE.iter().find(|(status, _)| *status == self).map_or("grpc_unknown", |(_, name)| name)
    }

    /// Its name in gRPC, e.g. `UNAVAILABLE`.
    pub fn name(self) -> String {
        self.label().trim_start_matches("grpc_").to_ascii_uppercase()
    }

    /// Whether it is a server error by OpenTelemetry's conventions.
    pub const fn is_failure(self) -> bool {
        matches!(
            self,
            Self::Unknown
                | Self::DeadlineExceeded
                | Self::Unimplemented
                | Self::Internal
                | Self::Unavailable
                | Self::DataLoss
        )
    }

    /// As for the HTTP statuses that Envoy maps these to. UNKNOWN is what most gRPC servers return for an exception, as
    /// HTTP servers return 500. CANCELLED mostly follows a request cancelled by its client.
    pub(super) fn health(self) -> Health {
        match self {
            Self::Unknown | Self::DeadlineExceeded | Self::Internal | Self::Unavailable | Self::DataLoss => {
                Health::Failure
            }
            Self::ResourceExhausted | Self::Cancelled => Health::Neutral,
            _ => Health::Success,
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn codes_round_trip() {
        assert!((0..=16).all(|code| GrpcStatus::from_code(code).code() == code));
        assert_eq!(GrpcStatus::from_code(17), GrpcStatus::Unknown);
        assert_eq!(GrpcStatus::from_code(14).label(), "grpc_unavailable");
    }

    #[test]
    fn reads_headers_and_trailers() {
        let read = |value: &'static str| {
            let headers = HeaderMap::from_iter([(
                http::HeaderName::from_static("grpc-status"),
                HeaderValue::from_static(value),
            )]);
            GrpcStatus::from_headers(&headers)
        };
        assert_eq!(GrpcStatus::from_headers(&HeaderMap::new()), None);
        assert_eq!(read("0"), Some(GrpcStatus::Ok));
        assert_eq!(read("14"), Some(GrpcStatus::Unavailable));
        for nonsense in ["", "99", "-1", "14x"] {
            assert_eq!(read(nonsense), Some(GrpcStatus::Unknown), "{nonsense}");
        }
    }

    #[test]
    fn maps_http_statuses() {
        let of = |code| GrpcStatus::from_http(StatusCode::from_u16(code).unwrap());
        assert_eq!(
            (of(503), of(429), of(404)),
            (GrpcStatus::Unavailable, GrpcStatus::Unavailable, GrpcStatus::Unimplemented)
        );
        assert_eq!((of(500), of(200)), (GrpcStatus::Unknown, GrpcStatus::Unknown));
    }
}
