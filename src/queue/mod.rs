//! Durable deliveries: requests that are accepted while the service is away, kept on disk, and delivered when it is back.
//!
//! [`store`] keeps them. What happens to a delivery after an attempt is decided in [`crate::resilience::queue`].

pub mod request;
pub mod store;

pub use crate::delivery_id::DeliveryId;
pub use request::StoredRequest;
