//! Reading a network's `config.json` strictly: every key is honoured, has the one value that this network computes, is
//! known to change nothing, or is refused by name. And writing it, as diffusers reads it.

use super::Takes;
use crate::folder::json;
use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What a `config.json` of one kind may hold.
pub trait Fields: Default + Serialize + DeserializeOwned {
    /// The `_class_name`s that read as this; the first is diffusers' of today.
    const CLASSES: &'static [&'static str];
    /// Keys that change nothing here, whatever they say.
    const WITHOUT_EFFECT: &'static [&'static str] = &[];

    /// Keys of which this network computes some values only.
    fn fixed() -> Vec<(&'static str, Vec<Value>)> {
        Vec::new()
    }

    /// A key as diffusers 0.42 spells it.
    fn modern(key: &str) -> &str {
        key
    }

    /// Settles what the class alone decides.
    fn settle(&mut self, _class: &str) {}

    /// Checks every field against the others.
    fn validate(&self) -> Result<()>;

    /// The class that it is written as.
    fn class(&self) -> &'static str {
        Self::CLASSES[0]
    }

    /// The fields as diffusers reads them.
    fn to_fields(&self) -> Result<Map<String, Value>> {
        fields(self)
    }
}

/// And where a network of one kind lies, and what it is for.
pub trait NetworkFields: Fields {
    /// The folder of the network in a pipeline's.
    const PART: &'static str;
    /// A tensor that every such network has; what is before this name in a file is a wrapper's.
    const LANDMARK: &'static str;

    /// Why a network of this kind is no denoiser of a whole model, if it is none.
    fn why_no_model(&self) -> Option<String> {
        None
    }

    /// What the network takes.
    fn takes(&self) -> Takes;

    /// Whether the last row of its class table stands for no class, whatever the model.
    fn has_null_class(&self) -> bool {
        false
    }

    /// diffusers' pipeline for the network and a scheduler of this class.
    fn pipeline(&self, scheduler: &str) -> &'static str;
}

/// Reads the text of `config.json`.
pub fn from_json<C: Fields>(path: &Path, text: &str) -> Result<C> {
    from_value(&json::parse(path, text)?).map_err(|e| Error::file(path, e))
}

/// Reads what `config.json` holds.
pub fn from_value<C: Fields>(value: &Value) -> Result<C> {
    let refuse = |message: String| Err(Error::Config(message));
    let Some(written) = value.as_object() else { return refuse("not a JSON object".into()) };
    let class = class_of(written)?.unwrap_or(C::CLASSES[0]);
    if !C::CLASSES.contains(&class) {
        return refuse(format!("_class_name is {class}, expected {}", C::CLASSES.join(" or ")));
    }
    let fixed = C::fixed();
    let mut whole = fields(&C::default())?;
    let known: Vec<String> = whole.keys().cloned().collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let mut said_by = BTreeMap::new();
    // Keys that begin with an underscore are diffusers' own bookkeeping (class name, version, origin).
    for (written, field) in written.iter().filter(|(key, _)| !key.starts_with('_')) {
        let key = C::modern(written);
        if C::WITHOUT_EFFECT.contains(&key) {
            continue;
        }
        if let Some((_, values)) = fixed.iter().find(|(name, _)| *name == key) {
            if !values.contains(field) {
                let field = json::shown(field);
                return refuse(format!("{written} is {field}, which is not supported (only {})", values[0]));
            }
            continue;
        }
        let Some(kept) = whole.get_mut(key) else {
            return refuse(format!("unknown key \"{written}\"{}", nearest(written, &known)));
        };
        let kept = std::mem::replace(kept, field.clone());
        if let Some(other) = said_by.insert(key, written)
            && kept != *field
        {
            return refuse(format!("{other} and {written} say two different things: take one of them out"));
        }
        // One field at a time, so that the message can name it.
        if let Err(reason) = serde_json::from_value::<C>(Value::Object(whole.clone())) {
            let field = json::shown(field);
            return refuse(format!("{written} is {field}, which is not supported: {reason} (default: {kept})"));
        }
    }
    let mut config: C = serde_json::from_value(Value::Object(whole)).map_err(|e| Error::Config(e.to_string()))?;
    config.validate()?;
    config.settle(class);
    Ok(config)
}

/// The class that a `config.json` names.
pub(crate) fn class_of(fields: &Map<String, Value>) -> Result<Option<&str>> {
    match fields.get("_class_name").map(|class| (class, class.as_str())) {
        Some((class, None)) => Err(Error::Config(format!("_class_name is {class}, expected a name"))),
        class => Ok(class.and_then(|(_, class)| class)),
    }
}

/// The text of `config.json`.
pub(crate) fn to_json<C: Fields>(config: &C) -> Result<String> {
    let mut fields = config.to_fields()?;
    fields.insert("_class_name".into(), config.class().into());
    fields.insert("_diffusers_version".into(), "0.42.0".into());
    serde_json::to_string_pretty(&fields).map_err(|e| Error::Config(e.to_string()))
}

/// The fields of a value.
pub(crate) fn fields<T: Serialize>(value: &T) -> Result<Map<String, Value>> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(Error::Config(format!("{other} has no fields"))),
        Err(error) => Err(Error::Config(error.to_string())),
    }
}

/// The fields that differ from their default: a field that a later version adds changes nothing here.
pub(crate) fn without_defaults<T: Serialize + Default>(value: &T) -> Result<Value> {
    let (mut fields, default) = (fields(value)?, fields(&T::default())?);
    fields.retain(|name, value| default.get(name) != Some(value));
    Ok(Value::Object(fields))
}

/// ", did you mean …?" for a misspelt key, or nothing.
pub(crate) fn nearest(key: &str, known: &[&str]) -> String {
    let best = known.iter().max_by(|a, b| strsim::jaro_winkler(key, a).total_cmp(&strsim::jaro_winkler(key, b)));
    best.map(|name| format!(", did you mean \"{name}\"?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field that a later version adds, at its default.
    #[test]
    fn what_is_at_its_default_is_left_out() {
        #[derive(Serialize)]
        struct After {
            depth: usize,
            added: Option<f64>,
            width: usize,
        }
        impl Default for After {
            fn default() -> Self {
                After { depth: 0, added: Some(0.5), width: 0 }
            }
        }
        let after = |added| without_defaults(&After { depth: 2, added, width: 3 }).unwrap();
        assert_eq!(after(Some(0.5)), serde_json::json!({ "width": 3, "depth": 2 }));
        assert_eq!(after(None), serde_json::json!({ "width": 3, "depth": 2, "added": null }));
    }
}
