//! OTLP over HTTP by the client of [`crate::fetch`]. It bypasses the proxy, so exports are never traced themselves.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use opentelemetry_http::{HttpClient, HttpError};

use crate::fetch::{FetchLimits, Fetcher};

/// Limit of the collector's response body: a status, or the spans that it rejected.
const MAX_RESPONSE: usize = 64 * 1024;

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Client {
    pub fetcher: Fetcher,
    /// For one export request.
    pub timeout: Duration,
    pub failure: LastFailure,
}

/// Why the last request failed: the exporter's own error is only "network error".
#[derive(Clone, Debug, Default)]
pub struct LastFailure(Arc<Mutex<Option<String>>>);

impl LastFailure {
    fn set(&self, why: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl HttpClient for Client {
    fn send_bytes<'this, 'sending>(
        &'this self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sending>>
    where
        'this: 'sending,
        Self: 'sending,
    {
        let limits = FetchLimits { timeout: self.timeout, max_body: MAX_RESPONSE };
        Box::pin(async move {
            let response = self.fetcher.fetch(request, limits).await;
            self.failure.set(response.as_ref().err().map(ToString::to_string));
            Ok(response?)
        })
    }
}
