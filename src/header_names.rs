//! The names of header fields outside the standards that Outrigger reads and writes.

use http::HeaderName;

pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub const X_OUTRIGGER_ATTEMPT: HeaderName = HeaderName::from_static("x-outrigger-attempt");
pub const X_OUTRIGGER_RETRY: HeaderName = HeaderName::from_static("x-outrigger-retry");
pub const X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
