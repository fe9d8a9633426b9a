//! OTLP over HTTP by the proxy's own small client: never through the proxy, so never traced either.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use opentelemetry_http::{HttpClient, HttpError};

use crate::fetch::{Fetcher, Limits};

/// What a collector may answer: a status, or which spans it did not like.
const MOST_ANSWER: usize = 64 * 1024;

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Client {
    pub fetcher: Fetcher,
    /// For one try.
    pub patience: Duration,
    pub failure: Failure,
}

/// Why there was no answer last: the exporter itself says no more than "network error".
#[derive(Clone, Debug, Default)]
pub struct Failure(Arc<Mutex<Option<String>>>);

impl Failure {
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
        let limits = Limits { patience: self.patience, answer: MOST_ANSWER };
        Box::pin(async move {
            let answer = self.fetcher.fetch(request, limits).await;
            self.failure.set(answer.as_ref().err().map(ToString::to_string));
            Ok(answer?)
        })
    }
}
