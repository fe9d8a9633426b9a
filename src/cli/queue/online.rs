//! On a running sidecar, by its admin API.

use http::Method;
use serde::de::DeserializeOwned;

use super::{QueueError, ReplayArgs};
use crate::{
    admin::{
        client::{AdminClient, AdminClientError},
        deliveries::{
            DeliveryFilter, DeliveryList, DropRequest, Dropped, DroppedDelivery, QueueChange, ReplayRequest,
            Replayed,
            report::{DeliveryDetail, DeliveryReport},
        },
    },
    queue::DeliveryId,
};

async fn get<T: DeserializeOwned>(client: &AdminClient, path: &str) -> Result<T, QueueError> {
    parse(client, &client.get_protected(path).await?)
}

async fn post<T: DeserializeOwned>(client: &AdminClient, path: &str, body: String) -> Result<T, QueueError> {
    parse(client, &client.change(Method::POST, path, body).await?)
}

fn parse<T: DeserializeOwned>(client: &AdminClient, body: &[u8]) -> Result<T, QueueError> {
    serde_json::from_slice(body).map_err(|error| {
        QueueError::Admin(AdminClientError::NotAdminServer {
            address: client.address(),
            reason: error.to_string(),
        })
    })
}

/// Calls `each` for every delivery, until it returns false.
pub async fn list(
    client: &AdminClient,
    filter: &DeliveryFilter,
    each: &mut impl FnMut(DeliveryReport) -> bool,
) -> Result<(), QueueError> {
    let mut after = Some(0);
    while let Some(from) = after {
        let page: DeliveryList = get(client, &format!("/deliveries?{}", filter.to_query(from))).await?;
        if !page.deliveries.into_iter().all(&mut *each) {
            return Ok(());
        }
        after = page.next;
    }
    Ok(())
}

pub async fn show(
    client: &AdminClient,
    id: DeliveryId,
    shows_bodies: bool,
) -> Result<DeliveryDetail, QueueError> {
    get(client, &format!("/deliveries/{id}?body={}", u8::from(shows_bodies))).await
}

pub async fn replay(
    client: &AdminClient,
    args: &ReplayArgs,
    filter: DeliveryFilter,
) -> Result<usize, QueueError> {
    let request = ReplayRequest {
        ids: args.id.iter().map(ToString::to_string).collect(),
        all: args.all,
        filter,
        rate: args.rate.map(|rate| format!("{}/s", 1.0 / rate.0.as_secs_f64())),
    };
    let Replayed { replayed } = post(client, "/deliveries/replay", to_json(&request)).await?;
    Ok(usize::try_from(replayed).unwrap_or(usize::MAX))
}

pub async fn drop_deliveries(
    client: &AdminClient,
    ids: &[DeliveryId],
) -> Result<Vec<DroppedDelivery>, QueueError> {
    let request = DropRequest { ids: ids.iter().map(ToString::to_string).collect() };
    let dropped: Dropped = post(client, "/deliveries/drop", to_json(&request)).await?;
    Ok(dropped.dropped)
}

pub async fn pause(client: &AdminClient, queue: &str, is_paused: bool) -> Result<(), QueueError> {
    let verb = if is_paused { "pause" } else { "resume" };
    let _: QueueChange = post(client, &format!("/queues/{queue}/{verb}"), String::new()).await?;
    Ok(())
}

/// Cannot fail: plain values.
fn to_json(request: &impl serde::Serialize) -> String {
    serde_json::to_string(request).unwrap_or_default()
}
