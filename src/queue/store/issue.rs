//! Which IDs the store has issued. The last bytes of an ID are a code over the rest of it and the client, so that the store
//! recognises an ID long after the delivery was deleted, and keeps nothing for that.

use aws_lc_rs::hmac;
use rusqlite::{Connection, OptionalExtension};

use super::error::StoreError;
use crate::delivery_id::DeliveryId;

/// Bytes of the code. The six random bytes before it keep IDs of one millisecond apart.
const CODE: usize = 4;

/// The key of the codes, which belongs to the file.
#[derive(Debug)]
pub(super) struct IdKey(hmac::Key);

impl IdKey {
    /// The key of the file. A new file gets one.
    pub(super) fn of(connection: &Connection) -> Result<Self, StoreError> {
        let stored = || {
            let query = "SELECT value FROM meta WHERE name = 'id_key'";
            connection.query_row(query, [], |row| row.get::<_, Vec<u8>>(0)).optional()
        };
        let key = match stored()? {
            Some(key) => key,
            None => {
                let mut key = vec![0; 32];
                getrandom::fill(&mut key).map_err(|error| StoreError::Failed(error.to_string()))?;
                connection.execute("INSERT INTO meta VALUES ('id_key', ?1)", [&key])?;
                key
            }
        };
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &key)))
    }

    /// The ID with its code, for this client. `random` is an ID with random bytes in its place.
    pub(super) fn issue(&self, random: DeliveryId, identity: &str) -> DeliveryId {
        let mut bytes = random.to_bytes();
        let (rest, code) = bytes.split_at_mut(16 - CODE);
        let mut context = hmac::Context::with_key(&self.0);
        context.update(rest);
        context.update(identity.as_bytes());
        code.copy_from_slice(&context.sign().as_ref()[..CODE]);
        DeliveryId::from_bytes(bytes)
    }

    /// Whether this client has got this ID from here. One made up passes once in 4 billion.
    pub(super) fn has_issued(&self, id: DeliveryId, identity: &str) -> bool {
        self.issue(id, identity) == id
    }
}
