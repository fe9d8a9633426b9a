//! JSON Patch (RFC 6902), as far as injection needs it, for admission responses and for files.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One operation. Paths are JSON Pointers (RFC 6901).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Operation {
    Add { path: String, value: Value },
    Replace { path: String, value: Value },
    Remove { path: String },
}

/// The path of an operation does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("path {0} does not exist")]
pub struct NoSuchPath(pub String);

/// The unescaped segments of a pointer.
pub fn segments(path: &str) -> Vec<String> {
    path.split('/').skip(1).map(|part| part.replace("~1", "/").replace("~0", "~")).collect()
}

/// Escapes a segment for a pointer.
pub fn escape(part: &str) -> String {
    part.replace('~', "~0").replace('/', "~1")
}

impl Operation {
    pub fn path(&self) -> &str {
        match self {
            Self::Add { path, .. } | Self::Replace { path, .. } | Self::Remove { path } => path,
        }
    }

    /// # Errors
    ///
    /// If the path does not exist.
    pub fn apply(&self, target: &mut Value) -> Result<(), NoSuchPath> {
        let missing = || NoSuchPath(self.path().to_owned());
        let path = self.path();
        let (parent, _) = path.rsplit_once('/').ok_or_else(missing)?;
        let last = segments(path).pop().ok_or_else(missing)?;
        match (target.pointer_mut(parent).ok_or_else(missing)?, self) {
            (Value::Object(map), Self::Add { value, .. }) => {
                map.insert(last, value.clone());
            }
            (Value::Object(map), Self::Replace { value, .. }) => {
                *map.get_mut(&last).ok_or_else(missing)? = value.clone();
            }
            (Value::Object(map), Self::Remove { .. }) => {
                // Not `remove`, which would move the last member there.
                map.shift_remove(&last).ok_or_else(missing)?;
            }
            (Value::Array(list), operation) => {
                let at = if last == "-" { list.len() } else { last.parse().map_err(|_| missing())? };
                let inside = at < list.len();
                match operation {
                    Self::Add { value, .. } if at <= list.len() => list.insert(at, value.clone()),
                    Self::Replace { value, .. } if inside => list[at] = value.clone(),
                    Self::Remove { .. } if inside => drop(list.remove(at)),
                    _ => return Err(missing()),
                }
            }
            _ => return Err(missing()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn operations_follow_json_patch() {
        let patch: Vec<Operation> = serde_json::from_value(json!([
            {"op": "add", "path": "/a~1b", "value": 1},
            {"op": "add", "path": "/list/0", "value": 0},
            {"op": "add", "path": "/list/-", "value": 9},
            {"op": "replace", "path": "/list/1", "value": 5},
            {"op": "remove", "path": "/x"}
        ]))
        .unwrap();
        let mut value = json!({"x": 1, "list": [1], "z": 2});
        for operation in &patch {
            operation.apply(&mut value).unwrap();
        }
        assert_eq!(value.to_string(), r#"{"list":[0,5,9],"z":2,"a/b":1}"#);
        for missing in ["/no/where", "/list/7", "/list/x", "/z/1", ""] {
            let path = missing.to_owned();
            assert!(Operation::Remove { path }.apply(&mut value).is_err(), "{missing}");
        }
    }
}
