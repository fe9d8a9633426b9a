//! OTLP over HTTP by the proxy's own small client: never through the proxy, so never traced either.

use std::{future::Future, pin::Pin, time::Duration};

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
        Box::pin(async move { Ok(self.fetcher.fetch(request, limits).await?) })
    }
}
