//! Reading a network's `config.json` strictly: every key is honoured, has the one value that this network computes, is
//! known to change nothing, or is refused by name.

use super::unet2d::nearest;
use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::Path;

/// What a `config.json` of one kind of network may hold.
pub trait Fields: Default + Serialize + DeserializeOwned {
    /// The `_class_name`s that read as this; the first is written.
    const CLASSES: &'static [&'static str];
    /// Keys that change nothing here, whatever they say.
    const WITHOUT_EFFECT: &'static [&'static str] = &[];

    /// Keys of which this network computes some values only.
    fn fixed() -> Vec<(&'static str, Vec<Value>)> {
        Vec::new()
    }

    /// Checks every field against the others.
    fn validate(&self) -> Result<()>;
}

/// Reads the text of `config.json`.
pub fn from_json<C: Fields>(path: &Path, text: &str) -> Result<C> {
    let refuse = |message: String| Error::file(path, message);
    let value: Value = serde_json::from_str(text).map_err(|e| refuse(format!("not JSON: {e}")))?;
    let fields = value.as_object().ok_or_else(|| refuse("not a JSON object".into()))?;
    if let Some(class) = fields.get("_class_name").and_then(Value::as_str)
        && !C::CLASSES.contains(&class)
    {
        return Err(refuse(format!("_class_name is {class}, only {} is supported", C::CLASSES.join(" or "))));
    }
    let mut whole = serde_json::to_value(C::default()).map_err(|e| Error::file(path, e))?;
    let fixed = C::fixed();
    // Keys that begin with an underscore are diffusers' own bookkeeping (class name, version, origin).
    for (key, field) in fields.iter().filter(|(key, _)| !key.starts_with('_')) {
        if let Some((_, values)) = fixed.iter().find(|(name, _)| name == key) {
            if !values.contains(field) {
                return Err(refuse(format!("{key} is {field}, which is not supported (only {})", values[0])));
            }
        } else if whole.get(key).is_some() {
            // One field at a time, so that the message can name it.
            let kept = std::mem::replace(&mut whole[key], field.clone());
            if let Err(reason) = serde_json::from_value::<C>(whole.clone()) {
                return Err(refuse(format!("{key} is {field}, which is not supported: {reason} (default: {kept})")));
            }
        } else if !C::WITHOUT_EFFECT.contains(&key.as_str()) {
            let known: Vec<&str> = whole.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
            return Err(refuse(format!("unknown key \"{key}\"{}", nearest(key, &known))));
        }
    }
    let config: C = serde_json::from_value(whole).map_err(|e| Error::file(path, e))?;
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(config)
}
