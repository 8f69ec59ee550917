//! `dmd config show`: the settings of a distillation, whole, and what they mean.

use super::distill::settings;
use crate::cli::SettingsArgs;
use crate::config;
use anyhow::Result;
use serde_json::Value;

/// Prints them on stdout, as TOML, or as JSON where that is asked for.
pub fn run(args: &SettingsArgs, json: bool) -> Result<Value> {
    let config = settings(args)?;
    if !json {
        print!("{}", config::explained(&config)?);
    }
    Ok(serde_json::to_value(&config)?)
}
