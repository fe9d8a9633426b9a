//! Certificates from the SPIFFE Workload API: an agent on a socket, which tells new ones before the old ones expire.

pub mod api;

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use self::api::{ApiError, X509SvidResponse};
use super::{
    TrustDomain,
    material::{Content, Pem, Text},
    store::Store,
};
use crate::{
    config::{InvalidSocket, Socket},
    rng::Rng,
};

/// Between attempts to reach the agent; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// To connect, and then to hear the first word.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("the agent at {0} does not answer")]
    Silent(String),
    #[error("the agent at {0} has ended")]
    Ended(String),
    #[error("the agent at {socket}: {source}")]
    Api { socket: String, source: ApiError },
    #[error("{0}: {1}")]
    Socket(String, InvalidSocket),
    #[error("the agent at {0} told no identity: has this workload been registered?")]
    Nothing(String),
    #[error("the agent at {0} told certificates that cannot be read")]
    Garbled(String),
}

/// Follows the agent for as long as it is polled. An agent that goes away is looked for again.
pub async fn follow(store: Arc<Store>, socket: String) {
    let mut rng = Rng::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let mut heard = false;
        let why = listen(&store, &socket, &mut heard).await;
        store.agent_is_away(why.to_string());
        pause = if heard { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        sleep(rng.jitter(pause, 0.2)).await;
    }
}

/// Takes what one stream tells until it ends.
async fn listen(store: &Store, socket: &str, heard: &mut bool) -> AgentError {
    let api = |source| AgentError::Api { socket: socket.to_owned(), source };
    let address: Socket = match socket.parse() {
        Ok(address) => address,
        Err(error) => return AgentError::Socket(socket.to_owned(), error),
    };
    let mut stream = match timeout(PATIENCE, api::subscribe(&address)).await {
        Ok(Ok(stream)) => Box::pin(stream),
        Ok(Err(error)) => return api(error),
        Err(_) => return AgentError::Silent(socket.to_owned()),
    };
    loop {
        let next = stream.message();
        // An agent has nothing to say for hours, but for its first word.
        let next = if *heard { Ok(next.await) } else { timeout(PATIENCE, next).await };
        match next {
            Ok(Ok(Some(told))) => match parts(socket, &told) {
                Ok(pem) => {
                    *heard = true;
                    store.deliver(pem);
                }
                Err(error) => return error,
            },
            Ok(Err(error)) => return api(error.into()),
            Ok(Ok(None)) => return AgentError::Ended(socket.to_owned()),
            Err(_) => return AgentError::Silent(socket.to_owned()),
        }
    }
}

/// The default SVID, the roots of its own and of federated trust domains, and what they have revoked.
fn parts(socket: &str, told: &X509SvidResponse) -> Result<Pem, AgentError> {
    let svid = told.svids.first().ok_or_else(|| AgentError::Nothing(socket.to_owned()))?;
    let garbled = || AgentError::Garbled(socket.to_owned());
    let text =
        |what: &str, der| Text { path: format!("{socket} ({what})").into(), content: Content::Der(der) };
    let own = trust_domain(&svid.spiffe_id).ok_or_else(garbled)?;
    let mut ca = vec![(Some(own), text("roots", split(&svid.bundle).ok_or_else(garbled)?))];
    for (id, bundle) in &told.federated_bundles {
        let (domain, roots) = (trust_domain(id).ok_or_else(garbled)?, split(bundle).ok_or_else(garbled)?);
        // A federated domain whose roots are not known yet keeps nobody else waiting.
        if !roots.is_empty() {
            ca.push((Some(domain), text("roots", roots)));
        }
    }
    ca.sort_by(|(a, _), (b, _)| a.cmp(b));
    let lists: Vec<_> = told.crl.iter().map(|list| list.to_vec()).collect();
    Ok(Pem {
        cert: text("certificate", split(&svid.x509_svid).ok_or_else(garbled)?),
        key: text("key", vec![svid.x509_svid_key.to_vec()]),
        ca,
        crl: if lists.is_empty() { Vec::new() } else { vec![text("revocation lists", lists)] },
    })
}

/// That of `spiffe://DOMAIN/PATH`, or of `spiffe://DOMAIN`.
fn trust_domain(id: &str) -> Option<TrustDomain> {
    id.strip_prefix("spiffe://")?.split('/').next()?.parse().ok()
}

/// The certificates that lie one behind the other.
fn split(mut der: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).ok()?;
        certificates.push(der.get(..der.len() - rest.len())?.to_vec());
        der = rest;
    }
    Some(certificates)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::identity::workload::api::X509Svid;

    fn certificate() -> Vec<u8> {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::default().self_signed(&key).unwrap().der().to_vec()
    }

    fn told(bundle: Vec<u8>) -> X509SvidResponse {
        let svid = X509Svid {
            spiffe_id: "spiffe://shop.example/a".to_owned(),
            x509_svid: Bytes::from([certificate(), certificate()].concat()),
            x509_svid_key: Bytes::from_static(b"key"),
            bundle: bundle.into(),
        };
        X509SvidResponse { svids: vec![svid], ..X509SvidResponse::default() }
    }

    fn count(text: &Text) -> usize {
        match &text.content {
            Content::Der(list) => list.len(),
            Content::Pem(_) => 0,
        }
    }

    #[test]
    fn what_is_told_is_taken_apart() {
        let mut told = told(certificate());
        told.crl = vec![Bytes::from_static(b"list")];
        let foreign = [("spiffe://b.example", certificate()), ("spiffe://a.example", Vec::new())];
        told.federated_bundles = foreign.map(|(id, roots)| (id.to_owned(), roots.into())).into();
        let pem = parts("s", &told).unwrap();
        assert_eq!((count(&pem.cert), count(&pem.key), count(&pem.crl[0])), (2, 1, 1));
        let domains: Vec<_> = pem.ca.iter().map(|(domain, _)| domain.as_ref().unwrap().as_str()).collect();
        assert_eq!(domains, ["b.example", "shop.example"], "none whose roots are not known yet");
    }

    #[test]
    fn what_cannot_be_read_is_not_taken() {
        assert!(matches!(parts("s", &X509SvidResponse::default()), Err(AgentError::Nothing(_))));
        let mut tail = certificate();
        tail.push(0);
        assert!(matches!(parts("s", &told(tail)), Err(AgentError::Garbled(_))));
        let mut nobody = told(certificate());
        nobody.svids[0].spiffe_id = "https://shop.example".to_owned();
        assert!(matches!(parts("s", &nobody), Err(AgentError::Garbled(_))));
    }
}
